"""Nothing that is read can run code or write elsewhere, no secret is written down, and what is fetched is checked."""
import ast
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from conftest import call_nanochat
from test_checkpoint import forge, save
from test_dataset import DATA, server

from nanochat.checkpoint import latest_checkpoint, load_checkpoint
from nanochat.common import UserError
from nanochat.core import unpack_bundle
from nanochat.dataset import fetch_file, iter_texts, open_corpus
from nanochat.mixtures import jsonl_task, read_persona
from nanochat.run import Run, find_run, list_runs
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = {("nanochat/sandbox.py", "exec"), ("nbs/33_sandbox.ipynb", "exec")}  # it runs programs, in a process that is closed in first
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.save", "yaml.load", "yaml.unsafe_load",
         "yaml.full_load", "yaml.load_all", "pandas.read_pickle", "pd.read_pickle", "__import__"}


def sources():
    "name -> code of everything that belongs to the project, but for the tests."
    for folder in ("nanochat", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield f"{folder}/{path.name}", path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        lines = [line for c in cells for line in "".join(c["source"]).splitlines()]
        yield f"nbs/{path.name}", "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def find_dangers(code):
    "What could run code that comes from data."
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name.split(".")[0] for alias in node.names] + [(getattr(node, "module", "") or "").split(".")[0]]
            yield from (name for name in names if name in MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in CALLS:
                yield name
            if name == "torch.load" and getattr(given.get("weights_only"), "value", None) is not True:
                yield "torch.load without weights_only=True"
            yield from (key for key in ("shell", "allow_pickle", "trust_remote_code") if key in given and getattr(given[key], "value", True) is not False)


@pytest.mark.parametrize("name, code", [pytest.param(name, code, id=name) for name, code in sources()])
def test_nothing_runs_what_it_reads(name, code):
    assert not [danger for danger in find_dangers(code) if (name, danger) not in EXCEPTIONS]


@pytest.mark.parametrize("code", ["import pickle", "from pickle import loads", "import torch; torch.load('x')", "torch.load('x', weights_only=False)", "eval('1')",
                                  "exec('1')", "subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=x)", "os.system('ls')", "yaml.load(x)",
                                  "yaml.load(x, Loader=yaml.Loader)", "np.load('x', allow_pickle=True)", "import dill as d", "__import__('os')"])
def test_the_search_finds_what_it_looks_for(code):
    assert list(find_dangers(code))
    assert not list(find_dangers("# pickle, eval(x)\ns = 'os.system, exec(1)'\nmodel.eval()\ntorch.load('x', weights_only=True)\nyaml.safe_load(s)\nnp.load('x', allow_pickle=False)"))


BOMB = b"cos\nsystem\n(S'touch %s'\ntR."


@pytest.fixture
def trap(tmp_path, monkeypatch):
    "A base directory, and a file that exists once somebody's code has run."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "base").mkdir()
    return tmp_path / "sprung"


def pickled(trap):
    return BOMB % str(trap).encode()


@pytest.mark.parametrize("file", ["model.safetensors", "optim_00000.safetensors", "meta.json"])
def test_a_pickle_in_a_checkpoint_does_not_run(trap, file):
    import hashlib

    path = save(trap.parent / "base" / "x", 5)
    (path / file).write_bytes(pickled(trap))
    if file != "meta.json":
        files = json.loads((path / "meta.json").read_text())["files"]
        forge(path, files={**files, file: hashlib.sha256(pickled(trap)).hexdigest()})
    with pytest.raises(UserError):
        load_checkpoint(path, optim=True)
    assert not trap.exists()


def test_a_checkpoint_of_links_is_never_followed_to_write(trap):
    "A stage folder that is a link, and a step that is one: what is read is checked, and what is set aside is the link."
    outside = save(trap.parent / "outside", 5)
    stage = trap.parent / "base" / "runs" / "r" / "base"
    stage.mkdir(parents=True)
    (stage / "step_000009").symlink_to(outside)
    (outside / "model.safetensors").write_bytes(b"not what was saved")
    before = {p.name: p.read_bytes() for p in outside.iterdir()}
    with pytest.warns(UserWarning):
        assert latest_checkpoint(stage) is None
    assert {p.name: p.read_bytes() for p in outside.iterdir()} == before


@pytest.mark.parametrize("body", [b"(dp0", {"pattern": "(a+)+$"}, {"pattern": "(?=(a+))*b"}, {"tokens": "../../x"}, {"special": ["<|bos|>", "__class__"]}])
def test_a_tokenizer_file_is_only_data(trap, body):
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    path = tokenizer.save(trap.parent / "t")
    changed = pickled(trap) if isinstance(body, bytes) else json.dumps({**json.loads(path.read_text()), **body}).encode()
    path.write_bytes(changed)
    try:
        Tokenizer.load(path.parent)
    except UserError as error:
        assert "tokenizer.json is damaged" in str(error)
    assert not trap.exists()


def test_shards_and_conversations_are_only_data(trap):
    shard = trap.parent / "x.parquet"
    pq.write_table(pa.table({"text": [f"__import__('os').system('touch {trap}')", "{0.__class__}", "<|bos|>"]}), shard)
    assert len(list(iter_texts(shard))) == 3
    shard.write_bytes(pickled(trap))
    with pytest.raises(UserError):
        list(iter_texts(shard))
    talks = trap.parent / "talks.jsonl"
    talks.write_text(json.dumps([{"role": "user", "content": f"{{0.__class__}} $(touch {trap})"}, {"role": "assistant", "content": "`x` <|bos|>"}]) + "\n")
    assert len(jsonl_task(str(talks))) == 1
    assert not trap.exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch %s']", "topics: !!python/name:os.system\nx: %s", "topics: !!python/object/new:os.system ['touch %s']"])
def test_a_persona_is_only_data(trap, text):
    file = trap.parent / "persona.yaml"
    file.write_text(text % trap)
    with pytest.raises(UserError, match="is not YAML|has no topics"):
        read_persona(file)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "/etc/x", "a/b", "a\\b", "a\0b", "x" * 101, "-rf", "a b", "a\n", "~", ".hidden", "caf\u00e9", "$(id)", "a;b", "C:x"])
def test_a_run_name_leads_nowhere_else(trap, name):
    with pytest.raises(UserError, match="run name"):
        Run(name)
    if name == "../../x":  # and from the command line
        result = call_nanochat(trap.parent / "base", "run", "--preset", "demo", f"--run={name}", "--stages", "tokenizer")
        assert result.returncode == 2 and not list((trap.parent / "base").iterdir()), result.stderr


def test_strange_folders_among_the_runs_do_no_harm(trap):
    runs = trap.parent / "base" / "runs"
    for name in ("fine", ".hidden", "a b", "$(id)"):
        (runs / name).mkdir(parents=True)
        (runs / name / "metrics.jsonl").touch()
    (runs / "loop").symlink_to(runs)
    assert [run.name for run in list_runs()] == ["fine"] and find_run(None).name == "fine"


def test_links_in_a_folder_of_text_are_read_and_never_written(trap):
    folder, outside = trap.parent / "texts", trap.parent / "outside.txt"
    folder.mkdir()
    outside.write_text("\n\n".join(f"A paragraph, the {i}th of them." for i in range(900)))
    (folder / "a.txt").symlink_to(outside)
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    before = outside.read_bytes()
    with pytest.raises(UserError, match="loop.txt"):
        open_corpus(f"folder:{folder}")
    (folder / "loop.txt").unlink()
    (folder / "gone.txt").symlink_to(folder / "nothing")
    with pytest.raises(UserError, match="gone.txt"):
        open_corpus(f"folder:{folder}")
    (folder / "gone.txt").unlink()
    corpus = open_corpus(f"folder:{folder}")
    assert outside.read_bytes() == before and sorted(p.name for p in folder.iterdir()) == ["a.txt"]
    assert all((trap.parent / "base") in path.parents for path in corpus.paths)


@pytest.mark.parametrize("name", ["../escaped", "eval_bundle/../../escaped", "/escaped", "eval_bundle\\..\\..\\escaped", "C:/escaped"])
def test_a_bundle_does_not_unpack_elsewhere(trap, name):
    archive = trap.parent / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("eval_bundle/core.yaml", "icl_tasks: []")
        file.writestr(name, "x")
    before = sorted(trap.parent.rglob("*"))
    with pytest.raises(UserError, match="outside of its folder"):
        unpack_bundle(archive, trap.parent / "base" / "eval_bundle")
    assert sorted(trap.parent.rglob("*")) == before


def test_a_link_in_a_bundle_becomes_a_file(trap):
    archive, buffer = trap.parent / "bundle.zip", zipfile.ZipInfo("eval_bundle/link")
    buffer.create_system, buffer.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(buffer, str(trap))
        file.writestr("eval_bundle/link/inner", "x")
    with pytest.raises((UserError, OSError)):
        unpack_bundle(archive, trap.parent / "base" / "eval_bundle")
    assert not trap.exists() and not (trap.parent / "base" / "eval_bundle").exists()


SECRETS = {"WANDB_API_KEY": "marker-of-wandb-5ecre7", "HF_TOKEN": "marker-of-the-hub-5ecre7", "HUGGING_FACE_HUB_TOKEN": "marker-of-old-hub-5ecre7",
           "OPENAI_API_KEY": "marker-of-another-5ecre7", "AWS_SECRET_ACCESS_KEY": "marker-of-a-cloud-5ecre7"}


def test_secrets_are_never_written_down(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(f"The {i}th sentence says that {i * i} is the square of {i}." for i in range(3000)))
    shown = ""
    for arguments in (["--stages", "tokenizer,base,report"], ["--stages", "base", "--set", "base.depth=7"]):  # one that works, one that is refused
        done = call_nanochat(tmp_path / "base", "run", "--preset", "demo", "--corpus", f"folder:{texts}", "--vocab-size", "300", "--set", "base.tokens=8192",
                             *arguments, environment=SECRETS)
        shown += done.stdout + done.stderr
    run = tmp_path / "base" / "runs" / "demo"
    assert (run / "report.md").exists() and "depth=7" in shown, shown[-3000:]
    written = [shown.encode(), *(path.read_bytes() for path in (tmp_path / "base").rglob("*") if path.is_file())]
    assert len(written) > 15 and not any(b"5ecre7" in data for data in written)


def test_secrets_are_not_shown_by_a_rank_that_fails(tmp_path):
    code = ("from nanochat.train import RankProcesses; import os, sys\n"
            "RankProcesses([sys.executable, '-Sc', 'raise SystemExit(1)'], 2, dict(os.environ), grace=0.2).follow()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **SECRETS}, timeout=100)
    assert done.returncode == 1 and "exit codes" in done.stderr and "5ecre7" not in done.stdout + done.stderr


@pytest.mark.parametrize("faults", [("truncate",) * 3, ("drop",) * 3, ("wrong hash",) * 3])
def test_what_is_fetched_is_what_was_announced_or_nothing(tmp_path, faults):
    with server(*faults, data=DATA[:5000]) as (url, _), pytest.raises(UserError, match="3 tries"):
        fetch_file(url, tmp_path / "file", tries=3, wait=0.001) if faults[0] != "drop" else fetch_file(url, tmp_path / "file", sha256="0" * 64, tries=3, wait=0.001)
    assert not (tmp_path / "file").exists()


def test_special_tokens_in_data_are_plain_text():
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    for name in SPECIAL_TOKENS:
        assert all(i < tokenizer.bos for i in tokenizer.encode(name))


def test_tensors_can_not_name_a_type_that_runs():
    data = safetensors.torch.save({"w": torch.ones(2)})
    assert b"pickle" not in data and io.BytesIO(data).read(8) == (len(data) - 8 - 8).to_bytes(8, "little")
