"""Is everything here that an assignment needs?  `python check_environment.py` says so, and needs nothing installed itself."""
import importlib
import sys
from pathlib import Path

MADE_WITH = ""  # the version of nanochat that this assignment was made with; `make release` fills it in
COURSE = "https://github.com/nanochat/nanochat"
HERE = Path(__file__).resolve().parent


def find_version(
    package: str,
    module: str,  # of the package
) -> str:  # "" if it isn't here
    "A package's version, if the module can be imported."
    try:
        from importlib.metadata import version

        importlib.import_module(module)
        return version(package)
    except Exception:  # a package that is here and broken may raise anything
        return ""


def list_needs() -> list:  # of (name, what was found, whether that will do, what mends it)
    "What an assignment needs."
    python, ours = ".".join(map(str, sys.version_info[:3])), find_version("nanochat", "nanochat")
    needs = [("Python", python, sys.version_info >= (3, 10), "install Python 3.12 from python.org, then in the directory nanochat: make setup PYTHON=python3.12")]
    if not ours:
        return [*needs, ("nanochat", "", False, f"git clone {COURSE} && cd nanochat && make setup")]  # that brings the others, too
    new = MADE_WITH in ("", ours) and bool(find_version("nanochat", "nanochat.examine"))
    needs.append(("nanochat", ours if new else f"{ours}, another than the {MADE_WITH or 'newest'} of this assignment", new, "in the directory nanochat: git pull && make setup"))
    for name in ("torch", "jupyterlab", "pytest"):
        found = find_version(name, name)
        needs.append((name, found, bool(found), f"{sys.executable} -m pip install {name}"))
    return needs


def main() -> int:  # exit code: 0 if everything is here
    "Print what is here, and how to mend what isn't."
    needs = list_needs()
    print(f"This is the Python of {sys.executable}\n")
    for name, found, fine, mend in needs:
        print(f"  {'ok' if fine else 'no'}  {name:<11} {found or 'is not here'}")
        if not fine:
            print(f"      {mend}")
    notebooks = [path.name for path in HERE.glob("a[0-9]-*.ipynb")]
    if all(fine for _, _, fine, _ in needs):
        print(f"\nEverything is here. Begin with: {sys.executable} -m jupyter lab {' '.join(notebooks)}".rstrip())
        return 0
    print("\nMend it from top to bottom, and look again with the Python that nanochat is installed in:")
    print(f"  path/to/nanochat/.venv/bin/python {Path(__file__).name}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
