"""The sandbox: hostile programs fail, and nothing outside notices; right programs pass."""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

import nanochat.sandbox as sandbox
from nanochat.sandbox import (
    ALWAYS,
    PROBED,
    Limits,
    Outcome,
    SandboxError,
    describe_protections,
    judge,
    launch,
    protections,
    run_program,
    run_programs,
)

FAST = Limits(seconds=3)


@pytest.fixture(params=[True, False], ids=["namespaces", "guards"])
def namespaces(request):
    if request.param and sandbox.find_mode() == "guards" and not os.environ.get("CI"):
        pytest.skip("this machine allows no namespaces")
    assert not request.param or sandbox.find_mode() != "guards", "CI must be able to make namespaces"
    return request.param


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch, tmp_path):  # pytest makes its own directory first
    "No process, no directory, no file is left behind by any test of this file."
    before = leftovers()
    with tempfile.TemporaryDirectory(prefix="nanochat-test-") as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield
        assert os.listdir(folder) == []
    end = time.time() + 3
    while leftovers() - before and time.time() < end:
        time.sleep(0.05)
    assert leftovers() <= before


def leftovers():
    "Shared memory of ours, and processes that run our script."
    found = {str(path) for path in Path("/dev/shm").glob("*nanochat-test*")} if Path("/dev/shm").exists() else set()
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {pid: (parent, args) for pid, parent, args in (line.split(None, 2) for line in listed if len(line.split(None, 2)) == 3)}
    return found | {f"{pid} {args}" for pid, (_, args) in rows.items() if f"-I -S -X utf8 {sandbox.__file__}" in args and not is_of_another(pid, rows)}


def is_of_another(pid, rows):
    "Whether a process descends from a test process beside this one."
    line = []
    while pid in rows:
        line.append(pid)
        pid = rows[pid][0]
    return str(os.getppid()) in line and str(os.getpid()) not in line


def check_failure(code, namespaces, *reasons, limits=FAST):
    outcome = run_program(textwrap.dedent(code), limits, namespaces)
    assert not outcome.passed and "\n" not in outcome.reason
    assert any(reason in outcome.reason for reason in reasons), outcome
    assert outcome.seconds < limits.seconds + 2
    assert len(outcome.output) <= 2**16
    return outcome


def test_right_and_wrong(namespaces):
    assert run_program("assert 1 + 1 == 2", FAST, namespaces).passed
    assert run_program("", FAST, namespaces).reason == ""
    assert run_program("print('\u00e4', end='')", FAST, namespaces).output == "\u00e4"
    assert run_program("import sys\nprint('a', flush=True)\nprint('b', file=sys.stderr)", FAST, namespaces).output == "a\nb\n"
    assert check_failure("assert 1 + 1 == 3, 'no\\nno'", namespaces, "AssertionError: no no").output == ""
    check_failure("assert False", namespaces, "AssertionError")
    check_failure("def", namespaces, "SyntaxError")
    check_failure("'\ud800'", namespaces, "UnicodeEncodeError")
    check_failure("a\0b", namespaces, "SyntaxError", "ValueError")
    check_failure("raise KeyboardInterrupt", namespaces, "KeyboardInterrupt")
    check_failure("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", namespaces, "E: (no text: ZeroDivisionError)")
    check_failure("input()", namespaces, "EOFError")


@pytest.mark.parametrize("code", ["exit(0)", "quit()", "import sys\nsys.exit()", "raise SystemExit(0)", "import os\nos._exit(0)",
                                  "import atexit, os\natexit.register(os._exit, 0)", "import atexit, sys\natexit.register(sys.exit, 0)",
                                  "import atexit, sys\natexit.register(print, 'bye')\nsys.exit()", "import os\nos.close(1)",
                                  "import os\nos.closerange(0, 99)", "import os\nos.dup2(os.open('mine', os.O_CREAT | os.O_RDWR), 1)"])
def test_ending_early_is_not_passing(code, namespaces):
    check_failure(code, namespaces, "ended early", "SystemExit")


def test_exit_in_a_thread_or_a_child_says_nothing(namespaces):
    if namespaces:
        check_failure("import os\nif os.fork(): os._exit(0)\nimport time\ntime.sleep(0.2)", namespaces, "ended early")  # the child gets to the end
        assert run_program("import os\nif os.fork() == 0: raise ValueError\nos.wait()", FAST).passed
        assert run_program("import threading\nt = threading.Thread(target=print, args=('in a thread',))\nt.start()", FAST).output == "in a thread\n"


def test_closing_the_output(namespaces):
    check_failure("import sys\nsys.stdout.close()", namespaces, "ValueError")
    assert run_program("import io, sys\nsys.stdout = io.StringIO()\nprint('x')", FAST, namespaces).passed


def test_time(namespaces):
    short = Limits(seconds=1)
    check_failure("while True: pass", namespaces, "time limit of 1 s", limits=short)
    check_failure("""
        import signal, time
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True:
            try: time.sleep(99)
            except BaseException: pass""", namespaces, "time limit of 1 s", limits=short)
    check_failure("import os, time\nos.closerange(0, 99)\ntime.sleep(99)", namespaces, "time limit of 1 s", limits=short)
    check_failure("import atexit, time\natexit.register(time.sleep, 99)", namespaces, "time limit of 1 s", limits=short)
    check_failure("while True: pass", namespaces, "CPU time limit of 1 s", "killed by SIGKILL", limits=Limits(seconds=9, cpu_seconds=1))


def test_memory(namespaces):
    check_failure("x = bytearray(100 * 10**9)", namespaces, "more than 512 MB of memory")
    check_failure("x = []\nwhile True: x.append(str(len(x)) * 10**6)", namespaces, "more than 512 MB of memory")
    check_failure("def f():\n    x = []\n    while True: x.append([0] * 50)\nf()", namespaces, "more than 128 MB", limits=Limits(memory=128 * 2**20))


def test_output_and_files(namespaces):
    outcome = check_failure("while True: print('x' * 10**6)", namespaces, "too much output")
    assert outcome.output == "x" * 2**16 and outcome.seconds < 2
    check_failure("import os\nwhile True: os.write(2, b'y' * 10**5)", namespaces, "too much output")
    check_failure("f = open('big', 'wb')\nwhile True: f.write(bytes(10**6))", namespaces, "File too large", "No space left")
    if namespaces:
        check_failure("for n in range(99): open(str(n), 'wb').write(bytes(10**6))", namespaces, "No space left", "Too many open")
    assert run_program("open('a', 'w').write('b')\nassert open('a').read() == 'b'", FAST, namespaces).passed
    assert run_program("import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').close()", FAST, namespaces).passed


def test_processes(namespaces):
    check_failure("import os\nwhile True: os.fork()", namespaces, "BlockingIOError", "PermissionError", "time limit")
    check_failure("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", namespaces, "time limit", limits=Limits(seconds=1))
    check_failure("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])", namespaces, "Error")
    check_failure("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(99)
        os._exit(0)""", namespaces, "ended early", "PermissionError")


def test_killing(namespaces):
    alive = subprocess.Popen(["sleep", "60"])
    check_failure("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", namespaces, "PermissionError")
    check_failure(f"import os, signal\nos.kill({os.getpid()}, signal.SIGKILL)", namespaces, "PermissionError", "ProcessLookupError")
    check_failure(f"import os, signal\nos.kill({alive.pid}, signal.SIGKILL)", namespaces, "PermissionError", "ProcessLookupError")
    check_failure("import os\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)", namespaces, "PermissionError", "ProcessLookupError")
    check_failure("import os\nos.killpg(0, 9)", namespaces, "PermissionError", "killed by SIGKILL")
    check_failure("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", namespaces, "killed by SIGSEGV")
    check_failure("import os\nos.abort()", namespaces, "killed by SIGABRT")
    check_failure("import ctypes\nctypes.string_at(0)", namespaces, "killed by SIGSEGV", "PermissionError")
    assert alive.poll() is None
    alive.kill(), alive.wait()


def test_files_outside(namespaces, tmp_path):
    os.chmod(tmp_path, 0o777)
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("three years of work")
    thesis.chmod(0o666)
    errors = "FileNotFoundError", "PermissionError", "Read-only", "Operation not permitted", "Invalid cross-device"
    for code in (f"os.remove({str(thesis)!r})", f"open({str(thesis)!r}).read()", f"open({str(thesis)!r}, 'w')", f"shutil.rmtree({str(tmp_path)!r})",
                 f"os.rename({str(thesis)!r}, 'mine')", f"os.truncate({str(thesis)!r}, 0)", f"os.listdir({str(tmp_path)!r})",
                 f"os.symlink({str(thesis)!r}, 'link'); open('link', 'w')", f"os.link({str(thesis)!r}, 'link'); open('link', 'w')",
                 f"os.mkdir({str(tmp_path / 'new')!r})", f"os.chdir({str(tmp_path)!r}); open('thesis.txt')",
                 f"os.mkfifo({str(tmp_path / 'fifo')!r})", "os.remove(os.__file__)", "open(os.__file__, 'a')",
                 "os.remove('os.py', dir_fd=os.open(os.path.dirname(os.__file__), os.O_RDONLY))",
                 "open('/etc/passwd')", "os.listdir(os.path.expanduser('~/.ssh'))", "open(os.path.expanduser('~/.ssh/id_rsa'))",
                 f"os.listdir({os.path.expanduser('~/.ssh')!r})", "open('/dev/shm/nanochat-test', 'w')", "open('/nanochat-test', 'w')",
                 "import multiprocessing.shared_memory as m; m.SharedMemory('nanochat-test', True, 99)", "open('../../../../../etc/passwd')"):
        check_failure(f"import os, shutil\n{code}", namespaces, *errors, "AttributeError", "ModuleNotFoundError")
    assert thesis.read_text() == "three years of work" and sorted(tmp_path.iterdir()) == [thesis]
    assert Path(os.__file__).exists() and Path(subprocess.__file__).exists()


def test_network(namespaces, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        server.settimeout(0)
        check_failure(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)", namespaces, "OSError", "PermissionError")
        check_failure("import socket\nsocket.create_connection(('192.0.2.1', 80), 1)", namespaces, "OSError", "PermissionError")
        check_failure(f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})", namespaces, "Error")
        if sys.platform == "linux":
            with socket.socket(socket.AF_UNIX) as hidden:
                hidden.bind("\0nanochat-test")
                hidden.listen()
                check_failure("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0nanochat-test')", namespaces, "Refused", "PermissionError")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_environment(namespaces, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "x")
    assert run_program("import os\nassert not os.environ, os.environ", FAST, namespaces).passed
    assert run_program("import os\nassert not os.listdir('.')\nopen('x', 'w').close()", FAST, namespaces).passed
    assert run_program("import os\nassert not os.listdir('.')", FAST, namespaces).passed


def test_no_way_up():
    if sandbox.find_mode() == "guards":
        pytest.skip("this machine allows no namespaces")
    assert run_program("import os\nassert os.getuid() and os.getpid() == 2 and os.getppid() == 1\n"
                       "assert not os.path.exists('/proc') and not os.path.exists('/home')", FAST).passed
    for call in ("libc.unshare(0x10000000)", "libc.unshare(0x20000)", "libc.chroot(b'/tmp')", "libc.setuid(0)",
                 "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)", "libc.umount2(b'/tmp', 2)", "libc.ptrace(16, 1, 0, 0)"):
        assert run_program(f"import ctypes\nlibc = ctypes.CDLL(None)\nassert {call} == -1", FAST).passed, call
    assert run_program("import resource\ntry: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nexcept ValueError: pass\nelse: assert 0", FAST).passed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process when its parent is killed")
def test_it_dies_with_us(namespaces):
    "A program ends when the process that started it is killed."
    code = f"from nanochat.sandbox import *\nrun_program('import time\\ntime.sleep(60)', Limits(seconds=60), {namespaces})"
    before, wanted = leftovers(), 3 if namespaces else 1
    ours = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    end = time.time() + 20
    while len(leftovers() - before) != wanted and time.time() < end:
        time.sleep(0.1)
    time.sleep(0.3)  # the empty program that finds the mode has ended by now
    while len(leftovers() - before) != wanted and time.time() < end:
        time.sleep(0.1)
    assert len(leftovers() - before) == wanted
    ours.kill(), ours.wait()
    end = time.time() + 3
    while leftovers() - before and time.time() < end:
        time.sleep(0.1)
    assert not leftovers() - before
    for path in Path(tempfile.tempdir).glob("nanochat-sandbox-*"):  # nobody was left to remove it, and it is empty
        path.rmdir()


def test_many_at_once(namespaces):
    codes, threads = [f"print({n})\nassert {n} % 3" for n in range(24)], threading.active_count()
    outcomes = run_programs(codes, FAST, namespaces, workers=8)
    assert [o.passed for o in outcomes] == [bool(n % 3) for n in range(24)]
    assert [o.output for o in outcomes] == [f"{n}\n" for n in range(24)]
    assert run_programs([], FAST, namespaces) == []
    if namespaces:  # each program has its own count of processes
        sleeps = "import os, time\nfor _ in range(10):\n    if os.fork() == 0: time.sleep(0.5); os._exit(0)"
        assert all(o.passed for o in run_programs([sleeps] * 4, FAST, workers=4))
    assert threading.active_count() <= threads


def test_a_tiny_time_limit_leaves_nothing(namespaces):
    for milliseconds in range(1, 40, 3):
        run_program("import time\ntime.sleep(9)", Limits(seconds=milliseconds / 1000), namespaces)


def test_protections(namespaces):
    found = protections(namespaces)
    assert found[:2] == ALWAYS and set(found) <= set(ALWAYS + PROBED)
    if sys.platform == "linux":
        assert set(found) == set(ALWAYS + PROBED)
    text = describe_protections(namespaces)
    assert ("guards" in text) is (not namespaces) and all(name in text for name in PROBED)


def test_protections_that_are_lacking_are_named(monkeypatch, tmp_path):
    "The probe must notice when a protection is missing: run it as an ordinary program."

    def bare(code, limits, namespaces):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, cwd=tmp_path).stdout
        return Outcome(True, "", out, 0.0)

    monkeypatch.setattr(sandbox, "PROBE", sandbox.PROBE.replace('check("process limit", forks)', ""))
    monkeypatch.setattr(sandbox, "run_program", bare)
    sandbox.protections.cache_clear()
    assert set(sandbox.protections()) <= {*ALWAYS, "home directory hidden"}  # an empty home hides itself
    sandbox.protections.cache_clear()


def test_a_broken_sandbox_is_no_failure_of_the_program():
    with pytest.raises(SandboxError, match="OSError: unshare"):
        judge(b"\nn broken OSError: unshare\n", "n", 1, FAST)
    if os.geteuid():
        with pytest.raises(SandboxError, match="unshare"):
            launch("", FAST, "root")


@pytest.fixture(scope="module")
def human_eval(real_data):
    import pyarrow.parquet as parquet

    rows = [row for path in real_data.glob("hub/openai/openai_humaneval/**/*.parquet") for row in parquet.read_table(path).to_pylist()]
    assert len(rows) == 164
    return rows


def join(row, solution):
    return f"{row['prompt']}{solution}\n{row['test']}\ncheck({row['entry_point']})"


def test_human_eval_solutions_pass(namespaces, human_eval):
    outcomes = run_programs([join(row, row["canonical_solution"]) for row in human_eval], Limits(seconds=20, cpu_seconds=20), namespaces)
    assert [(row["task_id"], o.reason) for row, o in zip(human_eval, outcomes) if not o.passed] == []


def test_human_eval_without_solutions_fails(namespaces, human_eval):
    outcomes = run_programs([join(row, "    return None\n") for row in human_eval], Limits(seconds=20, cpu_seconds=20), namespaces)
    assert {row["task_id"] for row, o in zip(human_eval, outcomes) if o.passed} == set()


def test_a_machine_where_nothing_runs_says_so(monkeypatch):
    monkeypatch.setattr(sys, "_base_executable", "/bin/false")
    sandbox.find_mode.cache_clear()
    with pytest.raises(SandboxError, match="not even an empty program"):
        sandbox.find_mode()
    sandbox.find_mode.cache_clear()


def test_a_large_program(namespaces):
    assert run_program("x = 1\n" * 200_000, FAST, namespaces).passed


def test_signals_are_named():
    assert judge(b"x", "n", -signal.SIGSEGV, FAST) == judge(b"x", "n", 128 + signal.SIGSEGV, FAST) == ("killed by SIGSEGV", b"x")
    assert judge(b"x\nn passed \n", "n", 0, FAST) == ("", b"x")
    assert judge(b"x\nm passed \n", "n", 0, FAST) == ("ended early", b"x\nm passed \n")
