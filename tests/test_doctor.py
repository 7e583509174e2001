"""What is checked before a run, and at the beginning of each of its jobs; and being on a compute node oneself."""
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import NANOCHAT, call_nanochat

from nanochat import jobs, train
from nanochat.common import UserError
from nanochat.pipeline import keep_choices
from nanochat.run import PRESETS, Run

ROOT = Path(__file__).parent.parent
D20 = {"preset": "d20"}


@pytest.fixture
def site(tmp_path):
    "A cluster of one node with eight GPUs."
    (tmp_path / "site.env").write_text(f"SITE_GRES=gpu:a100:8\nSITE_TIME=12:00:00\nSITE_PEAK=A100\nSITE_LOGIN=login.example.org\nNANOCHAT_BASE_DIR={tmp_path / 'base'}\n")
    return jobs.read_site(tmp_path / "site.env")


@pytest.fixture
def no_gpu(monkeypatch):
    "A machine without a GPU, whose PyTorch could use one."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)


def test_a_laptop_is_checked_in_a_minute_and_nothing_is_left(tmp_path):
    done = call_nanochat(tmp_path, "doctor", "--preset", "demo")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "ready: nanochat run --preset demo", done.stdout + done.stderr
    assert [line.split()[1] for line in lines[1:-1]] == ["machine", "packages", "disk", "recipe", "batch", "memory", "corpus", "speed"]
    assert re.search(r"base about .*, mid about .*, sft about .*; .* tokens/s on 1 device", lines[-2])
    assert not (tmp_path / "runs").exists()
    without = call_nanochat(tmp_path, "doctor", "--preset", "demo", "--no-probe", "--set", "base.device_rows=4")
    assert "not tried" in without.stdout and without.stdout.endswith("--set base.device_rows=4\n")


def test_a_mistake_in_what_to_check(tmp_path):
    for arguments, word in ((["--preset", "tinny"], "tinny"), (["--set", "base.rows=4"], "device_rows")):
        done = call_nanochat(tmp_path, "doctor", *arguments)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr


def test_packages_are_compared_with_the_settings(tmp_path, monkeypatch, site):
    assert "as settings.ini wants them" in jobs.check_packages(None)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nrequirements = torch>=99 tqdm>=1 not-a-package-of-ours>=2\n")
    monkeypatch.setattr(jobs, "notebook_dir", lambda: tmp_path / "nbs")
    with pytest.raises(UserError, match=r"torch is .* has to be >=99; not-a-package-of-ours is not here and has to be >=2: cd .* install"):
        jobs.check_packages(None)
    with pytest.raises(UserError, match="jobs use the packages of .*make setup"):
        jobs.check_packages(site)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nrequirements = torch>=2\n")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    assert "1 packages" in jobs.check_packages(site)


QUOTA = "Disk quotas for user ada (uid 1001): \n     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"


@pytest.mark.parametrize(["text", "left"], [
    ("", None), ("Disk quotas for user ada (uid 1001): none\n", None),
    (QUOTA + "/dev/mapper/vg-1 1000 3000 5000 0 17 0 0 0\n", 2000), (QUOTA + "/dev/sda1 1000 0 5000 0 17 0 0 0\n", 4000),
    (QUOTA + "/dev/sda1 4000* 3000 5000 604800 17 0 0 0\n", 0), (QUOTA + "/dev/sda1 4000 0 0 0 17 20 20 0\n", None),
    (QUOTA + "nfs4:/home 10 100 100 0 1 0 0 0\n/dev/sdb2 10 60 0 0 1 0 0 0\n", 50),
    ("/scratch/a_long_name_7\n      800   0  1000      -    17  0  0  -\n", 200),
    ("     /work   800*   700  1000  6d23h58m   17  0  0  -\n", 0), ("lfs quota: /tmp is not on a Lustre filesystem\n", None),
])
def test_quotas_are_read_as_they_are_printed(text, left):
    assert jobs.read_quota(text) == (None if left is None else 1024 * left)


def program(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_quota_counts_as_much_as_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    program(tmp_path / "bin", "quota", "exec sleep 60")
    program(tmp_path / "bin", "lfs", f'[ "$5" = {tmp_path} ] && echo "{tmp_path} 1000 0 21000 - 1 0 0 -"')
    assert jobs.ask_quota(tmp_path, patience=4.0) == 1024 * 20_000  # the one that doesn't answer isn't waited for
    program(tmp_path / "bin", "quota", f'[ "$4" = {tmp_path} ] && printf "a b\\n/dev/sda1 1000* 900 2000 0 1 0 0 0\\n"; exit 1')
    with pytest.raises(UserError, match="0 B left of your quota, and this run still writes .* NANOCHAT_BASE_DIR"):
        jobs.check_disk({"preset": "tiny"})
    assert "left of your quota" in jobs.check_disk(None)
    program(tmp_path / "bin", "quota", "echo none")
    program(tmp_path / "bin", "lfs", "exit 2")
    assert "left of your quota" not in jobs.check_disk({"preset": "tiny"})


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "d20"])
def test_every_preset_divides_on_one_device(preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "on 1 device" in jobs.check_batch({"preset": preset}, None)


def test_batches_and_rows_that_do_not_go(site):
    assert "base 524.3K tokens in 2 parts" in jobs.check_batch(D20, site)
    with pytest.raises(UserError, match="mid's batch .* --set mid.batch_tokens=786432"):
        jobs.check_batch(D20 | {"settings": {"mid": {"device_rows": 48}}}, site)
    with pytest.raises(UserError, match="--set sft.row=256"):
        jobs.check_batch({"preset": "tiny", "settings": {"sft": {"row": 512}}}, None)


def test_a_gpu_that_is_too_small_gets_fewer_rows(site, monkeypatch):
    monkeypatch.setattr("nanochat.common.get_device", lambda name="auto": torch.device("cuda", 0))
    monkeypatch.setattr(jobs, "device_memory", lambda device: 40 * 10**9)
    with pytest.raises(UserError, match=r"base needs 5\d\.\d GB with 16 rows on each device, and there are 40.0 GB: --set base.device_rows=8") as error:
        jobs.check_memory(D20, site)
    settings = {stage: {"device_rows": int(str(error.value).rpartition("=")[2])} for stage in ("base", "mid")}
    assert "which has 40.0 GB" in jobs.check_memory(D20 | {"settings": settings}, site)
    monkeypatch.setattr(jobs, "device_memory", lambda device: 4 * 10**9)
    with pytest.raises(UserError, match="smaller preset"):
        jobs.check_memory(D20, site)


def test_a_login_node_without_gpus_speaks_of_the_jobs(site, no_gpu, monkeypatch):
    monkeypatch.setattr(train, "run_probe", lambda *_: pytest.fail("nothing is tried on a login node"))
    assert "a job will see" in jobs.check_memory(D20, site)
    assert jobs.check_gpus(D20, site) == "0 here, 8 for each job that trains"
    assert re.fullmatch(r"base about 9 h \d+ min in 1 job of 12:00:00, .* at 45% of the GPUs' peak; no GPU here: the job itself will measure it", jobs.check_speed(D20, site))
    twice = D20 | {"settings": {"base": {"tokens": 22_439_526_400}}}
    assert "in 2 jobs of 12:00:00" in jobs.check_speed(twice, site)


def test_gpus_that_are_not_there(site, no_gpu, monkeypatch):
    job = jobs.name_job("base")
    with pytest.raises(UserError, match="shows no GPU, and on CPUs d20 would take .* days: nvidia-smi"):
        jobs.check_gpus(D20, site, job)
    assert "trained on CPUs" in jobs.check_gpus({"preset": "demo"}, site, job)  # it is small
    assert jobs.check_gpus(D20, site, jobs.name_job("report")).startswith("0 here")  # asks for none
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UserError, match="built without CUDA.*pip install"):
        jobs.check_gpus(D20, site)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="shows 4 GPUs, and SITE_GRES=gpu:a100:8 asks for 8"):
        jobs.check_gpus(D20, site, job)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert jobs.check_gpus(D20, site, job).startswith("8 here")


def test_a_measured_speed_becomes_times(site, no_gpu, monkeypatch):
    asked = []

    def probe(cfg, model, devices):
        asked.append((cfg.STAGE, model.depth, devices))
        return {"tokens_per_second": 40_000.0, "bytes": 5 * 10**10, "attention": "flash", "precision": "bfloat16"}
    monkeypatch.setattr(train, "run_probe", probe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = jobs.check_speed(D20, site)
    assert text.startswith("base about 9 h 44 min in 1 job of 12:00:00, mid perhaps 29 min")  # 11.2e9 / 320e3 s
    assert text.endswith("; 320.0K tokens/s on 8 devices, 50.0 GB, attention by flash in bfloat16")
    jobs.check_speed(D20, site, jobs.name_job("sft"))
    assert asked == [("base", 20, 8), ("sft", 20, 8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jobs, "cpu_speed", lambda: 3e10)
    assert "40.0K tokens/s on 1 device," in jobs.check_speed({"preset": "tiny"}, None)
    assert "too large to try here" in jobs.check_speed({"preset": "large"}, None) and len(asked) == 3


def test_other_jobs_are_not_asked_about_training(site):
    names = {job: [name for name, _ in jobs.list_checks({"preset": "demo"}, site, jobs.name_job(job))] for job in ("tokenizer", "base", "rl", "eval:base", "report")}
    assert names["base"][-1] == "speed" and "batch" in names["rl"]
    assert all("speed" not in names[job] for job in ("tokenizer", "rl", "eval:base", "report"))
    assert all({"machine", "packages", "disk", "site", "GPUs", "corpus tinyworld"} <= set(found) for found in names.values())


@pytest.mark.parametrize(["program", "words"], [
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory of this machine.*--set base.device_rows=12"),
    ("raise SystemExit('torch.OutOfMemoryError: CUDA out of memory')", "memory of this machine.*--set base.device_rows=12"),
])
def test_a_probe_without_memory_says_what_to_do(program, words, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=words):
        probe_with(program, tmp_path, monkeypatch)


@pytest.mark.parametrize(["program", "words"], [
    ("raise ValueError('a kernel is broken')", "the last line was 'ValueError: a kernel is broken'"),
    ("import time; time.sleep(60)", "took more than 2.0 s"),
])
def test_a_probe_that_fails_otherwise_ends_no_job(program, words, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=words) as failure:
        probe_with(program, tmp_path, monkeypatch)
    monkeypatch.setattr(train, "run_probe", lambda *_: (_ for _ in ()).throw(failure.value))
    with pytest.raises(UserError, match=f"{words}.*--no-probe"):
        jobs.measure_speed({"preset": "tiny"}, None)
    assert re.match(f"not tried: .*{words}", jobs.measure_speed({"preset": "tiny"}, None, jobs.name_job("mid")))


def probe_with(program, folder, monkeypatch):
    "`run_probe`, with a program in the place of the training."
    from nanochat.pretrain import BaseConfig
    from nanochat.run import make_config
    (folder / "nanochat").mkdir()
    (folder / "nanochat" / "__init__.py").touch()
    (folder / "nanochat" / "train.py").write_text(f"def answer_probe():\n    {program}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)
    train.run_probe(make_config(BaseConfig, "tiny"), jobs.model_config({"preset": "tiny"}), patience=2.0 if "sleep" in program else 60.0)


@pytest.mark.parametrize(["pair", "words"], [
    ("mid.mixture=nothing=3", "task 'nothing' is unknown"), ("mid.mixture=jsonl:/nowhere.jsonl=100", "/nowhere.jsonl can't be read"), ("mid.mixture=tinyworld=0", "at least one example"),
    ("mid.kinds=chat", "has no weight"), ("sft.mixture=", "sft is given no task"), ("sft.persona=/nowhere.yaml", None), ("rl.mixture=tinyworld=5", "rl needs tasks whose replies"),
    ("eval.tasks=foo", "task 'foo' is unknown"), ("eval.tasks=smoltalk", "eval needs tasks"), ("eval.precision=half", "eval.precision can't be 'half'"),
    ("base.precision=half", "base.precision can't be 'half'.*--set base.precision=auto"), ("base.device=tpu", "base.device can't be 'tpu'"), ("tokenizer.vocab_size=100", "at least 265, not 100"),
    ("base.device_rows=0", "base.device_rows must be at least 1"), ("base.batch_tokens=0", "base.batch_tokens must be at least 1"), ("sft.batch_tokens=-4", "sft.batch_tokens must be"),
    ("base.tokens=0", "base.tokens=0 reads the corpus once"), ("base.heads=0", "heads must be at least 1"),
])
def test_a_typo_in_a_recipe_is_found_before(pair, words):
    from nanochat.cli import _configs
    from nanochat.run import read_settings
    choices = {"preset": "demo", "settings": read_settings([pair], _configs())}

    def look():
        jobs.check_recipe(choices)
        jobs.list_needs(choices)
        jobs.check_batch(choices, None)
        jobs.predict_seconds(choices, 1e12)
    if words is None:  # a persona matters only where somebody asks who the model is
        look()
        choices["settings"]["sft"]["mixture"], words = "identity=5", "persona /nowhere.yaml can't be read"
    with pytest.raises(UserError, match=words):
        look()


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_a_recipe_that_passes(preset):
    assert "mid of " in jobs.check_recipe({"preset": preset})
    names = jobs.list_needs({"preset": preset, "settings": {"eval": {"tasks": "ARC-Easy, reading"}}})
    assert "task arc_easy" in [need.name for need in names]


def test_a_run_that_goes_on_needs_less_room(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    run, tiny = Run("half"), {"preset": "tiny"}
    whole, without_base = jobs.bytes_to_write(tiny), jobs.bytes_to_write(tiny, ("mid", "sft"))
    assert whole > without_base > 0 == jobs.bytes_to_write(tiny, ("report",)) and jobs.bytes_to_write(tiny, (*jobs.TRAINED, "rl")) > whole
    fewer = {"preset": "tiny", "settings": {stage: {"keep": 1, "keep_best": False} for stage in ("mid", "sft")}}
    assert jobs.bytes_to_write(fewer, ("mid", "sft")) * 3 == without_base
    (run.path / "base" / "step_000100").mkdir(parents=True)
    (run.path / "base" / "step_000100" / "model.safetensors").write_bytes(bytes(1000))
    assert jobs.bytes_to_write(tiny, run=run) == whole - 1000
    monkeypatch.setattr(jobs, "ask_quota", lambda path: 500)
    with pytest.raises(UserError, match="500 B left of your quota"):
        jobs.check_disk(tiny, ("sft", "report"), run)
    assert "0 B needed" in jobs.check_disk(tiny, ("eval", "report"), run)


@pytest.mark.parametrize(["gres", "count"], [("", 0), ("gpu", 1), ("gpu:8", 8), ("gpu:a100", 1), ("gpu:a100:8", 8), ("gpu:nvidia-a100:8", 8), ("gpu:a100-sxm4-80gb:4", 4),
                                             ("gpu:1g.10gb:2", 2), ("craynetwork:1,gpu:2", 2), ("craynetwork:1", 0)])
def test_gpus_are_counted_as_slurm_does(tmp_path, gres, count):
    (tmp_path / "site.env").write_text(f"SITE_GRES={gres}\n")
    assert jobs.count_gpus(jobs.read_site(tmp_path / "site.env")) == count


def test_facts_of_a_site_that_are_no_numbers(tmp_path):
    (tmp_path / "site.env").write_text("SITE_GRES=gpus=8\n")
    with pytest.raises(UserError, match="SITE_GRES=gpus=8 in .* can't be read"):
        jobs.count_gpus(jobs.read_site(tmp_path / "site.env"))
    for nodes in ("two", "0", "-1"):
        (tmp_path / "site.env").write_text(f"SITE_NODES={nodes}\n")
        with pytest.raises(UserError, match="SITE_NODES=.* number of nodes"):
            jobs.read_site(tmp_path / "site.env")


def test_why_nothing_was_tried(tmp_path, no_gpu, monkeypatch):
    (tmp_path / "cpu.env").write_text("SITE_TIME=01:00:00\n")
    cpus = jobs.read_site(tmp_path / "cpu.env")
    monkeypatch.setattr(jobs, "cpu_speed", lambda: 3e10)
    said = [jobs.check_speed({"preset": preset}, site, probe=probe).rpartition("; ")[2] for preset, site, probe in (("tiny", cpus, True), ("large", None, True), ("tiny", None, False))]
    assert "site without GPUs" in said[0] and said[1:] == ["too large to try here", "not tried"]


def test_the_kernel_is_unknown_where_pytorch_does_not_say(monkeypatch):
    from nanochat.attention import attention_kernel
    short, long = (torch.empty(1, 2, T, 8, requires_grad=True) for T in (16, 2048))

    def refuse(*_, **__):
        raise NotImplementedError("Could not run 'aten::_fused_sdp_choice' with arguments from the 'MPS' backend")
    assert attention_kernel(short, short) == "blocks" != attention_kernel(short, short, compiled=True)  # takes_blocks is False under torch.compile
    monkeypatch.setattr(torch, "_fused_sdp_choice", refuse)
    assert attention_kernel(long, long) == "unknown"
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert attention_kernel(long, long) == "unknown"


def test_commands_in_messages_can_be_typed(tmp_path):
    from nanochat.checkpoint import DamagedCheckpoint
    assert str(DamagedCheckpoint(Path("/my disk/step_000001"), "meta.json", "is gone")).endswith("rm -r '/my disk/step_000001'")
    corpus = tmp_path / "my texts"
    corpus.mkdir()
    for number in range(2):
        (corpus / f"{number}.txt").write_text("Once upon a time. " * 200)
    done = call_nanochat(tmp_path, "doctor", "--preset", "demo", "--no-probe", "--corpus", f"folder:{corpus}")
    assert f"--corpus 'folder:{corpus}'" in done.stdout, done.stdout + done.stderr


FAKE_WANDB = """
    import json
    from pathlib import Path

    class Copy:
        def __init__(self, **given):
            self.folder, self.lines = Path(given["dir"]) / "wandb" / f"offline-run-1-{given['id']}", [given]
            self.summary, self.folder_exists = {}, self.folder.mkdir(parents=True)
        def define_metric(self, name, step_metric=None):
            self.lines.append([name, step_metric])
        def log(self, row):
            self.lines.append(row)
        def finish(self):
            (self.folder / "seen.json").write_text(json.dumps([*self.lines, self.summary]))

    init = lambda **given: Copy(**given)
"""


def test_curves_are_copied_for_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    run = Run("demo")
    keep_choices(run, {"preset": "demo"})
    for step in range(1, 21):
        run.log("base", "step", step=step, loss=5 / step, tokens=100 * step)
    run.log("base", "sample", step=20, prompt="Once", text="Once a fox")
    run.log("mid", "eval", step=0, bpb=2.5)
    run.log("eval", "score", source="sft", task="reading", accuracy=0.4)
    call = lambda: call_nanochat(tmp_path, "wandb", "--run", "demo", "--project", "course")  # noqa: E731
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "wandb.py").write_text("raise ModuleNotFoundError(name='wandb')\n")
    ours = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'none'}:{ours}")
    missing = call()
    assert missing.returncode == 2 and "wandb is not installed" in missing.stderr and "pip install" in missing.stderr
    (tmp_path / "none" / "wandb.py").write_text("import no_such_part_of_it\n")
    assert "wandb can't be loaded (No module named 'no_such_part_of_it')" in call().stderr
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "wandb.py").write_text(textwrap.dedent(FAKE_WANDB))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'some'}:{ours}")
    first, second = call(), call()
    assert first.stdout == second.stdout, first.stderr + second.stderr  # the same id, and the older copy is gone
    folder = Path(re.fullmatch(r"on a machine with internet: wandb sync (\S+)\n", first.stdout)[1])
    given, *rows, summary = json.loads((folder / "seen.json").read_text())
    assert (given["mode"], given["project"], given["name"], given["config"]["preset"]) == ("offline", "course", "demo", "demo")
    assert ["base/*", "base/step"] in rows and summary == {"sft/reading": 0.4}
    copied = [row["base/loss"] for row in rows if isinstance(row, dict) and "base/loss" in row]
    assert copied == [5 / step for step in range(1, 21)]
    assert any("mid/bpb" in row for row in rows) and all(isinstance(value, (int, float)) for row in rows if isinstance(row, dict) for value in row.values())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Lines(threading.Thread):
    "What a program prints, as it comes."

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process, self.text = process, ""
        self.start()

    def run(self):
        for line in self.process.stdout:
            self.text += line

    def wait_for(self, pattern, seconds=120):
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end and (self.process.poll() is None or self.is_alive()), self.text
            time.sleep(0.1)
        return found


@pytest.fixture
def quiet_home(tmp_path):
    "A home of its own, in which root may start JupyterLab."
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    return {"HOME": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "USER": "student"}


def answers(port):
    with socket.socket() as trial:
        return trial.connect_ex(("localhost", port)) == 0


def test_jupyterlab_on_a_compute_node(cluster, site, quiet_home):
    port = free_port()
    process = subprocess.Popen(["srun", "--nodes=1", "--gres=gpu:a100:1", NANOCHAT, "lab", "--site", site.path, "--port", str(port)], text=True,
                               env={**cluster.environment, **quiet_home}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = Lines(process)
    try:
        lines.wait_for(rf"ssh -N -J student@login.example.org -L {port}:localhost:{port} student@n[12]\n")
        token = lines.wait_for(rf"http://localhost:{port}/lab\S*\?token=(\w+)")[1]
        lines.wait_for(r"is running at:")
        cluster.wait_until(lambda: answers(port), "JupyterLab")  # which says that it runs before it listens
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://localhost:{port}/api/contents", timeout=30)
        names = [item["name"] for item in json.load(urllib.request.urlopen(f"http://localhost:{port}/api/contents/nbs?token={token}", timeout=30))["content"]]
        assert "52_pretrain.ipynb" in names
        page = urllib.request.urlopen(f"http://localhost:{port}/lab/tree/nbs/index.ipynb?token={token}", timeout=30)
        assert page.status == 200
        taken = cluster.call("srun", "--nodes=1", "--overlap", NANOCHAT, "lab", "--port", port, **quiet_home)
        assert f"nanochat lab --port {port + 1}" in taken.stderr and "ssh" not in taken.stdout
        request = urllib.request.Request(f"http://localhost:{port}/api/shutdown", method="POST", headers={"Authorization": f"token {token}"})
        urllib.request.urlopen(request, timeout=30)
        assert process.wait(60) == 0, lines.text
    finally:
        process.terminate()
        process.wait(60)


def test_a_chat_in_a_session_on_a_compute_node(cluster, demo_run, tmp_path):
    done = subprocess.run(["srun", "--nodes=1", "--gres=gpu:a100:1", NANOCHAT, "chat", "--run", "demo", "--max-tokens", "8"], input="Hello!\n/reset\n/quit\n", text=True,
                          env={**cluster.environment, "NANOCHAT_BASE_DIR": str(tmp_path)}, capture_output=True, timeout=120)
    assert done.returncode == 0 and "sft model" in done.stdout and "forgotten" in done.stdout and done.stdout.count("> ") == 3, done.stdout + done.stderr
    once = cluster.call("srun", "--nodes=1", NANOCHAT, "chat", "--run", "demo", "--max-tokens", "8", "-p", "Hello!", NANOCHAT_BASE_DIR=str(tmp_path))
    assert once.returncode == 0 and once.stdout.strip(), once.stderr
