"""A run as jobs on a real Slurm: chained, stopped, killed, continued."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import NANOCHAT

import slurm
from nanochat.common import UserError
from nanochat.jobs import JobStop, count_vain, job_states, name_job, note_job, read_jobs, read_site, submit_run
from nanochat.pipeline import find_choices, keep_choices
from nanochat.run import Run

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "ptolemy.qmd").read_text()
HOOK = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests" / "stage_hook"), os.environ.get("PYTHONPATH")]))}  # lets STEP_SECONDS and STEP_ERROR do something
QUICK = [part for pair in ("base.tokens=409600", "base.save_every=5", "base.eval_every=1000", "base.sample_every=0", "base.precision=float32") for part in ("--set", pair)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The base directory of this file's runs."
    return tmp_path_factory.mktemp("home")


def write_site(file, home, **changes):
    "A cluster's facts."
    facts = {"SITE_ACCOUNT": "class-cse8990", "SITE_PARTITION": "gpu-a100", "SITE_GRES": "gpu:a100:1", "SITE_CPUS": 2, "SITE_MEMORY": "4G", "SITE_TIME": "00:30:00",
             "SITE_MAIL": "student@example.org", "SITE_LOGIN": "login.example.org", "NANOCHAT_BASE_DIR": home, "OMP_NUM_THREADS": 1, **changes}
    file.write_text("".join(f"{name}={value}\n" for name, value in facts.items()))
    return file


@pytest.fixture
def site(tmp_path, home, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    return write_site(tmp_path / "site.env", home)


def submit(cluster, site, *arguments, **environment):
    "`nanochat submit`, and the ids of the jobs."
    done = cluster.call(NANOCHAT, "submit", "--site", site, *arguments, timeout=120, **environment)
    return done, [line.split()[0] for line in done.stdout.splitlines() if line[:1].isdigit()]


def submit_base(cluster, site, name, *arguments, **environment):
    "A run that has the tokenizer already; of the jobs only pretraining is left in the queue, if it isn't to be seen how others fare."
    done, ids = submit(cluster, site, "--preset", "demo", "--run", begin_run(name).name, *QUICK, *arguments, **environment)
    assert len(ids) == 7, done.stdout + done.stderr
    return ids


def begin_run(name):
    "A copy of the run named whole, as it was before pretraining."
    run, whole = Run(name), Run("whole")
    shutil.copytree(whole.path / "tokenizer", run.path / "tokenizer")
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in whole.records("tokenizer")))
    return run


def losses(name):
    return [(r["step"], r["loss"]) for r in Run(name).records("base", "step")]


def log_of(name, job):
    return "".join(path.read_text() for path in (Run(name).path / "jobs").glob(f"{job}-*.log"))


def wait_for_mail(cluster, text, count=1):
    mail = cluster.folder / "mail.log"
    cluster.wait_until(lambda: mail.exists() and mail.read_text().count(text) >= count, f"mail: {text}")


def guide_lines(section):
    "What one section of the guide says to type."
    return "".join(re.findall(r"```bash\n(.*?)```", re.split(r"\n## ", GUIDE)[section], re.S)).splitlines()


def inline_command(begin):
    "A command in the guide's prose."
    return next(words for words in re.findall(r"`([^`\n]+)`", GUIDE) if words.startswith(begin))


def type_in(cluster, site, line, **options):
    "A line of the guide, typed on the private cluster: with its site, and the demo recipe where the guide has the full size."
    run = " --run d20" if line.startswith("nanochat submit") else ""
    line = line.replace("slurm/ptolemy.env", str(site)).replace("--preset d20", f"--preset demo{run}")
    path = f"{NANOCHAT.parent}:{cluster.environment['PATH']}"
    return subprocess.Popen(["timeout", "300", "script", "-qefc", line, os.devnull], env={**cluster.environment, "PATH": path, "USER": "student", "PYTHONUNBUFFERED": "1"}, cwd=ROOT,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def answer_to(cluster, site, line, words="", code=0):
    "What a line of the guide prints, after words typed into it."
    process = type_in(cluster, site, line)
    answer = process.communicate(words)[0]
    assert process.returncode == code, f"{line}: {answer}"
    return answer


def job_ids(answer):
    return re.findall(r"^(\d+)  \w", answer, re.M)


def test_the_guide_typed_from_top_to_bottom(cluster, site, home, monkeypatch):
    "Every command of docs/ptolemy.qmd in its order, up to the chat; those that prepare the machine are compared as text."
    monkeypatch.setenv("USER", "student")
    ptolemy = read_site(ROOT / "slurm" / "ptolemy.env")
    (scratch, clone, modules, setup, activate) = guide_lines(1)
    assert ptolemy.get("NANOCHAT_BASE_DIR").startswith(os.path.expandvars(scratch.removeprefix("cd ")))
    assert clone.endswith("/nanochat/nanochat && cd nanochat") and modules == f"module purge; module load {ptolemy.get('SITE_MODULES')}"
    assert setup == "make setup" and "\nsetup:" in (ROOT / "Makefile").read_text() and activate == "source .venv/bin/activate"

    (fetch, doctor) = guide_lines(2)
    assert "corpus tinyworld: " in answer_to(cluster, site, fetch)
    assert "ready: nanochat submit" in (answer := answer_to(cluster, site, doctor)) and "FAIL" not in answer

    (small, watch) = guide_lines(3)
    small_ids = job_ids(answer_to(cluster, site, small))
    assert len(small_ids) == 8
    process = type_in(cluster, site, watch)
    assert any(f"{small_ids[0]}  tokenizer" in line for line in process.stdout)
    process.stdin.write("\x03")  # Ctrl-C
    process.communicate(timeout=60)
    assert "scancel" in GUIDE
    cluster.call("scancel", *small_ids)
    assert cluster.wait_for(small_ids[0])["JobState"] in ("CANCELLED", "COMPLETED")

    (dry, queue) = guide_lines(4)
    assert answer_to(cluster, site, dry).count("sbatch --parsable") == 8 and not Run("d20").path.exists()
    ids = job_ids(answer := answer_to(cluster, site, queue))
    assert len(ids) == 8 and "pass  GPUs" in answer and "pass  speed" in answer
    assert "in the queue already" in answer_to(cluster, site, queue, code=2)
    check_chain(cluster, "d20", ids)
    trained, prepared = log_of("d20", "base"), log_of("d20", "tokenizer")  # a job begins with the checks that concern it
    assert "pass  GPUs" in trained and "pass  speed" in trained and "base of run 'd20' is done" in trained
    assert "pass  packages" in prepared and "pass  speed" not in prepared

    (look, base, curves) = guide_lines(5)
    assert "report is done" in answer_to(cluster, site, look)
    assert "complete" in answer_to(cluster, site, inline_command("nanochat submit --run d20"))

    installed = find_spec("wandb") is not None
    assert ("wandb sync" if installed else "wandb is not installed") in answer_to(cluster, site, f"export NANOCHAT_BASE_DIR={home}; {curves}", code=0 if installed else 2)

    (export, talk) = guide_lines(6)
    assert base == export
    assert os.path.expandvars(export) == f"export NANOCHAT_BASE_DIR={ptolemy.get('NANOCHAT_BASE_DIR')}"
    assert "d20, sft model" in answer_to(cluster, site, f"export NANOCHAT_BASE_DIR={home}; {talk}", "/reset\n/quit\n")
    line, port = talk.partition(".venv/bin/")[0] + ".venv/bin/" + inline_command("nanochat serve"), slurm.free_ports(1)[0]
    process = type_in(cluster, site, f"{line} --port {port}")
    printed = next(line for line in process.stdout if "on your own machine: " in line)
    assert re.search(f"ssh -N -J student@login.example.org -L {port}:localhost:{port} student@n[12]", printed)
    cluster.wait_until(lambda: b"<html" in read_page(port), "the page")
    process.stdin.write("\x03")
    process.communicate(timeout=60)


def read_page(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
            return page.read()
    except OSError:
        return b""


def check_chain(cluster, name, ids, seconds=240):
    "A chain of eight jobs ends well, and leaves all that a reader looks for."
    assert all(cluster.wait_for(number, seconds=seconds)["JobState"] == "COMPLETED" for number in ids), log_of(name, "*")
    path = Run(name).path
    notebooks = {file.stem: file.read_text() for file in (path / "notebooks").glob("*.ipynb")}
    assert set(notebooks) == {"51_train_tokenizer", "52_pretrain", "53_midtrain", "54_sft", "56_evaluate", "57_report"} and not (path / "notebooks" / "attempts").exists()
    assert all('"output_type"' in text for text in notebooks.values())
    report = (path / "report.md").read_text()
    assert all(f"| {source} | reading |" in report or f"{source} " in report for source in ("base", "mid", "sft"))
    assert cluster.job(ids[0]).get("TresPerNode", "") == "" and "gpu" in cluster.job(ids[1])["TresPerNode"]
    for number in ids:
        wait_for_mail(cluster, f"Job_id={number} ")


if os.environ.get("NANOCHAT_SOAK"):  # ten minutes: NANOCHAT_SOAK=1 python -m pytest tests/test_jobs.py -k tiny
    def test_the_tiny_chain(cluster, site):
        done, ids = submit(cluster, site, "--preset", "tiny")
        assert len(ids) == 8, done.stdout + done.stderr
        check_chain(cluster, "tiny", ids, seconds=1800)


@pytest.fixture(scope="module")
def whole(cluster, home, tmp_path_factory):
    "The losses of a pretraining that nothing has disturbed, and the seconds until its first step."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        site = write_site(tmp_path_factory.mktemp("site") / "site.env", home)
        done, ids = submit(cluster, site, "--preset", "demo", "--run", "whole", *QUICK)
        assert len(ids) == 8, done.stdout + done.stderr
        cluster.call("scancel", ids[2])
        job = cluster.wait_for(ids[1])
        assert job["JobState"] == "COMPLETED", log_of("whole", "*")
        first = Run("whole").records("base", "step")[0]["time"]
        return losses("whole"), first - time.mktime(time.strptime(job["StartTime"], "%Y-%m-%dT%H:%M:%S"))


def wait_for_step(cluster, name, step):
    cluster.wait_until(lambda: len(losses(name)) >= step, f"step {step}", 120)


def test_time_limits(cluster, site, home, whole):
    "A minute for a job, and more on a machine that needs it to begin; the steps last for more than two of them. Slurm and the clock do everything."
    minutes = 1 + int(whole[1] // 15)
    write_site(site, home, SITE_TIME=f"0:{minutes:02d}:00")
    ids = submit_base(cluster, site, "limited", **HOOK, STEP_SECONDS=str(0.4 * minutes))
    cluster.call("scancel", *ids[1:])
    job = cluster.wait_for(ids[0], seconds=480 * minutes)
    assert job["JobState"] == "COMPLETED" and job["TimeLimit"] == f"00:{minutes:02d}:00", log_of("limited", "base")
    assert int(job["Restarts"]) >= 2
    assert losses("limited") == whole[0] and [step for step, _ in whole[0]] == list(range(1, 201))
    notes = [note for note in read_jobs(Run("limited")) if note["event"] == "stopped"]
    assert len(notes) == int(job["Restarts"]) and "TIME LIMIT" not in log_of("limited", "base")
    attempts = Run("limited").path / "notebooks" / "attempts"
    assert [f"goes on from step {note['progress']}" in log_of("limited", "base") for note in notes] == [True] * len(notes)
    assert len(list(attempts.glob("52_pretrain-*.ipynb"))) == len(notes)
    for number, note in enumerate(notes, start=1):
        assert f"at step {note['progress']}; the same command goes on from here" in (attempts / f"52_pretrain-{number}.ipynb").read_text()


def commands_of(cluster, number):
    "What the processes of a job were called with."
    commands = {}
    for pid in cluster.processes(f"SLURM_JOB_ID={number}"):
        with suppress(OSError):  # it has ended
            commands[pid] = Path(f"/proc/{pid}/cmdline").read_text()
    return commands


def test_stopped_and_lost_it_goes_on(cluster, site, whole):
    ids = submit_base(cluster, site, "often", **HOOK, STEP_SECONDS="0.1")
    cluster.call("scancel", *ids[1:])
    cluster.wait_until(lambda: any("nanochat\0job" in command for command in commands_of(cluster, ids[0]).values()), "the job")
    cluster.call("scancel", "--batch", "--signal=USR1", ids[0])  # too early: nothing listens yet, and nothing happens
    wait_for_step(cluster, "often", 20)  # now it is saved, and in the queue again
    cluster.call("scancel", "--batch", "--signal=USR1", ids[0])
    cluster.wait_for(ids[0], ["PENDING"])
    cluster.wait_for(ids[0], ["RUNNING"])
    wait_for_step(cluster, "often", 80)  # a node that breaks: Slurm itself begins the job again
    node = cluster.job(ids[0])["NodeList"]
    cluster.break_node(node, ids[0])
    cluster.wait_for(ids[0], ["PENDING"])
    cluster.mend_node(node)
    cluster.wait_for(ids[0], ["RUNNING"])
    wait_for_step(cluster, "often", 130)  # somebody takes the job out of the queue, and it is submitted again
    cluster.call("scancel", ids[0])
    assert cluster.wait_for(ids[0])["JobState"] == "CANCELLED"
    _, more = submit(cluster, site, "--run", "often")  # without the hook: the last steps need no time
    assert len(more) == 7
    assert cluster.wait_for(more[0])["JobState"] == "COMPLETED", log_of("often", "base")
    cluster.call("scancel", *more[1:])
    assert losses("often") == whole[0]


def test_a_daemon_that_dies(cluster, site, whole):
    "slurmd alone dies: when it is back soon, nothing has happened; when it stays away, the job begins again elsewhere, while its old processes still work."
    ids = submit_base(cluster, site, "orphan", **HOOK, STEP_SECONDS="0.15")
    cluster.call("scancel", *ids[1:])
    wait_for_step(cluster, "orphan", 10)
    node = cluster.job(ids[0])["NodeList"]
    cluster.stop_daemon(node)
    wait_for_step(cluster, "orphan", 30)
    cluster.start_node(node)
    wait_for_step(cluster, "orphan", 60)
    assert cluster.job(ids[0])["Restarts"] == "0" and cluster.job(ids[0])["JobState"] == "RUNNING"
    cluster.stop_daemon(node)
    cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=silent")  # as Slurm does after a while
    cluster.wait_for(ids[0], ["PENDING"])
    cluster.wait_for(ids[0], ["RUNNING"])
    assert cluster.job(ids[0])["NodeList"] != node
    cluster.wait_until(lambda: len([n for n in read_jobs(Run("orphan")) if n["event"] == "began"]) == 2, "a second attempt")
    cluster.mend_node(node)
    job = cluster.wait_for(ids[0])
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", log_of("orphan", "base")
    assert losses("orphan") == whole[0]


def test_two_nodes_with_two_ranks_each_equal_one_process(cluster, site, home, whole):
    write_site(site, home, SITE_NODES=2)
    few = [part for pair in ("base.processes=2", "base.device_rows=2", "mid.device_rows=8", "sft.device_rows=8") for part in ("--set", pair)]
    ids = submit_base(cluster, site, "wide", *few)
    cluster.call("scancel", *ids[1:])
    assert cluster.wait_for(ids[0])["JobState"] == "COMPLETED", log_of("wide", "base")
    assert Run("wide").records("base", "config")[0]["ranks"] == 4 and cluster.job(ids[0])["NumNodes"] == "2"
    first = [(a, b) for (_, a), (_, b) in zip(losses("wide"), whole[0])][:20]  # later, rounding has grown
    assert max(abs(a - b) for a, b in first) < 1e-4


def test_what_ends_a_chain(cluster, site, whole):
    "A kernel that dies, two kinds of errors, and damaged checkpoints: dependants are cancelled, mail is sent, and the last line of the log says what happened."
    damaged = Run("damaged").path / "base"
    shutil.copytree(Run("whole").path / "base" / "step_000200", damaged / "step_000005")
    (damaged / "step_000005" / "model.safetensors").write_bytes(b"nothing")
    jobs = {"dead": submit_base(cluster, site, "dead", **HOOK, STEP_SECONDS="0.3")}
    wait_for_step(cluster, "dead", 12)
    kernels = [pid for pid, command in commands_of(cluster, jobs["dead"][0]).items() if "launch_new_instance" in command]
    assert kernels
    for pid in kernels:
        os.kill(pid, signal.SIGKILL)
    for kind in ("UserError", "ValueError"):
        jobs[kind] = submit_base(cluster, site, kind, **HOOK, STEP_ERROR=kind)
    jobs["damaged"] = submit_base(cluster, site, "damaged")
    sentences = {"dead": "the same command goes on from the last checkpoint", "UserError": "nanochat: step 7 can't be done",
                 "ValueError": "52_pretrain.ipynb failed with ValueError: step 7 can't be done; the executed notebook is ",
                 "damaged": f"give it up with rm -r {damaged}"}
    for name, ids in jobs.items():
        assert cluster.wait_for(ids[0])["JobState"] == "FAILED"
        assert sentences[name] in log_of(name, "base").splitlines()[-1]
        assert all(cluster.wait_for(number)["JobState"] == "CANCELLED" for number in ids[1:])
        wait_for_mail(cluster, f"Job_id={ids[0]} Name={name}:base Failed")
    assert "ValueError" in (Run("ValueError").path / "notebooks" / "52_pretrain.ipynb").read_text()
    assert [path.name for path in damaged.iterdir()] == ["step_000005.broken"] and not Run("damaged").records("base", "step")


def test_what_is_missing_is_found_before_anything_is_queued(cluster, site):
    done, ids = submit(cluster, site, "--preset", "demo", "--run", "lacking", "--set", "sft.mixture=gsm8k=10", NANOCHAT_TEST_DATA="")
    assert done.returncode == 2 and not ids and "nanochat fetch gsm8k" in done.stdout and "task gsm8k" in done.stderr, done.stdout
    assert not cluster.call("squeue", "-h", "-n", "lacking:tokenizer").stdout and not Run("lacking").choices()


def test_a_refused_submission_changes_nothing(cluster, site, home, whole, monkeypatch, capsys):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    run, half, spoilt = begin_run("refused"), Run("half"), Run("spoilt")
    keep_choices(run, {"preset": "demo", "corpus": None, "settings": {"base": {"seed": 5}}})
    before = run.choices()
    shutil.copytree(Run("whole").path, spoilt.path)
    for weights in spoilt.path.glob("base/*/model.safetensors"):
        weights.write_bytes(b"nothing")

    def refused(run, sentence, settings, start=None, **changes):
        with pytest.raises(UserError, match=sentence):
            submit_run(run, find_choices(run, "demo", settings=settings), read_site(write_site(site, home, **changes)), start=start)
    refused(run, "job 'nothing' is unknown", {"base": {"seed": 6}}, "nothing")
    refused(run, "began tokenizer with vocab_size=512", {"tokenizer": {"vocab_size": 600}})
    refused(run, "nvalid partition", {"base": {"seed": 6}}, SITE_PARTITION="elsewhere")
    with pytest.warns(UserWarning, match="is set aside"):
        refused(spoilt, "no whole checkpoint of base", {})
    assert run.choices() == before and not job_states(run)
    refused(half, "sbatch refused", {}, SITE_GRES="gpu:a100:9")  # the second job; the tokenizer's needs no GPU
    (first,) = job_states(half)
    assert f"taken out of the queue again: {first}" in capsys.readouterr().out
    assert cluster.wait_for(first)["JobState"] == "CANCELLED" and not half.choices()


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


def test_an_evaluation_is_ended_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "runs" / "r").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), JobStop(Run("r"), name_job("eval:base"), time.time() + 0.2) as stop:
        time.sleep(60)
    assert stop.asked and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with JobStop(Run("r"), name_job("base"), time.time() - 1) as stop:  # training looks for the file between two steps
        time.sleep(0.2)
    assert stop.asked and (tmp_path / "runs" / "r" / "stop").exists()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.parametrize("stage", ["eval:base", "base"])
def test_a_second_signal_does_not_disturb_the_first(tmp_path, monkeypatch, stage):
    "Slurm's warning, and the clock while the job cleans up: the clock must not cut the cleaning short."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "runs" / "r").mkdir(parents=True)
    steps = []
    with JobStop(Run("r"), name_job(stage), time.time() + 0.3) as stop:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        except KeyboardInterrupt:
            steps.append("interrupted")
        assert stop.asked and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.append("requeued")
    assert steps == (["interrupted", "requeued"] if stage == "eval:base" else ["requeued"])


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
    ("SITE_ACCOUNT= id", "line 1"), ("SITE_ACCOUNT=id ", "line 1"), ("SITE_ACCOUNT=\tid", "line 1"), ("HF_HOME=~/hf", "line 1"), ('HF_HOME="~/hf"', "line 1"), ("SITE_CPUS=16\r", "line 1"),
    ("\r", "line 1"), ("SITE_CPUS=1\fSITE_NODES=2", "line 1"), ("SITE_CPUS=1\N{LINE SEPARATOR}SITE_NODES=2", "line 1"), ('SITE_CPUS="1" id', "line 1"), ("SITE_MODULES=gcc[12]", "line 1"),
])
def test_site_files_hold_plain_facts(tmp_path, line, message):
    (tmp_path / "site.env").write_bytes(f"{line}\n".encode())
    with pytest.raises(UserError, match=message):
        read_site(tmp_path / "site.env")
    with pytest.raises(UserError, match="example.env"):
        read_site(tmp_path / "none.env")


@pytest.mark.parametrize("line", ["A=b", "A=", 'A=""', 'A="b c"', 'A=" b "', 'A="b"  ', "A=$HOME/x", 'A="$USER@example.org"', "A=#b", "A=b#c", "A=b=c", "A=b:c,d@e%f+g", "HOME=/other\nA=$HOME/x",
                                  "A= b", "A=b c", "A=~/b", "A=b\r", "A=b\\", "A=$HOMES", "A=$$", "A=!b", "A=b\vc", "A=b\u00a0c", "A=b\u2028C=d", "\fA=b", " A=b", "A=b \nC=d"])
def test_a_line_is_refused_or_means_the_same_to_a_shell(tmp_path, monkeypatch, line):
    monkeypatch.setenv("USER", "student")
    (tmp_path / "site.env").write_bytes(f"{line}\n".encode())
    try:
        values = read_site(tmp_path / "site.env").values
    except UserError:
        return
    done = subprocess.run(["bash", "-c", 'set -a; source "$1"; env -0', "bash", tmp_path / "site.env"], capture_output=True, check=True)
    assert not done.stderr and all(f"{name}={value}".encode() in done.stdout.split(b"\0") for name, value in values.items())


def test_site_files_mean_the_same_to_a_shell(cluster, monkeypatch):
    monkeypatch.setenv("USER", "student")
    for file in sorted((ROOT / "slurm").glob("*.env")):
        shown = cluster.call("bash", "-c", 'set -a; source "$1"; env -0', "bash", file, USER="student").stdout.split("\0")
        assert all(f"{name}={value}" in shown for name, value in read_site(file).values.items())
    assert len((ROOT / "slurm" / "stage.sbatch").read_text().splitlines()) <= 60
