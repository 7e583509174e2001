"""What Quarto runs on each notebook: from the source to the page. It reads a notebook from its input, in the notebook's folder.

The sources hold no outputs. Those come from the copy that `build_site.py` executed, which is found by a hash of the code,
so that text may be changed without running anything again.
"""
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / ".site_cache" / "pages"
PLACES = {f"{ROOT}/.site_cache/base": "~/.cache/nanochat", str(ROOT): "~/nanochat"}  # what a page shows of the machine that made it
OPTION = re.compile(r"#\|\s*([\w-]+)(:\s.*)?$")  # `#| fig-alt: text` is Quarto's, `#| export` is nbdev's
WIDGET = "application/vnd.jupyter.widget-view+json"  # needs a kernel, or scripts from elsewhere; our panels bring a still as HTML


def text_of(cell: dict) -> str:
    "The source of a cell, which a file may keep as a list of lines."
    return "".join(cell["source"])


def split_options(source: str) -> tuple[list[str], str]:  # lines that begin with #|, and the rest
    "Take the options off a cell's code."
    lines = source.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    return lines[:count], "\n".join(lines[count:])


def code_cells(notebook: dict) -> list[dict]:
    "The cells that a kernel sees, without those that papermill put in."
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and "injected-parameters" not in c.get("metadata", {}).get("tags", [])]


def hash_code(notebook: dict) -> str:
    "What a notebook executes, in sixteen characters; text and options don't count."
    code = [split_options(text_of(cell))[1].strip() for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps([part for part in code if part]).encode()).hexdigest()[:16]


def alt_text(cell: dict) -> str | None:
    "What a cell's figure shows, in words."
    found = [m[2] for line in split_options(text_of(cell))[0] if (m := OPTION.match(line)) and m[1] == "fig-alt" and m[2]]
    return found[0].strip(": ") if found else None


def clean_output(output: dict) -> dict:
    "An output without the places of this machine, and without the live half of a panel if it has a still one."
    text = json.dumps(output)
    for place, shown in PLACES.items():
        text = text.replace(place, shown)
    output = json.loads(text)
    if WIDGET in output.get("data", {}) and "text/html" in output["data"]:
        output = output | {"data": {kind: data for kind, data in output["data"].items() if kind != WIDGET}}
    return output


def add_outputs(notebook: dict, executed: dict) -> None:
    "Give each code cell what the same cell of an executed copy printed and drew."
    done = [cell for cell in code_cells(executed) if split_options(text_of(cell))[1].strip()]
    mine = [cell for cell in code_cells(notebook) if split_options(text_of(cell))[1].strip()]
    for cell, other in zip(mine, done, strict=True):
        cell["outputs"] = [clean_output(output) for output in other["outputs"]]
        cell["execution_count"] = other["execution_count"]


def rewrite_options(cell: dict) -> bool:  # whether the cell is shown at all
    "Drop nbdev's directives; code that is exported without being part of the story is folded."
    options, code = split_options(text_of(cell))
    found = [OPTION.match(line) for line in options]
    kept = [m[0] for m in found if m and m[2]]
    if any(m and m[1] == "export" and not m[2] for m in found):
        kept += ["#| code-fold: true", '#| code-summary: "Code of the package"']
    cell["source"] = "\n".join([*kept, code])
    return bool(code.strip())


def last_change(path: Path) -> str | None:  # 2026-01-31, or None outside of git
    "When a file was last committed."
    try:
        done = subprocess.run(["git", "log", "-1", "--format=%cs", "--", path.name], cwd=path.parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def front_matter(notebook: dict, path: Path | None) -> dict | None:  # a raw cell; None: there is no title
    "Title, description and date, taken from the heading and the quoted sentence below it."
    first = next((cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"), None)
    match = first and re.match(r"# (.+)\n+(?:> (.+)\n*)?", text_of(first) + "\n")
    if not match:
        return None
    first["source"] = text_of(first)[match.end():]
    fields = {"title": match[1], "description": match[2], "date-modified": last_change(path) if path else None}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    return {"cell_type": "raw", "metadata": {}, "source": "\n".join(["---", *lines, "---"])}


def find_source(notebook: dict, folder: Path) -> Path | None:
    "The file that holds these cells."
    sources = [text_of(cell) for cell in notebook["cells"]]
    for path in sorted(folder.glob("*.ipynb")):
        if [text_of(cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]] == sources:
            return path
    return None


def make_page(
    notebook: dict,  # a source, without outputs; it is changed
    pages: Path = PAGES,  # executed copies, each named by the hash of its code
    path: Path | None = None,  # the file it came from
) -> dict:
    "The notebook that Quarto renders."
    executed = pages / f"{hash_code(notebook)}.ipynb"
    if executed.exists():
        add_outputs(notebook, json.loads(executed.read_text(encoding="utf-8")))
    elif code_cells(notebook):
        print(f"{path.name if path else 'a notebook'} has not been executed: make site", file=sys.stderr)
    title = front_matter(notebook, path)
    if path and path.name != "index.ipynb":
        where = f"[In JupyterLab: `nanochat lab {path.stem}`.]{{.open-in}}"
        notebook["cells"].append({"cell_type": "markdown", "metadata": {}, "source": where})
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["cell_type"] != "code" or rewrite_options(cell)]
    if title:
        notebook["cells"].insert(0, title)
    for i, cell in enumerate(notebook["cells"]):
        cell |= {"id": f"cell-{i}", "source": text_of(cell).splitlines(keepends=True)}
    return notebook


if __name__ == "__main__":
    source = json.load(sys.stdin)
    json.dump(make_page(source, PAGES, find_source(source, Path.cwd())), sys.stdout)
