"""The benchmarks run, take turns, and count right. How fast anything is, is not tested."""
import csv
import sys

import pytest
import torch

from bench.__main__ import main
from bench.harness import HERE, Team, Variant, append_csv, format_table
from bench.models import SHAPES, prepare_rows, read_recipe, read_shape, save_weights, tune_variants
from bench.text import find_merges
from nanochat.bpb import bits_per_byte

FAKE = """
import json, sys
job = json.loads(sys.argv[1])
if job.get("missing"):
    print("a library is missing", file=sys.stderr)
    raise SystemExit(1)
print(json.dumps({"parameters": 1}), flush=True)
for turn, line in enumerate(sys.stdin):
    if job.get("dies") == turn:
        raise SystemExit("no memory left")
    open(job["log"], "a").write(job["name"])
    print(json.dumps({"seconds": job["seconds"][turn], "said": turn} | json.loads(line)), flush=True)
open(job["log"], "a").write(job["name"].upper())
"""


def bench(monkeypatch, base, *arguments):
    "Run `nanochat bench`, and read what it adds to the CSV file: variant -> measure -> value of the last configuration."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.delenv("NANOCHAT_TEST_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    main()
    rows = list(csv.DictReader((base / "bench" / f"{arguments[0]}.csv").open()))
    results = {}
    for row in rows:
        if row["configuration"] == rows[-1]["configuration"]:
            results.setdefault(row["variant"], {})[row["measure"]] = row["value"]
    return results


def fakes(folder, **jobs):
    (folder / "fake.py").write_text(FAKE)
    return [Variant(name, folder / "fake.py", {"name": name, "log": str(folder / "log"), **job}, folder) for name, job in jobs.items()]


def test_workers_take_turns_and_medians_are_kept(tmp_path):
    with Team(fakes(tmp_path, a={"seconds": [1, 9, 2]}, b={"seconds": [4, 4.5, 30]}, c={"seconds": [0, 1, 0]})) as team:
        measured = team.measure(3, "wait", long=7)
    assert (tmp_path / "log").read_text() == "abc" "bca" "cab" "ABC"  # everyone begins once; all were ended in the end
    assert measured["a"] == {"seconds": 2, "said": 1, "do": "wait", "long": 7}
    assert measured["b"]["seconds"] == 4.5


def test_a_worker_that_fails_is_one_line_and_the_others_go_on(tmp_path):
    said = []
    variants = fakes(tmp_path, a={"missing": True}, b={"seconds": [1, 2, 3], "dies": 1}, c={"seconds": [1, 2, 3]})
    with Team(variants, said.append) as team:
        processes = [worker.process for worker in team.workers.values()]
        assert list(team.measure(3, "wait")) == ["c"]
    assert said == ["a failed: a library is missing", "b failed: no memory left"]
    assert all(process.poll() is not None for process in processes)


def test_ratios_are_of_our_best():
    results = {"ours": {"speed": 10.0}, "ours fast": {"speed": 30.0}, "theirs": {"speed": 15.0, "note": "x"}, "others": {"speed": 20.0}}
    lines = format_table(results, {"ours", "ours fast"}, "speed").splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["3.00", "1.00", "2.00", "1.50"]
    assert lines[-1].startswith("ours / best peer, speed: 1.50")
    lower = format_table(results, {"ours", "ours fast"}, "speed", lower=True).splitlines()
    assert lower[-1].startswith("ours / best peer, speed: 1.50") and [line.split()[-1] for line in lower[1:3]] == ["1.00", "3.00"]
    assert "best peer" not in format_table({"ours": {"speed": 1.0}}, {"ours"}, "speed")


def test_the_csv_file_grows(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for value in (1.5, 2.5):
        path = append_csv("train", "a machine, with a comma", "tiny", {"ours": {"step ms": value, "same": True}})
    rows = list(csv.DictReader(path.open()))
    assert [row["value"] for row in rows] == ["1.5", "True", "2.5", "True"]
    assert rows[0]["machine"] == "a machine, with a comma" and list(rows[0]) == ["date", "machine", "configuration", "variant", "measure", "value"]


def test_training_and_the_same_loss(monkeypatch, tmp_path, capsys):
    results = bench(monkeypatch, tmp_path, "train", "--config", "micro", "--rounds", "1", "--steps", "1", "--device", "cpu")
    assert set(results) == {"ours", "transformers"}
    assert float(results["transformers"]["first loss - ours"]) < 1e-4
    assert all(float(results[name]["tokens/s"]) > 0 and float(results[name]["MB"]) > 10 for name in results)
    assert "best peer, tokens/s" in capsys.readouterr().out


def test_decoding_and_the_same_tokens(monkeypatch, tmp_path):
    results = bench(monkeypatch, tmp_path, "decode", "--config", "micro", "--rounds", "1", "--prompts", "5", "--batches", "2", "--new", "6", "--device", "cpu")
    assert results["ours"]["as ours"] == results["transformers"]["as ours"] == "6 of 6"


def test_tokenizer_data_and_import(monkeypatch, tmp_path, capsys):
    results = bench(monkeypatch, tmp_path, "tokenizer", "--rounds", "1", "--megabytes", "0.2", "--vocab-size", "400")
    assert {name: measures["same tokens"] for name, measures in results.items()} == {"ours": "True", "tiktoken": "True", "tokenizers": "True"}
    assert float(bench(monkeypatch, tmp_path, "data", "--config", "micro", "--rounds", "1", "--steps", "1")["training, ours"]["batches/s"]) > 0
    monkeypatch.setattr("bench.startup.PROGRAMS", {"import nanochat": "import nanochat", "wrong": "1 / 0"})
    assert bench(monkeypatch, tmp_path, "import", "--rounds", "1")["import nanochat"]["torch"] == "not imported"
    assert "wrong failed: ZeroDivisionError" in capsys.readouterr().out


def test_quality(monkeypatch, tmp_path):
    results = bench(monkeypatch, tmp_path, "quality", "--config", "micro", "--minutes", "0.01", "--shards", "1", "--only", "ours", "--device", "cpu", "--seeds", "2")
    low, middle, high = (float(results["ours"][key]) for key in ("lowest", "bits per byte", "highest"))
    assert results["ours"]["runs"] == "2" and 0.5 < low <= middle <= high < 10 and middle == pytest.approx((low + high) / 2)
    assert (tmp_path / "bench" / "quality.png").read_bytes()[:4] == b"\x89PNG"


def test_the_workers_bits_per_byte_are_ours(monkeypatch, tmp_path):
    from argparse import Namespace

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(HERE)
    from worker_ours import Ours

    shape, row, rows = read_shape("micro")
    file = prepare_rows(Namespace(corpus="tinyworld", shards=1), shape["vocab_size"], row, tmp_path)
    worker = Ours({"shape": shape, "batch": rows, "rows": str(file), "device": "cpu", "precision": "float32", "weights": str(save_weights(shape, tmp_path / "w"))})
    ids, counted = worker.rows["val"].long(), worker.rows["counted"]
    batches = [(ids[i : i + rows, :-1], ids[i : i + rows, 1:].masked_fill(~counted[i : i + rows, 1:], -1)) for i in range(0, len(ids) // rows * rows, rows)]
    assert worker.bits_per_byte() == pytest.approx(bits_per_byte(worker.model, batches, worker.rows["bytes"].numpy()), rel=1e-5)
    worker.loader.close()


def test_each_is_tried_with_its_makers_recipes(tmp_path):
    for name, text in (("2025", "def setup_optimizers("), ("2026", "def setup_optimizer(")):
        (tmp_path / name / "nanochat").mkdir(parents=True)
        (tmp_path / name / "nanochat" / "gpt.py").write_text(text)
    names = {"ours": HERE.parent, "transformers": HERE, "public 2025": tmp_path / "2025", "public 2026": tmp_path / "2026"}
    variants = [Variant(name, HERE / "worker.py", {}, path, ours=name == "ours") for name, path in names.items()]
    jobs = {v.name: v.job for v in tune_variants(variants, {"cooldown": 0.4}, tmp_path / "w")}
    assert list(jobs) == ["ours", "ours, as its preset", "transformers, lr 0.001", "transformers, lr 0.003", "public 2025", "public 2026",
                          "public 2026, scaled for the batch"]
    assert {name for name, job in jobs.items() if "weights" in job} == {"ours", "ours, as its preset", "public 2025"}
    assert "settings" not in jobs["ours"] and jobs["ours, as its preset"]["settings"] == {"cooldown": 0.4}
    assert read_recipe("micro") == {} and read_recipe("tiny")["echo_tokens"] > 0
    assert [v.name for v in tune_variants(variants[:1], {}, tmp_path / "w")] == ["ours"]


def test_ours_trains_as_its_preset(monkeypatch, tmp_path):
    from argparse import Namespace

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(HERE)
    from worker_ours import Ours

    shape, row, rows = read_shape("micro")
    job = {"shape": shape, "batch": rows, "rows": str(prepare_rows(Namespace(corpus="tinyworld", shards=1), shape["vocab_size"], row, tmp_path)),
           "device": "cpu", "precision": "float32"}
    plain, preset = Ours(job), Ours(job | {"settings": {"echo_tokens": row * rows, "echo_length": 8, "head_lr": 0.5, "cooldown": 0.4}})
    (x, y), (echo, targets), (later, _) = plain.batch(), preset.batch(), preset.batch()
    assert torch.equal(x[:, :8], echo[:, :8]) and torch.equal(echo[:, :8], echo[:, 8:16]) and (targets[:, 7] == -1).all() and (y >= 0).all()
    assert torch.equal(later, plain.batch()[0])
    assert preset.optimizer.groups[1].lr > 100 * plain.optimizer.groups[1].lr
    rates = []
    monkeypatch.setattr(type(preset.optimizer), "apply", lambda self, lr_scale, momentum: rates.append(lr_scale))
    for worker in (plain, preset):
        worker.gradients(*worker.batch())
        worker.update(0, 0.7)
        worker.loader.close()
    assert rates == pytest.approx([1.0, 0.75])


def test_merges_are_found_again():
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"cd", b"abcd", b"bc", b"abc"]
    assert find_merges(tokens) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"b", b"c"), (b"ab", b"c")]


@pytest.mark.parametrize("arguments, words", [
    (["train", "--peer", "/nowhere"], "is not a checkout of the public nanochat"),
    (["train", "--peer", str(HERE.parent)], "is not a checkout of the public nanochat"),
    (["decode", "--config", "huge"], "configuration 'huge' is unknown"),
    (["train", "--config", "micro", "--only", "mine"], "--only mine leaves nothing"),
    (["quality", "--config", "micro", "--seeds", "0"], "there is nothing to show of 0 trainings"),
])
def test_mistakes_are_one_sentence(monkeypatch, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        bench(monkeypatch, tmp_path, *arguments, "--device", "cpu")
    assert error.value.code == 2
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_configurations_are_possible(tmp_path):
    for name in SHAPES:
        shape, row, rows = read_shape(name)
        assert row <= shape["context"] and shape["width"] % shape["heads"] == 0 and rows > 0
    assert save_weights(read_shape("micro")[0], tmp_path / "w").stat().st_size > 4 * 90_000
