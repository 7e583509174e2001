"""Are notebooks, package, README, adapters and the generated pages in step?  --write brings all but the notebooks up to date instead."""
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "assignments")]
from list_messages import render_troubleshooting  # noqa: E402
from list_results import render_leaderboard  # noqa: E402
from sources import dump, normalise, render_adapters  # noqa: E402


def render_readme(root: Path) -> str:
    "README.md is the text of nbs/index.ipynb, with links as seen from the root."
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"\]\(((?:labs/)?\d\d_\w+\.ipynb)\)", r"](nbs/\1)", text)
    return text.replace("](../", "](") + "\n"


def write_assignments(root: Path) -> None:
    "Bring the assignments' notebooks into their form, and write adapters.py."
    notebooks = {}
    for path in sorted(root.glob("assignments/source/*/*.ipynb")):
        notebooks[path.stem] = normalise(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(dump(notebooks[path.stem]), encoding="utf-8")
    (root / "assignments" / "adapters.py").write_text(render_adapters(notebooks), encoding="utf-8")


def write(root: Path) -> None:
    "Clean the notebooks, export the package, render the README, the pages that the code makes, and the adapters."
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=root, check=True, capture_output=True)
    (root / "README.md").write_text(render_readme(root), encoding="utf-8")
    (root / "docs" / "troubleshooting.qmd").write_text(render_troubleshooting(root), encoding="utf-8")
    (root / "docs" / "leaderboard.qmd").write_text(render_leaderboard(root), encoding="utf-8")
    write_assignments(root)


def check() -> list[str]:
    "Files that would change."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nanochat"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "_proc", "_site", "course"))
        write(copy)
        files = [*copy.glob("nbs/**/*.ipynb"), *copy.glob("nanochat/*.py"), *copy.glob("assignments/source/*/*.ipynb"), copy / "README.md",
                 copy / "docs" / "troubleshooting.qmd", copy / "docs" / "leaderboard.qmd", copy / "assignments" / "adapters.py"]
        return [str(f.relative_to(copy)) for f in sorted(files) if not filecmp.cmp(f, ROOT / f.relative_to(copy), shallow=False)]


if __name__ == "__main__":
    if "--write" in sys.argv:
        write(ROOT)
    elif out := check():
        print("out of step with the notebooks: " + ", ".join(out) + "; mend it with: make export")
        raise SystemExit(1)
    else:
        print("notebooks, package, README, adapters and the generated pages are in step")
