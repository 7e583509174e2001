"""Stages in kernels of their own: none is left over, and one that is interrupted saves first."""
import os
import signal
import subprocess
import time

import pytest
from conftest import NANOCHAT

from nanochat.common import UserError
from nanochat.pipeline import NOTEBOOKS, Kernels, StageFailed, execute_stage, is_executed, keep_attempt, run_pipeline


def find_kernels(log):
    "Processes whose command line names this log file."
    listed = subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if str(log) in line]


def write_notebook(path, code):
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def test_each_stage_has_a_fresh_kernel_and_none_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "/somewhere")
    log = tmp_path / "kernel.log"
    source = write_notebook(tmp_path / "a.ipynb", "assert 'seen' not in globals()\nseen = 1\nimport sys; assert 'torch' in sys.modules\nprint('base: 3 steps; about 1 s')")
    with Kernels(log, 3) as kernels:
        assert not find_kernels(log)  # nothing loads while a stage rehearses
        for waiting in (1, 1, 0):
            execute_stage(source, tmp_path / "done" / "a.ipynb", {}, kernels)
            assert len(find_kernels(log)) == 1 + waiting and kernels.taken.transport == "ipc"
    assert os.environ["JUPYTER_PATH"] == "/somewhere" and not find_kernels(log)
    with pytest.raises(StageFailed, match="ZeroDivisionError"), Kernels(log, 2) as kernels:
        execute_stage(write_notebook(tmp_path / "b.ipynb", "1 / 0"), tmp_path / "done" / "b.ipynb", {}, kernels)
    assert os.environ["JUPYTER_PATH"] == "/somewhere" and not find_kernels(log)


def test_what_an_attempt_has_left_is_kept(tmp_path):
    log, target = tmp_path / "kernel.log", tmp_path / "done" / "a.ipynb"
    right, wrong = write_notebook(tmp_path / "right.ipynb", "print('right')"), write_notebook(tmp_path / "wrong.ipynb", "print('wrong')\nraise ValueError('two\\nlines')")
    with Kernels(log, 5) as kernels:
        execute_stage(right, target, {}, kernels)
        for _ in range(2):
            with pytest.raises(StageFailed, match=f"wrong.ipynb failed with ValueError: two lines; the executed notebook is {target}$"):
                execute_stage(wrong, target, {}, kernels)
        target.write_text(target.read_text()[:100])  # killed while it was written
        for _ in range(2):
            execute_stage(right, target, {}, kernels)
    attempts = sorted((tmp_path / "done" / "attempts").iterdir())
    assert [path.name for path in attempts] == ["a-1.ipynb", "a-2.ipynb"] and len(attempts[1].read_text()) == 100
    assert "print('wrong')" in attempts[0].read_text() and "print('right')" in target.read_text()
    attempts[0].unlink()  # by hand, to save space: the next one must not take the place of the second
    target.write_text("{")
    keep_attempt(target)
    assert sorted(path.name for path in attempts[0].parent.iterdir()) == ["a-2.ipynb", "a-3.ipynb"] and len(attempts[1].read_text()) == 100


def test_every_stage_that_takes_time_lets_the_next_one_load(demo):
    announced = [line for line in demo.stdout.splitlines() if "; about " in line and line.split(": ")[0] in NOTEBOOKS]
    assert [line.split(": ")[0] for line in announced] == ["tokenizer", "base", "mid", "sft", "eval"], demo.stdout


def test_where_no_socket_can_be_a_kernel_takes_ports(tmp_path, monkeypatch):
    deep = tmp_path / ("a" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with Kernels(tmp_path / "kernel.log", 1) as kernels:
        execute_stage(write_notebook(tmp_path / "a.ipynb", "1 + 1"), tmp_path / "done" / "a.ipynb", {}, kernels)
        assert kernels.taken.transport == "tcp" and is_executed(tmp_path / "done" / "a.ipynb")


def test_a_refused_stage_leaves_no_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="--stages mid"):
        run_pipeline("r", "demo", ["sft", "eval"])
    assert not find_kernels(tmp_path)


def test_ctrl_c_saves_and_leaves_no_kernel(tmp_path):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [NANOCHAT, "run", "--preset", "demo", "--stages", "tokenizer,base", "--set", "base.tokens=20000000", "--set", "base.save_every=1000000",
               "--set", "base.eval_every=1000000", "--set", "base.sample_every=0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("base step"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in rest
    assert list((tmp_path / "runs" / "demo" / "base").glob("step_*")) and not find_kernels(tmp_path), rest
    notebooks = tmp_path / "runs" / "demo" / "notebooks"
    assert is_executed(notebooks / "51_train_tokenizer.ipynb") and not is_executed(notebooks / "52_pretrain.ipynb")
