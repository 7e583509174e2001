"""Checkpoints: killed at every file operation, with any byte changed, on a full disk, from several processes."""
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import small_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nanochat.checkpoint import (
    DamagedCheckpoint,
    check_tokenizer,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    random_state,
    save_checkpoint,
    seal_meta,
    set_random_state,
    verify_checkpoint,
)
from nanochat.common import UserError

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}


def save(directory, step, **more):
    "A small checkpoint whose contents say which step it is."
    weights, state = {"w": torch.full((3,), float(step))}, {"w.m": torch.full((2,), step + 0.5)}
    return save_checkpoint(directory, step, weights, state, {"position": 10 * step}, **more)


def check(path, step):
    weights, state, meta = load_checkpoint(path, optim=True)
    assert weights["w"].tolist() == [step] * 3 and state["w.m"].tolist() == [step + 0.5] * 2
    assert meta["step"] == step and meta["position"] == 10 * step and path.name == f"step_{step:06d}"


def test_round_trip_of_types_and_shapes(tmp_path):
    tensors = {"a": torch.randn(2, 3).T, "b": torch.arange(4, dtype=torch.int64), "c": torch.randn(3).bfloat16(), "d": torch.tensor(1.5),
               "e": torch.zeros(0, 4), "f": torch.tensor([True, False]), "g": torch.randn(4, 4)[:, 1:3]}
    meta = {"nested": {"list": [1, 2.5, None, True, "\u00e9"]}, "tuple": (1, 2), 3: "number as key"}
    path = save_checkpoint(tmp_path, 1234567, tensors, {}, meta)
    weights, state, found = load_checkpoint(path, optim=True)
    assert path.name == "step_1234567" and state == {}
    assert weights.keys() == tensors.keys()
    assert all(torch.equal(weights[k], tensors[k]) and weights[k].dtype == tensors[k].dtype for k in tensors)
    assert found["nested"] == meta["nested"] and found["tuple"] == [1, 2] and found["3"] == "number as key"


def test_tensors_come_in_one_order(tmp_path):
    path = save_checkpoint(tmp_path, 1, {f"layer.{i}": torch.zeros(1) for i in range(40)}, {}, {})
    for _ in range(5):
        assert list(load_checkpoint(path)[0]) == sorted(f"layer.{i}" for i in range(40))


def test_files_are_readable_without_us(tmp_path):
    path = save(tmp_path, 3)
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "optim_00000.safetensors", "meta.json"}
    assert safetensors.torch.load_file(path / "model.safetensors")["w"].tolist() == [3, 3, 3]
    sums = "".join(f"{digest}  {path / name}\n" for name, digest in json.loads((path / "meta.json").read_text())["files"].items())
    subprocess.run(["sha256sum", "-c", "--status"], input=sums, text=True, check=True)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path, keep):
    for step in (999_999, 8, 1_000_000, 90):  # ordered by number, not by name
        save(tmp_path, step, keep=4)
    save(tmp_path, 1_000_001, keep=keep)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000090", "step_999999", "step_1000000", "step_1000001"][-keep:]
    check(latest_checkpoint(tmp_path), 1_000_001)


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(DamagedCheckpoint, match="meta.json"):
        load_checkpoint(tmp_path / "missing")


def fork(work, *arguments):
    "Run in a copy of this process; its exit code."
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_and_die(directory, at):
    "Save step 30 and die, as by SIGKILL, just before file operation number `at`."
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in FILE_EVENTS and str(directory) in str(arguments):
            count += 1
            if count == at:
                os._exit(9)
    sys.addaudithook(hook)
    save(directory, 30)


def test_killed_at_every_file_operation(tmp_path):
    found = []
    for at in range(1, 200):
        directory = tmp_path / str(at)
        save(directory, 10), save(directory, 20)
        code = fork(save_and_die, directory, at)
        latest = latest_checkpoint(directory)
        found.append(int(latest.name.removeprefix("step_")))
        check(latest, found[-1])
        for path in list_checkpoints(directory):  # the others are whole too
            verify_checkpoint(path)
        save(directory, 40)  # and the next save clears away what was left
        assert not list(directory.glob(".*")) and not list(directory.glob("*.broken"))
        check(latest_checkpoint(directory), 40)
        if code == 0:
            break
        assert code == 9
    assert code == 0 and len(found) > 15
    assert found == sorted(found) and set(found) == {20, 30}  # the old one, until at one instant it is the new one


@pytest.mark.parametrize("number", [1, 2])
def test_killed_in_the_middle_of_a_write(tmp_path, number):
    save(tmp_path, 10)

    def die():
        write, count = Path.write_bytes, 0

        def half(self, data):
            nonlocal count
            count += 1
            write(self, data[: len(data) // 2] if count == number else data)
            if count == number:
                os._exit(9)
        Path.write_bytes = half
        save(tmp_path, 20)
    assert fork(die) == 9
    check(latest_checkpoint(tmp_path), 10)


def test_any_changed_byte_is_found(tmp_path):
    path = save(tmp_path, 7)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for i in range(len(data)):
            file.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1:])
            with pytest.raises(DamagedCheckpoint, match=str(path)):
                verify_checkpoint(path)
            if i % 16 == 0:
                with pytest.raises(DamagedCheckpoint):
                    load_checkpoint(path, optim=True)
        for size in (0, 1, len(data) - 1):
            file.write_bytes(data[:size])
            with pytest.raises(DamagedCheckpoint):
                verify_checkpoint(path)
        file.unlink()
        with pytest.raises(DamagedCheckpoint, match=file.name):
            verify_checkpoint(path)
        file.write_bytes(data)
    verify_checkpoint(path)


def test_damaged_ones_are_named_set_aside_and_not_tried_again(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_000030" / "model.safetensors").unlink()
    (tmp_path / "step_000020" / "meta.json").write_text("[" * 100_000)
    with pytest.warns(UserWarning) as caught:
        check(latest_checkpoint(tmp_path), 10)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "step_000030.broken" in messages[0] and "model.safetensors" in messages[0] and "step_000020" in messages[1]
    assert {p.name for p in tmp_path.iterdir()} == {"step_000010", "step_000020.broken", "step_000030.broken"}
    save(tmp_path, 30)
    (tmp_path / "step_000030" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="step_000030.1.broken"):
        check(latest_checkpoint(tmp_path), 10)
    (tmp_path / "step_000010" / "model.safetensors").unlink()
    with pytest.warns(UserWarning):
        assert latest_checkpoint(tmp_path) is None


def forge(path, **changes):
    "What somebody with ill will, who can compute hashes, would write."
    meta = {**json.loads((path / "meta.json").read_text()), **changes}
    (path / "meta.json").write_text(json.dumps({**meta, "seal": seal_meta(meta)}))


def test_other_formats_are_refused_not_skipped(tmp_path):
    save(tmp_path, 10)
    forge(save(tmp_path, 20), format=2)
    with pytest.raises(UserError, match="format 2.*reads format 1") as caught:
        latest_checkpoint(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint) and (tmp_path / "step_000020").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model_000100.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"model_000100.pt.*pickle"):
        latest_checkpoint(tmp_path / "old")


@pytest.mark.parametrize("files", [{}, [], None, {"../secret": "0"}, {"model.safetensors": "0", "/etc/passwd": "0"}, {"optim_00000.safetensors": "0"},
                                   {"model.safetensors": 7}, {"model.safetensors": "0", "optim_00000.safetensors\n": "0"}])
def test_a_forged_list_of_files_is_refused(tmp_path, files):
    path = save(tmp_path, 10)
    forge(path, files=files)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(path, optim=True)


def test_a_forged_name_does_not_lead_outside(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(safetensors.torch.save({"secret": torch.ones(1)}))
    path = save(tmp_path / "base", 10)
    (path / "optim_00001.safetensors").mkdir()
    files = json.loads((path / "meta.json").read_text())["files"]
    forge(path, files={**files, "optim_00001.safetensors/../../../outside.safetensors": hashlib.sha256(outside.read_bytes()).hexdigest()})
    with pytest.raises(DamagedCheckpoint, match="lists files"):
        load_checkpoint(path, optim=True)


ENTRIES = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "I8", "F4", "X", "BF16"]), "shape": st.lists(st.integers(-1, 2**40), max_size=3),
                                 "data_offsets": st.lists(st.integers(-1, 2**40), min_size=1, max_size=3)})
HEADERS = st.dictionaries(st.sampled_from(["w", "__metadata__", ""]), st.one_of(st.none(), ENTRIES), max_size=2)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.one_of(st.binary(max_size=60), HEADERS), body=st.binary(max_size=16), size=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_a_forged_tensor_file_is_an_error_and_nothing_else(tmp_path, header, body, size):
    path = tmp_path / "step_000001"
    if not path.exists():
        save(tmp_path, 1)
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = (len(head) if size is None else size).to_bytes(8, "little") + head + body
    (path / "model.safetensors").write_bytes(data)
    forge(path, files={"model.safetensors": hashlib.sha256(data).hexdigest()})
    try:
        load_checkpoint(path)
    except DamagedCheckpoint:
        pass


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    with small_disk(tmp_path / "disk", 400_000) as disk:
        save_checkpoint(disk / "base", 10, {"w": torch.zeros(50_000)}, {"m": torch.zeros(1000)}, {})  # 200 kB: a second doesn't fit
        before = {p: p.read_bytes() for p in (disk / "base" / "step_000010").iterdir()}
        for model, state in ((50_000, 1000), (1000, 50_000)):  # full while writing the weights, and while writing the state
            with pytest.raises(UserError, match="no space left"):
                save_checkpoint(disk / "base", 20, {"w": torch.zeros(model)}, {"m": torch.zeros(state)}, {})
            assert [p.name for p in (disk / "base").iterdir()] == ["step_000010"]
            assert {p: p.read_bytes() for p in before} == before
        assert latest_checkpoint(disk / "base").name == "step_000010"
        save_checkpoint(disk / "base", 20, {"w": torch.zeros(1000)}, {}, {}, keep=1)  # and when there is room again, it goes on


@pytest.mark.parametrize("call", ["write_bytes", "write_text", "fsync", "replace"])
@pytest.mark.parametrize("number", range(1, 5))
def test_any_failing_call_leaves_the_checkpoint_before(tmp_path, monkeypatch, call, number):
    save(tmp_path, 10)
    owner = Path if call.startswith("write") else os
    real, count = getattr(owner, call), 0

    def fail(*arguments, **options):
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)
    monkeypatch.setattr(owner, call, fail)
    try:
        save(tmp_path, 20)
        saved = True
    except UserError as error:
        assert "no space left" in str(error)
        saved = False
    monkeypatch.undo()
    assert saved == (count < number)
    assert not [p for p in tmp_path.glob(".*") if p.is_file()]
    latest = latest_checkpoint(tmp_path)
    check(latest, int(latest.name.removeprefix("step_")))


WORKER = """
import os, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
from nanochat.checkpoint import *
from nanochat.common import UserError, get_ranks
ranks, folder = get_ranks(), Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=ranks.rank, world_size=ranks.world)
def save(step):
    mine = {f"layer.{i}.m": torch.full((2,), float(step + i)) for i in range(5) if i % ranks.world == ranks.rank}
    return save_checkpoint(folder / "base", step, {"w": torch.full((3,), float(step + 100 * ranks.rank))}, mine, {"position": step}, ranks)
save(10), save(20), save(30)
for failing in range(ranks.world):  # one rank's disk is full; both must hear of it, and both must go on
    real = Path.write_bytes
    if ranks.rank == failing:
        def full(self, data):
            raise OSError(28, "No space left on device")
        Path.write_bytes = full
    try:
        save(40)
    except UserError as error:
        assert ("no space left" in str(error)) == (ranks.rank == failing), error
        assert ranks.rank == failing or f"rank {failing} of 2" in str(error), error
    else:
        raise SystemExit("nobody noticed")
    Path.write_bytes = real
save(50)
dist.destroy_process_group()
"""


def test_two_processes_save_one_goes_on(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert {p.name for p in (tmp_path / "base").iterdir()} == {"step_000030", "step_000050"}
    path = latest_checkpoint(tmp_path / "base")
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "meta.json", "optim_00000.safetensors", "optim_00001.safetensors"}
    weights, state, meta = load_checkpoint(path, optim=True)
    assert weights["w"].tolist() == [50] * 3 and meta["position"] == 50  # rank 0's
    assert {key: value.tolist() for key, value in state.items()} == {f"layer.{i}.m": [50.0 + i] * 2 for i in range(5)}


@pytest.mark.parametrize("tensors, name", [
    ({"weight": torch.zeros(2, 3)}, "bias"), ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, "bias"),
    ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "weight"),
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x0_lambda": torch.zeros(1)}, "x0_lambda"),
])
def test_strange_tensors_are_refused_by_name_and_nothing_is_copied(tensors, name):
    model = nn.Linear(3, 2)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=repr(name)):
        load_weights(model, tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_weights_that_fit_are_taken():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert load_weights(model, other.state_dict()) is model
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias) and model.weight.requires_grad


def test_another_tokenizer_is_refused():
    check_tokenizer({"tokenizer_hash": "a"}, SimpleNamespace(hash="a"))
    for meta in ({"tokenizer_hash": "b"}, {}):
        with pytest.raises(UserError, match="another tokenizer"):
            check_tokenizer(meta, SimpleNamespace(hash="a"))


def test_random_state_goes_on(tmp_path):
    torch.manual_seed(3)
    torch.randn(7)  # leaves half of a pair of normal numbers waiting in the generator
    path = save_checkpoint(tmp_path, 1, {}, {}, {"random": random_state()})
    expected = torch.randn(5), torch.rand(5), torch.randperm(9)
    torch.manual_seed(4)
    set_random_state(load_checkpoint(path)[2]["random"])
    assert all(torch.equal(a, b) for a, b in zip(expected, (torch.randn(5), torch.rand(5), torch.randperm(9))))
