"""The site without its renderer: pages, links, anchors, figures, spelling, and the program that executes the notebooks."""
import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import build_site  # noqa: E402
import site_filter  # noqa: E402

NOTEBOOKS = sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/labs/*.ipynb")])
PAGES = [*NOTEBOOKS, *sorted(ROOT.glob("docs/*.qmd")), ROOT / "404.qmd", ROOT / "README.md"]
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def read_cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


# What is listed


def listed_pages(contents):
    "The pages of a sidebar, in order."
    for item in contents:
        if isinstance(item, str):
            yield item
        else:
            yield from listed_pages(item["contents"])


def test_every_page_is_listed_once():
    listed = list(listed_pages(CONFIG["website"]["sidebar"]["contents"]))
    assert len(listed) == len(set(listed))
    assert {name_of(path) for path in PAGES} - {"404.qmd", "README.md"} <= set(listed)


@pytest.mark.parametrize("page", list(listed_pages(CONFIG["website"]["sidebar"]["contents"])))
def test_listed_page_exists(page):
    assert (ROOT / page).exists()
    assert any(Path(page).match(pattern) for pattern in CONFIG["project"]["render"]), "no pattern of project.render has it"


def strings(value):
    "Every text in a nested structure."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from strings(part)
    elif isinstance(value, str):
        yield value


def test_every_file_that_the_settings_name_exists():
    settings = {key: value for key, value in CONFIG.items() if key not in ("project", "website")}
    website = {key: value for key, value in CONFIG["website"].items() if key not in ("sidebar", "navbar")}
    named = [text for text in strings([settings, website, CONFIG["project"]["resources"]]) if re.fullmatch(r"[\w./-]+/[\w.-]+\.\w+", text)]
    assert {"docs/site_filter.py", "docs/site.scss", "docs/favicon.svg", "docs/social-card.png"} <= set(named)
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_the_card_has_the_size_that_networks_expect():
    data = (ROOT / "docs/social-card.png").read_bytes()
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 630)


def test_the_site_loads_nothing_from_elsewhere():
    assert "$web-font-path: false" in (ROOT / "docs/site.scss").read_text()
    assert CONFIG["format"]["html"]["html-math-method"] == "mathml"
    for file in ("docs/site.scss", "docs/favicon.svg", "docs/social-card.svg"):
        assert not re.search(r"(@import|url\(|href=)\W*https?:", (ROOT / file).read_text(encoding="utf-8"))


# Links and anchors


MARKDOWN = MarkdownIt("commonmark").enable("table")


def markdown_texts(path):
    "The Markdown of a page; each cell by itself, as in JupyterLab."
    if path.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in read_cells(path) if cell["cell_type"] == "markdown"]
    return [re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.S)]


@functools.cache
def read_tokens(path):
    "The Markdown of a page, parsed."
    return [token for text in markdown_texts(path) for token in MARKDOWN.parse(text)]


def inline_tokens(path):
    "What stands in paragraphs, headings and tables."
    for token in read_tokens(path):
        yield token
        yield from token.children or []


def find_links(path):
    "Targets of links and images."
    for token in inline_tokens(path):
        if token.type in ("link_open", "image"):
            yield token.attrs.get("href") or token.attrs.get("src")
        elif token.type in ("html_block", "html_inline"):
            yield from re.findall(r"""\b(?:href|src)=["']([^"']+)""", token.content)


def plain_text(token):
    "The text of a heading, without its marks."
    return "".join(child.content for child in token.children if child.type in ("text", "code_inline"))


def make_slug(text):
    "A heading's identifier, by Pandoc's rule."
    kept = "".join(c for c in text.lower() if c.isalnum() or c in "_-. \n")
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept.strip())) or "section"


@functools.cache
def find_anchors(path):
    "Identifiers that a link may name."
    anchors, tokens = set(), read_tokens(path)
    for opened, token in zip(tokens, tokens[1:]):
        if opened.type == "heading_open":
            text, own = plain_text(token), re.search(r"\s*\{#([\w.-]+)[^}]*\}\s*$", token.content)
            slug = own[1] if own else make_slug(text)
            count = 0
            while (slug if not count else f"{slug}-{count}") in anchors:
                count += 1
            anchors.add(f"{slug}-{count}" if count else slug)
    for token in inline_tokens(path):
        anchors |= set(re.findall(r"""\bid=["']([^"']+)""", token.content)) if token.type.startswith("html") else set()
        anchors |= set(re.findall(r"\{#([\w.-]+)", token.content)) if token.type == "text" else set()
    return anchors


def test_slugs_are_pandocs():
    # the examples of Pandoc's manual
    assert make_slug("Heading identifiers in HTML") == "heading-identifiers-in-html"
    assert make_slug("Maître d'hôtel") == "maître-dhôtel"
    assert make_slug("Dogs?--in my house?") == "dogs--in-my-house"
    assert make_slug("HTML, S5, or RTF?") == "html-s5-or-rtf"
    assert make_slug("3. Applications") == "applications"
    assert make_slug("33") == "section"


def broken_link(path, link):
    "What is wrong with a link, or None."
    if re.match(r"(https?|mailto):", link) or link.startswith("data:"):
        return None
    file, _, anchor = link.partition("#")
    if re.match(r"localhost", file):
        return None
    target = (path.parent / file).resolve() if file else path
    if not target.exists():
        return f"{link}: no such file"
    if not target.is_relative_to(ROOT):
        return f"{link}: outside of the project"
    if anchor and target in PAGES and anchor not in find_anchors(target):
        return f"{link}: no such heading; there is: {', '.join(sorted(find_anchors(target)))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    assert [trouble for link in find_links(page) if (trouble := broken_link(page, link))] == []


def test_broken_links_are_found():
    page = ROOT / "docs" / "ptolemy.qmd"
    assert "no such file" in broken_link(page, "nothing.qmd")
    assert "no such heading" in broken_link(page, "#nothing")
    assert "outside" in broken_link(page, "../../")
    assert broken_link(page, "../nbs/index.ipynb") is None


def needs_blank_line(text):
    "Lines where a list, a heading, a quotation or a table begins right below a paragraph: Pandoc makes that part of the paragraph."
    lines = text.splitlines()
    for before, token in zip([None, *MARKDOWN.parse(text)], MARKDOWN.parse(text)):
        begins = token.type in ("bullet_list_open", "ordered_list_open", "heading_open", "blockquote_open", "table_open") and token.level == 0
        if begins and before is not None and before.type == "paragraph_close" and lines[token.map[0] - 1].strip():
            yield lines[token.map[0]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_read_the_same_by_pandocs_rules(page):
    assert [line for text in markdown_texts(page) for line in needs_blank_line(text)] == []


def test_missing_blank_lines_are_found():
    assert list(needs_blank_line("A list:\n- one\n- two\n\nText\n# Heading\n")) == ["- one", "# Heading"]
    assert list(needs_blank_line("A list:\n\n- one\n  more\n- two\n  - three\n")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_cross_references_resolve(page):
    known = find_anchors(page)
    if page.suffix == ".ipynb":
        known |= {m for cell in read_cells(page) for m in re.findall(r"^#\| label: ([\w-]+)", "".join(cell["source"]), re.M)}
    used = {m for token in inline_tokens(page) if token.type == "text" for m in re.findall(r"(?<![\w.])@([A-Za-z][\w-]*)", token.content)}
    assert used <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_have_alt_text(page):
    for token in inline_tokens(page):
        if token.type == "image":
            assert token.content.strip() or "fig-alt" in str(token.meta), token.attrs["src"]
        elif token.type.startswith("html"):
            for tag in re.findall(r"<(?:img|svg)\b[^>]*>", token.content):
                assert re.search(r"\b(alt|aria-label)=", tag) or 'aria-hidden="true"' in tag, tag


# Figures, outputs, exercises, spelling

DRAWS = {"subplots", "figure", "imshow", "matshow", "plot", "bar", "barh", "hist", "scatter", "step", "errorbar", "fill_between", "subplot_mosaic", "pcolormesh"}


def call_names(node):
    "What is called in a piece of code, but not inside of functions that it defines."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            yield ("plt." if isinstance(node.func.value, ast.Name) and node.func.value.id == "plt" else ".") + node.func.attr
    for child in ast.iter_child_nodes(node):
        yield from call_names(child)


def body_calls(function):
    return {name for statement in function.body for name in call_names(statement)}


def draws_itself(names):
    return any(name.startswith("plt.") and name[4:] in DRAWS or name in ("Image", "SVG") for name in names)


def find_drawing_functions(trees):
    "Names of functions that draw, by themselves or through others, and show what they drew."
    calls = {node.name: body_calls(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    calls = {name: called for name, called in calls.items() if not called & {"plt.close", ".savefig"}}
    found = {name for name, called in calls.items() if draws_itself(called)}
    while more := {name for name, called in calls.items() if called & found} - found:
        found |= more
    return found


def read_trees(path):
    "The code cells of a notebook, parsed; those with magics left out."
    for cell in read_cells(path):
        if cell["cell_type"] == "code":
            try:
                yield cell, ast.parse("".join(cell["source"]))
            except SyntaxError:
                continue


@functools.cache
def package_trees():
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "nanochat").glob("*.py"))]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=name_of)
def test_cells_that_draw_have_alt_text(page):
    trees = list(read_trees(page))
    drawing = find_drawing_functions([*package_trees(), *(tree for _, tree in trees)])
    missing = []
    for cell, tree in trees:
        called = set(call_names(tree))
        if (draws_itself(called) or called & drawing) and "plt.close" not in called and not site_filter.alt_text(cell):
            missing.append("".join(cell["source"])[:80])
    assert missing == []


@pytest.mark.parametrize("page", NOTEBOOKS, ids=name_of)
def test_notebooks_are_stored_without_outputs(page):
    notebook = json.loads(page.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    assert not [cell["id"] for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=name_of)
def test_no_cell_is_empty(page):
    assert [i for i, cell in enumerate(read_cells(page)) if not "".join(cell["source"]).strip()] == []


@pytest.mark.parametrize("page", sorted(ROOT.glob("nbs/labs/*.ipynb")), ids=name_of)
def test_labs_begin_alike(page):
    first = "".join(read_cells(page)[0]["source"])
    assert re.match(rf"# Lab {int(page.name[:2])}: .+\n\n> .*\n\n", first), first[:60]
    assert "**You need** a trained model: `make run`" in first and "**Takes** " in first


@pytest.mark.parametrize("page", [path for path in NOTEBOOKS if path.name != "index.ipynb"], ids=name_of)
def test_exercises_say_how_hard_and_how_long(page):
    text = "\n\n".join("".join(cell["source"]) for cell in read_cells(page) if cell["cell_type"] == "markdown")
    part = re.search(r"^## Exercises\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if page.parent.name == "labs":
        assert part, "a lab has exercises"
    for item in re.split(r"^(?=\d\. )", part[1] if part else "", flags=re.M)[1:]:
        assert re.match(r"\d\. \((easy|medium|hard), \d+ minutes\b.*?\) ", item), item[:60]
        assert "<details><summary>Hint</summary>" in item, item[:60]


def test_spelling():
    files = subprocess.run(["git", "ls-files", "*.ipynb", "*.qmd", "*.md", "*.py", "*.yml", "*.ini", "Makefile"], cwd=ROOT, capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *files.stdout.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# The program that executes the notebooks, on a small site


def write_notebook(path, *cells):
    "Cells that begin with a heading are text; a cell may have options."
    made = [{"cell_type": "markdown" if text.startswith("# ") else "code", "id": f"c{i}", "metadata": {}, "source": text,
             **({} if text.startswith("# ") else {"outputs": [], "execution_count": None})} for i, text in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


MEET = """import time
from pathlib import Path
Path("{mine}").touch()
end = time.monotonic() + 120
while not Path("{other}").exists() and time.monotonic() < end:
    time.sleep(0.05)
print("{mine} met", Path("{other}").exists())"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A package of three modules and a course of three notebooks, executed once; and what that said."
    root = tmp_path_factory.mktemp("course")
    package = root / "sitemini"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("VALUE = 1\n")
    (package / "high.py").write_text("from .low import VALUE\nTWICE = 2 * VALUE\n")
    (package / "alone.py").write_text("OTHER = 5\n")
    write_notebook(root / "nbs/10_meet.ipynb", "# One\n\n> Says a sentence.", MEET.format(mine="one", other="two"))
    write_notebook(root / "nbs/20_high.ipynb", "#| default_exp high", "# Two", "#| export\nfrom sitemini.high import TWICE",
                   MEET.format(mine="two", other="one"), "print('twice', TWICE)")
    write_notebook(root / "nbs/labs/01_alone.ipynb", "# Lab", "from sitemini.alone import OTHER", "print('other', OTHER)")
    return build_site.Site(root, package="sitemini")


@pytest.fixture
def built(small, capsys):
    "What builds the small site, and says which notebooks it executed and what was wrong."
    def run():
        trouble = build_site.build(build_site.Site(small.root, package="sitemini"))
        return sorted(re.findall(r"^\[\d+/\d+\] (\w+)", capsys.readouterr().out, re.M)), trouble
    return run


def page_text(site, name):
    "A page as the filter makes it."
    path = site.root / "nbs" / name
    return json.dumps(site_filter.make_page(json.loads(path.read_text()), site.cache / "pages", path))


def test_building(small, built, monkeypatch):
    assert built() == (["01_alone", "10_meet", "20_high"], [])
    assert "two met True" in page_text(small, "20_high.ipynb") and "one met True" in page_text(small, "10_meet.ipynb")  # so two at a time
    assert "other 5" in page_text(small, "labs/01_alone.ipynb")
    assert built() == ([], [])
    assert all(json.loads(path.read_text())["cells"][1].get("outputs", []) == [] for path in small.root.glob("nbs/*.ipynb"))

    write_notebook(small.root / "nbs/10_meet.ipynb", "# Another title", '#| fig-alt: "Nothing"\n' + MEET.format(mine="one", other="two"))
    assert built() == ([], [])  # text and options run nothing
    assert "Another title" in page_text(small, "10_meet.ipynb") and "one met True" in page_text(small, "10_meet.ipynb")

    (small.root / "sitemini/low.py").write_text("VALUE = 21\n")  # which 20_high imports through another
    assert built() == (["20_high"], [])
    assert "twice 42" in page_text(small, "20_high.ipynb")

    write_notebook(small.root / "nbs/labs/01_alone.ipynb", "# Lab", "from sitemini.alone import OTHER", "raise ValueError('not today\\nnor tomorrow')")
    write_notebook(small.root / "nbs/10_meet.ipynb", "# One", "print('changed')")
    assert built() == (["01_alone", "10_meet"], ["01_alone failed: ValueError: not today"])
    assert "changed" in page_text(small, "10_meet.ipynb")  # the others went on

    monkeypatch.setattr(build_site, "LARGEST", 300)
    executed, trouble = built()
    assert executed == ["01_alone"]  # only what failed is tried again
    assert trouble[0] == "01_alone failed: ValueError: not today"
    assert [re.sub(r"\d+\.\d MB.*", "", sentence) for sentence in trouble[1:]] == ["20_high.ipynb makes a page of "]


def png_output():
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": "AAAA", "text/plain": "<Figure>"}}


def test_the_builder_names_figures_without_alt_text(tmp_path):
    cell = {"cell_type": "code", "source": "draw()", "outputs": [png_output()]}
    assert build_site.lacks_alt_text({"cells": [cell]})
    assert not build_site.lacks_alt_text({"cells": [cell | {"source": '#| fig-alt: "A line."\ndraw()'}]})
    assert not build_site.lacks_alt_text({"cells": [cell | {"outputs": []}]})


# Figures in the dark


def turn_dark(colour):
    "What the filter of the dark theme makes of a colour, by the formulas of the CSS standard."
    steps = re.search(r"filter: invert\(([\d.]+)\) hue-rotate\(180deg\) brightness\(([\d.]+)\)", (ROOT / "docs/site.scss").read_text())
    part, bright = map(float, steps.groups())
    turned = [part + (1 - 2 * part) * int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    grey = 0.213 * turned[0] + 0.715 * turned[1] + 0.072 * turned[2]
    return [min(1, max(0, bright * min(1, max(0, 2 * grey - c)))) for c in turned]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_of_figures_are_readable_in_the_dark():
    style = (ROOT / "nanochat/course.mplstyle").read_text(encoding="utf-8")
    colours = re.findall(r'"([0-9A-F]{6})"', re.search(r"prop_cycle: (.*)", style)[1])
    page = turn_dark("FFFFFF")
    assert [round(255 * c) for c in page] == [0x22] * 3  # the background of the theme: figures have no frame
    assert len(colours) == 7
    for colour in colours:
        assert (luminance(turn_dark(colour)) + 0.05) / (luminance(page) + 0.05) > 4.5, colour


# The stages


@pytest.fixture
def staged(tmp_path):
    "A course with three stages and a notebook that looks at their run; and what executes stages, which notes which."
    for name in ("51_first", "52_second", "53_third"):
        write_notebook(tmp_path / f"nbs/{name}.ipynb", "# Stage", f"print('{name}')")
    write_notebook(tmp_path / "nbs/60_look.ipynb", "# Look", "runs = list_runs()")
    site, called = build_site.Site(tmp_path, package="sitemini", stages={"a": "51_first", "b": "52_second", "c": "53_third"}), []

    def run_stages(names, fail=None):
        called.append(names)
        run = site.base / "runs" / site.run
        (run / "notebooks").mkdir(parents=True, exist_ok=True)
        for name in names:
            if name == fail:
                raise RuntimeError("the kernel died")
            (run / "notebooks" / f"{site.stages[name]}.ipynb").write_text((tmp_path / "nbs" / f"{site.stages[name]}.ipynb").read_text())
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"stage": name, "kind": "summary"}) + "\n")
    return site, run_stages, called


def stage_names(site):
    return [record["stage"] for record in build_site.read_records(site.base / "runs" / site.run)]


def test_stages_are_executed_from_the_first_that_changed(staged):
    site, run_stages, called = staged
    assert build_site.build_stages(build_site.read_pages(site)[0], site, run_stages) is None
    assert build_site.build_stages(build_site.read_pages(site)[0], site, run_stages) is None
    write_notebook(site.root / "nbs/52_second.ipynb", "# Stage", "print('changed')")
    stages, (look,) = build_site.read_pages(site)
    assert build_site.build_stages(stages, site, run_stages) is None
    assert called == [["a", "b", "c"], ["b", "c"]]
    assert stage_names(site) == ["a", "b", "c"]  # what was taken back is there once
    assert look.needs_run and look.key != build_site.read_page(look.path, site, "another run").key


def test_a_stage_that_fails_keeps_those_before(staged):
    site, run_stages, called = staged
    stages = build_site.read_pages(site)[0]
    assert build_site.build_stages(stages, site, lambda names: run_stages(names, "b")) == "run 'tiny' failed: RuntimeError: the kernel died"
    assert [build_site.is_fresh(page, site) for page in stages] == [True, False, False]
    assert build_site.build_stages(stages, site, run_stages) is None
    assert called == [["a", "b", "c"], ["b", "c"]]


def test_without_a_run_nothing_looks_at_it(staged):
    site, run_stages, called = staged
    trouble = build_site.build(site, lambda names: run_stages(names, "a"))
    assert trouble == ["run 'tiny' failed: RuntimeError: the kernel died", "not executed for lack of a run: 60_look"]


def test_the_course_has_its_stages():
    site = build_site.course_site()
    assert list(site.stages) == ["tokenizer", "base", "mid", "sft", "rl", "eval", "report"]
    assert all((ROOT / "nbs" / f"{name}.ipynb").exists() for name in site.stages.values())
    assert "common" in build_site.reach({"gpt"}, site.imported) and "gpt" not in build_site.reach({"attention"}, site.imported)


# The filter


def run_filter(path):
    "The filter as Quarto calls it: a path relative to the notebook's folder, the notebook on its input."
    done = subprocess.run([sys.executable, Path(*[".."] * (len(path.relative_to(ROOT).parts) - 1)) / "docs/site_filter.py"], cwd=path.parent,
                          input=path.read_text(encoding="utf-8"), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_filter_makes_a_page_of_a_lecture():
    page = run_filter(ROOT / "nbs/20_attention.ipynb")
    cells = ["".join(cell["source"]) for cell in page["cells"]]
    assert page["cells"][0]["cell_type"] == "raw" and cells[0].startswith('---\ntitle: "Attention"\ndescription: "The parts in which')
    assert "`nanochat lab 20_attention`" in cells[-1]
    assert not [line for text in cells for line in text.splitlines() if re.match(r"#\| *(export|exports|default_exp|hide)", line)]
    for cell in page["cells"]:
        options = [line[2:] for line in site_filter.split_options("".join(cell["source"]))[0]]
        assert isinstance(yaml.safe_load("\n".join(options) or "{}"), dict), options  # Quarto reads them as YAML


def test_filter_passes_the_start_page():
    page = run_filter(ROOT / "nbs/index.ipynb")
    assert "title: \"nanochat\"" in "".join(page["cells"][0]["source"])


@pytest.fixture
def quarto(tmp_path, monkeypatch):
    "A stand-in for Quarto, which says what it is told to say."
    def make(message="", code=0):
        program = tmp_path / "bin" / "quarto"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho \"$@ $QUARTO_PYTHON\" > called\necho '{message}' >&2\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "site_filter.py").touch()
    return build_site.Site(tmp_path), make


def test_rendering(quarto):
    site, make = quarto
    make()
    assert build_site.render(site) == 0
    assert (site.root / "called").read_text() == f"render {sys.executable}\n"
    make("WARN: Unable to resolve link target: nothing.ipynb")
    assert build_site.render(site) == 1  # Quarto itself is content with that
    make(code=3)
    assert build_site.render(site) == 3


def test_without_quarto_one_sentence_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_site.render(build_site.Site(tmp_path)) == 0
    assert capsys.readouterr().out == build_site.QUARTO + "\n"


def test_panels_are_shown_by_their_stills():
    live = {"output_type": "display_data", "data": {site_filter.WIDGET: {"model_id": "1"}, "text/html": "<b>still</b>", "text/plain": "still"}}
    assert set(site_filter.clean_output(live)["data"]) == {"text/html", "text/plain"}
    only = {"output_type": "display_data", "data": {site_filter.WIDGET: {"model_id": "1"}, "text/plain": "bar"}}
    assert site_filter.clean_output(only) == only


def test_pages_don_t_show_where_they_were_made():
    output = {"output_type": "stream", "text": f"{ROOT}/.site_cache/base/runs/tiny and {ROOT}/nanochat/gpt.py"}
    assert site_filter.clean_output(output)["text"] == "~/.cache/nanochat/runs/tiny and ~/nanochat/nanochat/gpt.py"


def test_a_command_lists_what_cannot_be_checked_here():
    assert any(line.startswith("https://arxiv.org/abs/1706.03762") for line in build_site.list_links(build_site.Site()))
