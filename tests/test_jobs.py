"""A run as jobs on a real Slurm: chained, stopped, killed, continued."""
import json
import os
import re
import signal
from pathlib import Path

import pytest
from conftest import NANOCHAT

import slurm
from nanochat.common import UserError
from nanochat.jobs import count_vain, name_job, note_job, read_site
from nanochat.run import Run

ROOT = Path(__file__).parent.parent
QUICK = [part for pair in ("base.tokens=409600", "base.save_every=5", "base.eval_every=1000", "base.sample_every=0", "base.precision=float32") for part in ("--set", pair)]


@pytest.fixture(scope="module")
def cluster():
    missing = slurm.missing_programs()
    if missing and os.environ.get("CI"):
        pytest.fail(f"CI must install slurmctld, slurmd, slurm-client and munge: there is no {missing[0]}")
    if missing:
        pytest.skip(f"there is no {missing[0]}: apt install slurmctld slurmd slurm-client munge")
    with slurm.Cluster() as started:
        yield started
    assert not started.leftovers()


@pytest.fixture
def site(tmp_path):
    "A cluster's facts, with a base directory of the test's own."
    facts = {"SITE_ACCOUNT": "class-cse8990", "SITE_PARTITION": "gpu-a100", "SITE_GRES": "gpu:a100:1", "SITE_CPUS": 2, "SITE_MEMORY": "4G",
             "SITE_TIME": "00:30:00", "SITE_MAIL": "student@example.org", "NANOCHAT_BASE_DIR": tmp_path / "base", "OMP_NUM_THREADS": 1}
    file = tmp_path / "site.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in facts.items()))
    return file


def submit(cluster, site, *arguments, **environment):
    "`nanochat submit`, and the ids of the jobs."
    done = cluster.call(NANOCHAT, "submit", "--site", site, *arguments, timeout=120, **environment)
    return done, [line.split()[0] for line in done.stdout.splitlines() if line[:1].isdigit()]


def folder(site, name):
    return site.parent / "base" / "runs" / name


def losses(site, name):
    lines = (folder(site, name) / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines) if r["stage"] == "base" and r["kind"] == "step"]


def log_of(site, name, job):
    return "".join(path.read_text() for path in (folder(site, name) / "jobs").glob(f"{job}-*.log"))


def test_the_whole_chain(cluster, site):
    done, ids = submit(cluster, site, "--preset", "demo")
    assert done.returncode == 0 and len(ids) == 8, done.stdout + done.stderr
    again, _ = submit(cluster, site, "--preset", "demo")
    assert again.returncode == 2 and "in the queue already" in again.stderr
    assert all(cluster.wait_for(number)["JobState"] == "COMPLETED" for number in ids), log_of(site, "demo", "*")
    path = folder(site, "demo")
    assert {file.stem for file in (path / "notebooks").glob("*.ipynb")} == {"51_train_tokenizer", "52_pretrain", "53_midtrain", "54_sft", "56_evaluate", "57_report"}
    report = (path / "report.md").read_text()
    assert all(f"| {source} | reading |" in report or f"{source} " in report for source in ("base", "mid", "sft"))
    assert cluster.job(ids[0]).get("TresPerNode", "") == "" and "gpu" in cluster.job(ids[1])["TresPerNode"]
    cluster.wait_until(lambda: (cluster.folder / "mail.log").read_text().count("COMPLETED") >= 8, "mail")
    status = cluster.call(NANOCHAT, "status", "demo", "--site", site).stdout
    assert "COMPLETED" in status and "report is done" in status
    finished, none = submit(cluster, site, "--run", "demo")
    assert finished.returncode == 0 and none == [] and "complete" in finished.stdout


@pytest.fixture
def whole(cluster, site):
    "The losses of a pretraining that nothing has disturbed."
    _, ids = submit(cluster, site, "--preset", "demo", "--run", "whole", *QUICK)
    cluster.wait_for(ids[1])
    cluster.call("scancel", *ids[2:])
    return losses(site, "whole")


def wait_for_step(cluster, site, name, step):
    cluster.wait_until(lambda: (folder(site, name) / "metrics.jsonl").exists() and len(losses(site, name)) >= step, f"step {step}", 120)


def test_stopped_and_lost_it_goes_on(cluster, site, whole):
    _, ids = submit(cluster, site, "--preset", "demo", "--run", "often", *QUICK)
    cluster.call("scancel", *ids[2:])
    for step in (20, 60):  # the clock: saved, and in the queue again
        wait_for_step(cluster, site, "often", step)
        cluster.call("scancel", "--batch", "--signal=USR1", ids[1])
        cluster.wait_for(ids[1], ["PENDING"])
        cluster.wait_for(ids[1], ["RUNNING"])
    wait_for_step(cluster, site, "often", 100)  # a node that breaks: Slurm itself begins the job again
    node = cluster.job(ids[1])["NodeList"]
    cluster.break_node(node, ids[1])
    cluster.wait_for(ids[1], ["PENDING"])
    cluster.mend_node(node)
    cluster.wait_for(ids[1], ["RUNNING"])
    wait_for_step(cluster, site, "often", 130)  # somebody takes the job out of the queue, and it is submitted again
    cluster.call("scancel", ids[1])
    assert cluster.wait_for(ids[1])["JobState"] == "CANCELLED"
    _, more = submit(cluster, site, "--run", "often")
    assert len(more) == 7
    assert cluster.wait_for(more[0])["JobState"] == "COMPLETED", log_of(site, "often", "base")
    cluster.call("scancel", *more[1:])
    assert losses(site, "often") == whole and len(whole) == 200


def test_two_nodes_with_two_ranks_each_equal_one_process(cluster, site, whole):
    site.write_text(site.read_text() + "SITE_NODES=2\n")
    few = [part for pair in ("base.processes=2", "base.device_rows=2", "mid.device_rows=8", "sft.device_rows=8") for part in ("--set", pair)]
    done, ids = submit(cluster, site, "--preset", "demo", "--run", "wide", *QUICK, *few)
    assert len(ids) == 8, done.stdout
    assert cluster.wait_for(ids[1])["JobState"] == "COMPLETED", log_of(site, "wide", "base")
    cluster.call("scancel", *ids[2:])
    config = json.loads(next(line for line in (folder(site, "wide") / "metrics.jsonl").read_text().splitlines() if '"base", "kind": "config"' in line))
    assert config["ranks"] == 4 and cluster.job(ids[1])["NumNodes"] == "2"
    first = [(a, b) for (_, a), (_, b) in zip(losses(site, "wide"), whole)][:20]  # later, rounding has grown
    assert max(abs(a - b) for a, b in first) < 1e-4


def test_a_dead_kernel_ends_the_chain(cluster, site):
    _, ids = submit(cluster, site, "--preset", "demo", "--run", "dead", *QUICK)
    wait_for_step(cluster, site, "dead", 5)
    kernels = [pid for pid in cluster.processes(f"SLURM_JOB_ID={ids[1]}") if b"launch_new_instance" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in kernels:
        os.kill(pid, signal.SIGKILL)
    assert cluster.wait_for(ids[1])["JobState"] == "FAILED"
    assert "goes on from the last checkpoint" in log_of(site, "dead", "base").splitlines()[-1]
    assert all(cluster.wait_for(number)["JobState"] == "CANCELLED" for number in ids[2:])
    cluster.wait_until(lambda: f"Job_id={ids[1]} Name=dead:base Failed" in (cluster.folder / "mail.log").read_text(), "mail")


def test_what_is_missing_is_found_before_anything_is_queued(cluster, site):
    done, ids = submit(cluster, site, "--preset", "demo", "--run", "lacking", "--set", "sft.mixture=gsm8k=10", NANOCHAT_TEST_DATA="")
    assert done.returncode == 2 and not ids and "nanochat fetch gsm8k" in done.stdout and "task gsm8k" in done.stderr, done.stdout
    assert not cluster.call("squeue", "-h", "-n", "lacking:tokenizer").stdout


def test_full_size_jobs_are_what_slurm_takes(cluster):
    done = cluster.call(NANOCHAT, "submit", "--preset", "d20", "--site", ROOT / "slurm" / "ptolemy.env", "--dry-run", USER="student")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8 and all(line[0] == "sbatch" for line in lines), done.stdout + done.stderr
    for line in lines:
        arguments = [part for part in line[1:] if not part.startswith(("--dependency", "--output"))]
        tested = cluster.call("sbatch", "--test-only", *arguments)
        assert tested.returncode == 0 and "to start at" in tested.stderr, tested.stderr
    wrong = cluster.call("sbatch", "--test-only", *[part.replace("a100:8", "a100:9") for part in lines[1][1:] if not part.startswith(("--dependency", "--output"))])
    assert wrong.returncode != 0


def test_by_hand_with_a_word_too_few(cluster, tmp_path):
    number = cluster.call("sbatch", "--parsable", f"--output={tmp_path}/log", ROOT / "slurm" / "stage.sbatch", "slurm/ptolemy.env", "mine").stdout.strip()
    assert cluster.wait_for(number)["JobState"] == "FAILED"
    assert "SITE RUN STAGE" in (tmp_path / "log").read_text()


def test_a_page_on_a_compute_node_says_how_to_reach_it(cluster, site):
    site.write_text(site.read_text() + "SITE_LOGIN=login.example.org\n")
    done = cluster.call("srun", "--nodes=1", NANOCHAT, "serve", "--site", site, "--port", "8765", USER="student")
    assert re.search("ssh -N -J student@login.example.org -L 8765:localhost:8765 student@n[12]", done.stdout) and "nothing has been trained yet" in done.stderr


def test_no_third_try_without_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    run, job = Run("stuck"), name_job("base")
    for progress, vain in ((0, 0), (40, 0), (40, 1), (40, 2)):
        assert count_vain(run, job, progress) == vain
        note_job(run, "began", id="7", name="base", progress=progress)
    note_job(run, "began", id="7", name="mid", progress=0)
    assert count_vain(run, job, 40) == 3 and count_vain(run, job, 45) == 0
    note_job(run, "queued", id="9", name="base")  # mended, and submitted again
    assert count_vain(run, job, 40) == 0


@pytest.mark.parametrize(["line", "message"], [
    ("SITE_ACCOUNT=$(id)", "line 1"), ("SITE_TIME=`date`", "line 1"), ("SITE_MEMORY=1G; rm x", "line 1"), ("SITE_CPUS=two words", "line 1"),
    ("SITE_PARTITON=gpu", "SITE_PARTITON is unknown"), ("export SITE_CPUS=1", "line 1"), ("SITE_MAIL=$MAIL", "line 1"),
])
def test_site_files_hold_plain_facts(tmp_path, line, message):
    (tmp_path / "site.env").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_site(tmp_path / "site.env")
    with pytest.raises(UserError, match="example.env"):
        read_site(tmp_path / "none.env")


def test_every_command_of_the_guide_is_one():
    from typer.main import get_command

    from nanochat.cli import app
    text = (ROOT / "docs" / "ptolemy.qmd").read_text()
    commands = [line.split() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line.startswith("nanochat ")]
    assert len(commands) >= 7
    for _, name, *arguments in commands:
        get_command(app).commands[name].make_context(name, list(arguments))  # raises for an unknown option


def test_site_files_mean_the_same_to_a_shell(cluster, monkeypatch):
    monkeypatch.setenv("USER", "student")
    for file in sorted((ROOT / "slurm").glob("*.env")):
        shown = cluster.call("bash", "-c", 'set -a; source "$1"; env -0', "bash", file, USER="student").stdout.split("\0")
        assert all(f"{name}={value}" in shown for name, value in read_site(file).values.items())
    assert len((ROOT / "slurm" / "stage.sbatch").read_text().splitlines()) <= 60
