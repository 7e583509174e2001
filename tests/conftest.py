"""What several files of tests share: real data, a finished run of the demo preset, and a cluster."""
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slurm

NANOCHAT = Path(sys.executable).with_name("nanochat")


LONGEST = ("test_jobs.py", "test_assignments.py", "test_grading.py", "test_labs.py", "test_tiny.py", "test_doctor.py")  # begun first, so that two workers end together


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def call_nanochat(base, *arguments, environment=None, **kwargs):
    "The command line with a base directory, as a user types it."
    variables = {**os.environ, "NANOCHAT_BASE_DIR": str(base), **(environment or {})}
    return subprocess.run([NANOCHAT, *map(str, arguments)], capture_output=True, text=True, env=variables, timeout=300, **kwargs)


def run_ranks(count, *arguments):
    "Run a script in so many processes, through torchrun if there are several; gives what it printed."
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    done = subprocess.run([sys.executable, *command, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def kept_environment():
    "A test that changes the process's variables for good would decide how others end."
    before = dict(os.environ)
    yield
    changed = {name for name, value in before.items() if os.environ.get(name) != value} - {"PYTEST_CURRENT_TEST"}
    assert not changed, f"this test has left other values of {changed}"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "A base directory that all tests of the command line share."
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="session")
def demo(base, tmp_path_factory):
    "A finished run of the demo preset, and what it printed: made by the worker that asks first, and copied by the others."
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    shared.mkdir(exist_ok=True)
    made, said = shared / "base", shared / "said.json"
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            done = call_nanochat(made, "run", "--preset", "demo")
            said.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    shutil.copytree(made, base, dirs_exist_ok=True)
    code, *texts = json.loads(said.read_text())
    return subprocess.CompletedProcess([], code, *(text.replace(str(made), str(base)) for text in texts))


@pytest.fixture
def demo_run(base, demo, tmp_path, monkeypatch):
    "A copy of the demo run in a base directory of the test's own."
    from nanochat.run import Run

    assert demo.returncode == 0, demo.stdout + demo.stderr
    shutil.copytree(base / "runs" / "demo", tmp_path / "runs" / "demo")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PROGRESS", "lines")
    return Run("demo")


@pytest.fixture(scope="session")
def real_data():
    "The folder of real data. Without one the test is skipped, and fails in CI."
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    if folder is None and os.environ.get("CI"):
        pytest.fail("CI must set NANOCHAT_TEST_DATA")
    if folder is None:
        pytest.skip("set NANOCHAT_TEST_DATA to a folder of real data")
    return Path(folder)


@pytest.fixture(scope="module")
def cluster():
    "A Slurm of two nodes, for one file of tests."
    missing = slurm.missing_programs()
    if missing and os.environ.get("CI"):
        pytest.fail(f"CI must install slurmctld, slurmd, slurm-client and munge: there is no {missing[0]}")
    if missing:
        pytest.skip(f"there is no {missing[0]}: apt install slurmctld slurmd slurm-client munge")
    with slurm.Cluster() as started:
        yield started
    assert not started.leftovers()


@contextlib.contextmanager
def small_disk(path, size):
    "A disk of `size` bytes; only root can make one, and CI has to."
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if made.returncode and os.geteuid() == 0 and os.environ.get("CI"):
        pytest.fail(f"root in CI must be able to mount: {made.stderr}")
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
