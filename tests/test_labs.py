"""The labs run from top to bottom on any run; here on a small one, with little to train."""
from pathlib import Path

import papermill
import pytest

LABS = Path(__file__).resolve().parent.parent / "nbs" / "labs"
SMALL = {
    "05_scaling": {"widths": [8, 12, 16, 24], "tokens": 16_384, "held_out": 30, "resamples": 10},
    "07_ablations": {"steps": 4, "seeds": [0, 1], "width": 32, "held_out": 16, "eval_every": 2},
    "09_machines": {"new_tokens": 8},
}  # lab -> parameters that make it take seconds; the others take seconds anyway


@pytest.mark.parametrize("lab", sorted(path.stem for path in LABS.glob("[0-9]*.ipynb")))
def test_lab(lab, demo_run, tmp_path):
    papermill.execute_notebook(LABS / f"{lab}.ipynb", tmp_path / "out.ipynb", {"run": demo_run.name, **SMALL.get(lab, {})}, cwd=LABS, progress_bar=False)


def test_small_parameters_are_of_labs_that_exist():
    assert set(SMALL) <= {path.stem for path in LABS.glob("[0-9]*.ipynb")}
