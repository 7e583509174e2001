"""`make site`: executes the notebooks that something has changed for, and renders the course.

Executed copies lie in `.site_cache/pages`, each named by the hash of its code. A copy is fresh while its key holds: the code,
the modules of the package that it imports, directly or through others, the versions of what it runs on, and, for a notebook
that looks at a trained model, the run. The stages are executed as one run of the tiny preset, one after another; the other
notebooks afterwards, two at a time.
"""
import argparse
import ast
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

from site_filter import ROOT, alt_text, code_cells, hash_code, make_page, split_options, text_of

LARGEST = 2_000_000  # bytes of a page
SECONDS = {"run": 420.0, "05_scaling": 600.0, "07_ablations": 300.0}  # a guess for what was never executed here; the others take 20
VERSIONS = ("torch", "numpy", "pandas", "matplotlib")  # of what a page depends on beside the package
QUARTO = "Everything is executed; to render it, install Quarto 1.7 or newer from https://quarto.org/docs/download, then: make site"


@dataclass(frozen=True)
class Site:
    "Where everything is; tests have a small one of their own."
    root: Path = ROOT
    package: str = "nanochat"
    run: str = "tiny"  # the run that the stage notebooks make and the labs look at
    stages: dict[str, str] = field(default_factory=dict)  # stage -> name of its notebook, in order
    workers: int = 2

    @property
    def cache(self) -> Path:
        return self.root / ".site_cache"

    @property
    def base(self) -> Path:
        return self.cache / "base"

    @property
    def kept(self) -> Path:
        return self.cache / "seconds.json"

    @cached_property
    def imported(self) -> dict[str, set[str]]:  # module -> modules it imports
        "Who imports whom in the package."
        folder = self.root / self.package
        known = {path.stem for path in folder.glob("*.py")}
        return {name: read_imports((folder / f"{name}.py").read_text(encoding="utf-8"), self.package) & known for name in known}

    @cached_property
    def machine(self) -> str:
        "Versions of what a page is made with, and the package's files that are not Python."
        folder = self.root / self.package
        files = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != ".py") if folder.exists() else []
        return digest([sys.version, *map(importlib.metadata.version, VERSIONS), *(path.read_bytes() for path in files)])


@dataclass(frozen=True)
class Page:
    "A notebook, and what decides whether its executed copy is fresh."
    path: Path
    code: str  # the hash that names the copy
    key: str  # the hash of everything that the outputs depend on
    needs_run: bool = False  # whether that is also the model that the stages train


@dataclass(frozen=True)
class Outcome:
    "What became of a notebook."
    name: str
    seconds: float
    error: str | None = None  # a sentence, if it failed


def digest(parts: Iterable[str | bytes]) -> str:  # 16 characters
    "One hash of many parts."
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:16]


@cache
def read_imports(
    code: str,  # of a module or a cell; one that isn't Python, such as a cell with a magic, imports nothing
    package: str,
) -> frozenset[str]:
    "The modules of the package that are imported, also inside functions."
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError:
        return frozenset()
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == package):
            module = (node.module or "") if node.level else (node.module or "").removeprefix(package).lstrip(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{package}.")}
    return frozenset(found)


def reach(
    names: Iterable[str],
    imported: dict[str, set[str]],  # module -> modules it imports
) -> set[str]:
    "Modules that are imported, directly or through others."
    seen, queue = set(), list(names)
    while queue:
        name = queue.pop()
        if name in imported and name not in seen:
            seen.add(name)
            queue += imported[name]
    return seen


def find_notebooks(site: Site) -> list[Path]:
    "The lectures, then the labs; not the start page, which has no code."
    folder = site.root / "nbs"
    return [*sorted(folder.glob("[0-9]*.ipynb")), *sorted(folder.glob("labs/[0-9]*.ipynb"))]


def looks_at_run(path: Path, code: str) -> bool:
    "Whether the outputs depend on the model that the stages train."
    return path.parent.name == "labs" or bool(re.search(r"\b(find_run|list_runs)\(", code))


def read_page(
    path: Path,
    site: Site,
    before: str,  # the key of the stage before; of the last one for a notebook that looks at the run
    stage: bool = False,
) -> Page:
    "A notebook's hashes."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [split_options(text_of(cell))[1] for cell in code_cells(notebook)]
    needs_run = stage or looks_at_run(path, "\n".join(cells))
    own = re.findall(r"#\| default_exp (\w+)", "\n".join(text_of(cell) for cell in code_cells(notebook)))
    used = reach([*own, *(name for cell in cells for name in read_imports(cell, site.package))], site.imported)
    modules = [(site.root / site.package / f"{name}.py").read_bytes() for name in sorted(used)]
    code = hash_code(notebook)
    return Page(path, code, digest([code, site.machine, before if needs_run else "", *sorted(used), *modules]), needs_run)


def read_pages(site: Site) -> tuple[list[Page], list[Page]]:  # of the stages in order, and of the others
    "All notebooks that are executed."
    stages, before = [], ""
    for name in site.stages.values():
        stages.append(read_page(site.root / "nbs" / f"{name}.ipynb", site, before, stage=True))
        before = stages[-1].key
    others = [path for path in find_notebooks(site) if path.stem not in site.stages.values()]
    return stages, [read_page(path, site, before) for path in others]


def copy_of(page: Page, site: Site) -> Path:
    "Where the executed copy lies."
    return site.cache / "pages" / f"{page.code}.ipynb"


def is_fresh(page: Page, site: Site) -> bool:
    "Whether there is an executed copy that still holds."
    path = copy_of(page, site)
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["metadata"].get("site", {}).get("key") == page.key


def keep_copy(executed: Path, page: Page, site: Site) -> None:
    "Put an executed notebook into the cache, with the key under which it holds."
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    notebook["metadata"]["site"] = {"notebook": page.path.name, "key": page.key}
    target = copy_of(page, site)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(notebook), encoding="utf-8")
    partial.replace(target)


def list_seconds(site: Site) -> dict[str, float]:  # notebook -> what it took last
    "How long everything took."
    return json.loads(site.kept.read_text(encoding="utf-8")) if site.kept.exists() else {}


def keep_seconds(site: Site, name: str, seconds: float) -> None:
    "Remember how long a notebook took."
    site.kept.parent.mkdir(parents=True, exist_ok=True)
    site.kept.write_text(json.dumps(list_seconds(site) | {name: round(seconds, 1)}, indent=0, sort_keys=True), encoding="utf-8")


def estimate(names: Iterable[str], site: Site, workers: int = 1) -> float:  # seconds
    "What these notebooks will take: as long as last time, or a guess."
    times = sorted((list_seconds(site).get(name, SECONDS.get(name, 20.0)) for name in names), reverse=True)
    return max([sum(times) / workers, *times[:1]])


def say(text: str) -> None:
    "One line of progress."
    print(text, flush=True)


def first_sentence(error: BaseException) -> str:
    "An error in one line, without colours."
    name, text = getattr(error, "ename", None) or type(error).__name__, getattr(error, "evalue", None) or str(error)
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return f"{name}: {lines[0] if lines else ''}".rstrip(": ")


def write_kernel(site: Site) -> None:
    "Say that `python3` is the Python of this program, whatever a user has set up by that name."
    folder = site.cache / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}), encoding="utf-8")


def prepare_worker(
    environment: dict[str, str],
    log: str,  # what kernels say of themselves goes into this file, and not between the lines of progress
) -> None:
    "What a worker process does first. The notebooks share the cores, so each has one thread."
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def execute(source: str, target: str, parameters: dict[str, str]) -> Outcome:
    "Run one notebook in a kernel of its own, in its folder. This happens in a worker process."
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import papermill
    logging.disable(logging.WARNING)
    start, path = time.perf_counter(), Path(source)
    try:
        papermill.execute_notebook(source, target, parameters, cwd=str(path.parent), kernel_name="python3", progress_bar=False, log_output=False,
                                   coalesce_streams=True, autosave_cell_every=0, execution_timeout=3600)
        error = check_finished(json.loads(Path(target).read_text(encoding="utf-8")))
    except Exception as caught:  # whatever it is, it is reported and the other notebooks go on  # noqa: BLE001
        error = first_sentence(caught)
    return Outcome(path.stem, time.perf_counter() - start, error)


def check_finished(notebook: dict) -> str | None:  # a sentence, if it wasn't
    "Whether every cell was executed; a kernel that is killed may leave some."
    left = [cell for cell in code_cells(notebook) if split_options(text_of(cell))[1].strip() and not cell["execution_count"]]
    return f"its kernel ended with {len(left)} cells left" if left else None


def build_stages(
    pages: list[Page],
    site: Site,
    run_stages: Callable[[list[str]], None],  # executes stages of the run, and leaves notebooks in the run's folder
) -> str | None:  # a sentence, if it failed
    "Execute the first stage that isn't fresh, and all after it."
    fresh = [is_fresh(page, site) for page in pages]
    if all(fresh):
        return None
    todo, start = list(zip(site.stages, pages, strict=True))[fresh.index(False):], time.perf_counter()
    names, folder = [stage for stage, _ in todo], site.base / "runs" / site.run
    say(f"run {site.run!r}: {', '.join(names)}; about {estimate(['run'], site) / 60:.0f} min for all stages, less for the last ones")
    if len(todo) == len(pages):
        shutil.rmtree(folder, ignore_errors=True)
    for stage in names:
        forget_stage(folder, stage)
    try:
        run_stages(names)
    except Exception as caught:  # noqa: BLE001
        return f"run {site.run!r} failed: {first_sentence(caught)}"
    finally:
        for stage, page in todo:
            if is_recorded(folder, stage):
                keep_copy(folder / "notebooks" / page.path.name, page, site)
    if len(todo) == len(pages):
        keep_seconds(site, "run", time.perf_counter() - start)
    return None


def read_records(run: Path) -> list[dict]:
    "What a run has written down."
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def is_recorded(run: Path, stage: str) -> bool:
    "Whether a stage has come to its end."
    return any(record["stage"] == stage and record["kind"] == "summary" for record in read_records(run))


def forget_stage(run: Path, stage: str) -> None:
    "Take a stage back, as if it had never been."
    shutil.rmtree(run / stage, ignore_errors=True)
    (run / "notebooks" / "kernel.log").unlink(missing_ok=True)
    kept = [json.dumps(record) + "\n" for record in read_records(run) if record["stage"] != stage]
    if (run / "metrics.jsonl").exists():
        (run / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")


def build_others(pages: list[Page], site: Site) -> list[Outcome]:
    "Execute what isn't fresh, some at a time, the longest first."
    known = list_seconds(site)
    todo = sorted((page for page in pages if not is_fresh(page, site)), reverse=True,
                  key=lambda page: known.get(page.path.stem, SECONDS.get(page.path.stem, 20.0)))
    say(f"{len(pages) - len(todo)} notebooks are as they were, {len(todo)} to execute"
        + (f"; about {estimate([page.path.stem for page in todo], site, site.workers) / 60:.1f} min" if todo else ""))
    return list(execute_all(todo, site)) if todo else []


def execute_all(todo: list[Page], site: Site) -> Iterator[Outcome]:
    "Execute notebooks in worker processes, and keep those that succeed."
    work = site.cache / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_kernel(site)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(site.workers, spawn, initializer=prepare_worker, initargs=(settings(site), str(site.cache / "kernels.log"))) as pool:
        waiting = {}
        for page in todo:
            parameters = {"run": site.run} if page.path.parent.name == "labs" and site.stages else {}
            waiting[pool.submit(execute, str(page.path), str(work / f"{page.code}.ipynb"), parameters)] = page
        for count, future in enumerate(as_completed(waiting), 1):
            page, outcome = waiting[future], future.result()
            say(f"[{count}/{len(todo)}] {outcome.name}: {outcome.error or f'{outcome.seconds:.0f} s'}")
            if outcome.error is None:
                keep_copy(work / f"{page.code}.ipynb", page, site)
                keep_seconds(site, outcome.name, outcome.seconds)
            yield outcome
    shutil.rmtree(work, ignore_errors=True)


def page_size(notebook: dict) -> int:  # bytes
    "How large a page is: its text, its code, and its outputs, with pictures as bytes and not as the longer text that JSON needs."
    return sum(len(text_of(cell)) + sum(map(output_size, cell.get("outputs", []))) for cell in notebook["cells"])


def output_size(output: dict) -> int:  # bytes
    "The size of what a page shows of an output: of several forms the richest."
    data = output.get("data", {})
    images = [len(text) * 3 // 4 for kind, text in data.items() if kind in ("image/png", "image/jpeg")]
    texts = [len("".join(text)) for kind, text in data.items() if kind.startswith("text/") or kind == "image/svg+xml"]
    return max(images or texts or [len("".join(output.get("text", output.get("traceback", ""))))])


def lacks_alt_text(notebook: dict) -> bool:
    "Whether a picture was drawn that nobody has described."
    return any(kind.startswith("image/") for cell in code_cells(notebook) if not alt_text(cell)
               for output in cell["outputs"] for kind in output.get("data", {}))


def check_page(page: Page, site: Site) -> Iterator[str]:  # a sentence for each thing that is wrong
    "What only an executed page shows: its size, and its pictures."
    notebook = make_page(json.loads(page.path.read_text(encoding="utf-8")), site.cache / "pages")
    if (size := page_size(notebook)) > LARGEST:
        yield f"{page.path.name} makes a page of {size / 1e6:.1f} MB, and {LARGEST / 1e6:.0f} MB is the most: draw less, or as a picture"
    if lacks_alt_text(notebook):
        yield f"{page.path.name} draws a picture that is not described: give its cell a line #| fig-alt"


def drop_strangers(pages: list[Page], site: Site) -> None:
    "Delete executed copies that no notebook has any more."
    known = {copy_of(page, site) for page in pages}
    for path in (site.cache / "pages").glob("*"):
        if path not in known:
            path.unlink()


def build(
    site: Site,
    run_stages: Callable[[list[str]], None] = lambda names: None,
) -> list[str]:  # a sentence for each thing that is wrong
    "Bring all executed copies up to date."
    stages, others = read_pages(site)
    trouble = [error for error in [build_stages(stages, site, run_stages)] if error]
    ready = [page for page in others if not (trouble and page.needs_run)]
    if len(ready) < len(others):
        trouble.append(f"not executed for lack of a run: {', '.join(page.path.stem for page in others if page.needs_run)}")
    for outcome in build_others(ready, site):
        if outcome.error:
            trouble.append(f"{outcome.name} failed: {outcome.error}")
    for page in [*stages, *others]:
        if copy_of(page, site).exists():
            trouble += check_page(page, site)
    if not trouble:
        drop_strangers([*stages, *others], site)
    return trouble


def settings(site: Site) -> dict[str, str]:
    "Environment of the kernels: files of the site's own, and nothing from a network."
    path = os.pathsep.join(filter(None, [str(site.root), os.environ.get("PYTHONPATH", "")]))
    return {"NANOCHAT_BASE_DIR": str(site.base), "NANOCHAT_PROGRESS": "lines", "NANOCHAT_TEST_DATA": "", "HF_HUB_OFFLINE": "1",
            "JUPYTER_PATH": str(site.cache / "jupyter"), "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": path}


def render(site: Site) -> int:  # exit code
    "Call Quarto, if there is one. It keeps filtered notebooks by the dates of their files, so the filter gets a new one."
    quarto = shutil.which("quarto")
    if quarto is None:
        say(QUARTO)
        return 0
    (site.root / "docs" / "site_filter.py").touch()
    done = subprocess.run([quarto, "render"], cwd=site.root, env={**os.environ, "QUARTO_PYTHON": sys.executable}, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    broken = [line for line in done.stderr.splitlines() if "WARN" in line]  # links that lead nowhere only warn
    return done.returncode or int(bool(broken))


def course_site(run: str = "tiny") -> Site:
    "The site of this course."
    from nanochat.pipeline import NOTEBOOKS

    return Site(run=run, stages=NOTEBOOKS)


def run_course(site: Site) -> Callable[[list[str]], None]:
    "What executes the stages of this course."
    from nanochat.pipeline import run_pipeline

    return lambda names: run_pipeline(site.run, "tiny", names)


def list_links(site: Site) -> list[str]:
    "Every address outside of the site that the pages link to, and where: nobody can check these without a network."
    files = [*(site.root / "nbs").rglob("*.ipynb"), *(site.root / "docs").glob("*.qmd")]
    found = {(link, path.name) for path in files for link in re.findall(r"https?://[^\s)\"'<>\\`]+", path.read_text(encoding="utf-8"))}
    return [f"{link}  {name}" for link, name in sorted(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="notebooks at a time")
    parser.add_argument("--links", action="store_true", help="only list the addresses outside of the site")
    parser.add_argument("--all", action="store_true", help="execute everything, whether or not it has changed")
    arguments = parser.parse_args()
    site = course_site()
    if arguments.links:
        say("\n".join(list_links(site)))
        return 0
    if arguments.all:
        shutil.rmtree(site.cache / "pages", ignore_errors=True)
    os.environ.update(settings(site))
    trouble = build(replace(site, workers=arguments.workers), run_course(site))
    for sentence in trouble:
        say(sentence)
    return 1 if trouble else render(site)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        say("interrupted; what was executed is kept, and make site goes on from there")
        raise SystemExit(130) from None
