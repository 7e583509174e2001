"""Are notebooks, package and README in step?  --write brings package and README up to date instead."""
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def render_readme(root: Path) -> str:
    "README.md is the text of nbs/index.ipynb, with links as seen from the root."
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"\]\((\d\d_\w+\.ipynb)\)", r"](nbs/\1)", text).replace("](../", "](") + "\n"


def write(root: Path) -> None:
    "Clean the notebooks, export the package, render the README."
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=root, check=True, capture_output=True)
    (root / "README.md").write_text(render_readme(root), encoding="utf-8")


def check() -> list[str]:
    "Files that would change."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nanochat"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "_proc", "_site"))
        write(copy)
        files = [*copy.glob("nbs/**/*.ipynb"), *copy.glob("nanochat/*.py"), copy / "README.md"]
        return [str(f.relative_to(copy)) for f in sorted(files) if not filecmp.cmp(f, ROOT / f.relative_to(copy), shallow=False)]


if __name__ == "__main__":
    if "--write" in sys.argv:
        write(ROOT)
    elif out := check():
        print("out of step with the notebooks: " + ", ".join(out) + "; mend it with: make export")
        raise SystemExit(1)
    else:
        print("notebooks, package and README are in step")
