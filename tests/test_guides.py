"""What the guides say: commands that exist, numbers that the formulas give, every message and every term in its place."""
import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from list_messages import PHRASES, VERBS, make_table, read_messages, render_troubleshooting, show_cure, split_cure
from typer.main import get_command

from nanochat import jobs
from nanochat.benchmarks import HUB_DATA
from nanochat.cli import _configs, app
from nanochat.common import UserError, format_bytes
from nanochat.costs import GPU_PEAKS, GPU_PRICES, estimate_bytes, flops_per_token, meta_model, predict_run
from nanochat.dataset import CORPORA
from nanochat.gpt import GPTConfig
from nanochat.jobs import bytes_to_write, estimate_memory, list_needs, model_config, read_site, train_configs
from nanochat.mixtures import OTHERS, TASKS
from nanochat.run import PRESETS, SOURCES, STAGES, read_settings

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.qmd"))]
COMMANDS = get_command(app).commands
EVERY = [each for command in COMMANDS.values() for each in (command, *getattr(command, "commands", {}).values())]
UsageError = typer.BadParameter.__base__  # of the click that typer uses, which may be its own
FREE = re.compile(r"[A-Z_]+|.*\$.*|\.\.\.")  # what a reader replaces


def fenced_lines(text: str) -> list[str]:
    "Commands of fenced blocks, without what stands before them on their line."
    lines = [line.strip() for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    return [re.sub(r"^srun .*?(?:\.venv/bin/)?(?=nanochat)|^\.venv/bin/", "", line) for line in lines]


def spans(text: str) -> list[str]:
    "Code within sentences and tables."
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def check_value(option: str, value: str) -> None:
    "Raise what the command would, when a value names something that isn't there."
    if FREE.fullmatch(value):
        return
    known = {"--preset": PRESETS, "--source": SOURCES, "--stages": STAGES, "--from": (*STAGES, *(f"eval:{source}" for source in SOURCES))}
    if option in known:
        assert set(value.split(",")) <= set(known[option]), f"{option} {value}"
    elif option == "--set":
        stage, key, number = re.fullmatch(r"(\w+)\.(\w+)=(.*)", value).groups()
        if not stage.isupper() and FREE.fullmatch(number):
            assert key in _configs()[stage].__dataclass_fields__, value
        elif not stage.isupper():
            read_settings([value], _configs())
    elif option == "--corpus":
        assert value in CORPORA or value.startswith("folder:"), value
    elif option == "--site":
        assert (ROOT / value).exists() or value == "slurm/mine.env", value
    elif option == "--tasks":
        assert set(value.split(",")) <= {"core", *TASKS, *OTHERS, *HUB_DATA}, value


def check_command(line: str, whole: bool) -> None:
    "Raise if a line names a command, an option, a preset, a stage, a setting or a task that isn't there."
    _, name, *arguments = shlex.split(line.replace("...", ""))
    command = COMMANDS[name]
    if name == "bench":
        return
    while arguments and hasattr(command, "commands"):  # such as leaderboard check
        name, *arguments = arguments
        command = command.commands[name]
    if whole:
        command.make_context(name, list(arguments))  # raises for an unknown option and for a missing argument
    known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    for option, value in zip(arguments, [*arguments[1:], ""]):
        if option.startswith("-"):
            assert option in known, f"{name} {option}"
            check_value(option, value)
    if name == "fetch" and arguments and not arguments[0].startswith("-") and not FREE.fullmatch(arguments[0]):
        assert arguments[0] in {"tasks", "core", "words", *CORPORA, *HUB_DATA}, line


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_commands_of_the_guides_exist(path):
    text = path.read_text(encoding="utf-8")
    lines, parts = fenced_lines(text), spans(text)
    for line in lines:
        if line.startswith("nanochat "):
            check_command(line, whole=True)
    for part in parts:
        if part.startswith("nanochat ") and part.split()[1] in COMMANDS:
            check_command(part.split(", ")[0].split(" makes ")[0], whole=False)
        assert not re.match(r"nanochat [a-z]", part) or part.split()[1] in COMMANDS, part
    makefile = (ROOT / "Makefile").read_text()
    for line in (*lines, *parts):
        for target in re.findall(r"^make (\w+)", line):
            assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for setting in re.findall(r"--set ([a-z]+\.\w+=[\w.]+)", text):
        check_value("--set", setting)


def test_the_check_of_commands_sees_mistakes():
    for right, wrong, error, words in (("nanochat run", "nanochat rnu", KeyError, "rnu"),
                                       ("nanochat run --preset tiny", "nanochat run --prest tiny", UsageError, "[Nn]o such option"),
                                       ("nanochat run --preset tiny", "nanochat run --preset tinny", AssertionError, "--preset tinny"),
                                       ("nanochat run --set base.depth=6", "nanochat run --set base.dephts=6", UserError, "no setting 'dephts'"),
                                       ("nanochat run --stages base,mid", "nanochat run --stages base,middle", AssertionError, "base,middle"),
                                       ("nanochat eval --tasks reading", "nanochat eval --tasks readng", AssertionError, "readng"),
                                       ("nanochat fetch gsm8k", "nanochat fetch gsm9k", AssertionError, "gsm9k"),
                                       ("nanochat leaderboard check PATH", "nanochat leaderboard czech PATH", KeyError, "czech"),
                                       ("nanochat export hf PATH", "nanochat export hf", UsageError, None)):
        check_command(right, whole=True)
        with pytest.raises(error, match=words):
            check_command(wrong, whole=True)
    assert fenced_lines("a\n```bash\nsrun --pty .venv/bin/nanochat chat\nmake run\n```\n") == ["nanochat chat", "make run"]
    assert sum(line.startswith("nanochat ") for path in GUIDES for line in fenced_lines(path.read_text())) > 25


def sizes(preset: str) -> tuple[GPTConfig, int, int | None]:
    "The model of a preset, all tokens that it trains on, and the length of a row."
    p = PRESETS[preset]
    base, heads = p["base"], p["base"]["heads"]
    tokens = sum(p[stage].get("tokens") or 0.05 * base["tokens"] for stage in ("base", "mid", "sft"))
    return GPTConfig(p["tokenizer"]["vocab_size"], base["depth"], base["width"], heads, heads, base["context"]), tokens, base.get("row") or None


def tables(path: Path) -> list[list[str]]:
    "All rows of all tables, as texts."
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in path.read_text().splitlines() if line.startswith("|") and "---" not in line]


def shows(text: str, value: float) -> bool:
    "Whether a number in a table, such as 0.2M, 4e14 or 1.3 GB, is a value rounded to the digits it shows."
    digits, power = re.match(r"([\d.]+)(?:e(\d+))?", text).groups()
    unit = 10 ** int(power or 0) * (1e6 if text.endswith("M") else 1)
    return abs(float(digits) * unit - value) <= 0.501 * unit / 10 ** len(digits.partition(".")[2])


def test_rounded_numbers_are_told_from_others():
    assert all(shows(*pair) for pair in (("0.2M", 2.4e5), ("4e14", 3.6e14), ("1.3 GB", 1.26), ("171", 170.6)))
    assert not any(shows(*pair) for pair in (("0.2M", 2.6e5), ("4e14", 3.4e14), ("1.3 GB", 1.2), ("170", 170.6)))


def test_sizes_of_the_laptop_guide_are_the_formulas():
    rows = {row[0]: row for row in tables(ROOT / "docs" / "laptop.qmd") if row[0] in PRESETS}
    assert list(rows) == ["demo", "tiny", "small", "medium", "large"]
    hours = {"tiny": 5 / 60, "small": 0.5, "medium": 4, "large": 24}
    for preset, (_, parameters, operations, _, memory, disk) in rows.items():
        config, tokens, row = sizes(preset)
        flops = tokens * flops_per_token(config, row)
        assert shows(parameters, meta_model(config).num_params()) and shows(operations, flops), preset
        batch = PRESETS[preset]["base"]["device_rows"] * (row or config.context)
        assert shows(memory, 0.7 + sum(estimate_bytes(config, batch).values()) / 1e9), preset  # Python and PyTorch take 0.7 GB
        assert shows(disk, bytes_to_write({"preset": preset}) / 1e9), preset
        assert preset not in hours or abs(flops / 2e11 / 3600 / hours[preset] - 1) < 0.15, preset


def test_hours_and_costs_of_the_machines_guide_are_the_formulas():
    config, tokens, _ = sizes("d20")
    found = tables(ROOT / "docs" / "machines.qmd")
    laptops = [row for row in found if len(row) == 7 and row[0] in PRESETS]
    machines = [row for row in found if re.match(r"\d x \w+", row[0])]
    assert len(laptops) == 4 and len(machines) == 6
    for preset, parameters, trained, operations, *hours in laptops:
        small, all_tokens, row = sizes(preset)
        flops = all_tokens * flops_per_token(small, row)
        assert shows(parameters, meta_model(small).num_params()) and shows(trained, all_tokens) and shows(operations, flops), preset
        assert all(shows(hour, flops / speed / 3600) for hour, speed in zip(hours, (100e9, 200e9, 500e9))), preset
    for machine, rows, memory, hours, dollars, cost in machines:
        count, gpu = machine.split(" x ")
        run = predict_run(config, tokens, int(rows), int(count), GPU_PEAKS[gpu])
        assert shows(hours, run["hours"]) and shows(memory, run["bytes"] / 1e9) and shows(cost, run["hours"] * float(dollars)), machine
        assert float(dollars) == int(count) * GPU_PRICES[gpu], machine
        assert PRESETS["d20"]["base"]["batch_tokens"] % (int(rows) * config.context * int(count)) == 0, machine
    usual = predict_run(config, PRESETS["d20"]["base"]["tokens"], 16, 8, GPU_PEAKS["A100"])
    assert f"our formula says {usual['hours']:.1f} for pretraining alone" in (ROOT / "docs" / "machines.qmd").read_text()
    written = {row[0]: row[1] for row in found if len(row) == 3 and row[0] in PRESETS}
    assert all(shows(text, bytes_to_write({"preset": preset}) / 1e9) for preset, text in written.items()) and len(written) == 3


def test_the_cloud_guide_says_what_the_formulas_say():
    config, _, _ = sizes("d20")
    text, tokens = (ROOT / "docs" / "cloud.qmd").read_text(), PRESETS["d20"]["base"]["tokens"]
    usual, slow, small = (predict_run(config, tokens, rows, 8, GPU_PEAKS["H100"], part) for rows, part in ((16, 0.45), (16, 0.35), (8, 0.45)))
    assert f"| pretraining | {usual['hours']:.1f} |" in text and f"takes {slow['hours']:.1f} hours instead of {usual['hours']:.1f}" in text
    assert f"{usual['tokens_per_second'] / 1e6:.2f} million tokens a second" in text
    assert f"needs {usual['bytes'] / 1e9:.0f} GB" in text and f"computes the same in {small['bytes'] / 1e9:.0f} GB" in text
    assert f"{bytes_to_write({'preset': 'd20'}) / 1e9:.0f} GB for what the run writes" in text and any("fineweb" in need.name for need in list_needs({"preset": "d20"}))
    assert f"from {usual['bytes'] / 1e9:.0f} GB a GPU to {small['bytes'] / 1e9:.0f}" in (ROOT / "docs" / "_troubleshooting.md").read_text()


def test_hours_and_dollars_of_a_rented_machine_are_the_same_everywhere():
    rows = [row[1].split(" to ") for row in tables(ROOT / "docs" / "cloud.qmd") if re.match(r"[\d.]+( to [\d.]+)?$", row[1])]
    assert len(rows) == 4
    hours = [sum(float(row[end]) for row in rows) for end in (0, -1)]
    span = f"{hours[0]:.1f} to {hours[1]:.1f} hours"
    dollars = "${:.0f} to ${:.0f}".format(*(5 * round(8 * GPU_PRICES["H100"] * h / 5) for h in hours))
    cloud, index = ((ROOT / path).read_text(encoding="utf-8") for path in ("docs/cloud.qmd", "nbs/index.ipynb"))
    assert span in cloud and span in index and dollars in cloud and dollars in index, (span, dollars)
    assert f"at {8 * GPU_PRICES['H100']:.0f} dollars an hour" in cloud


def test_the_guide_to_the_cluster_quotes_the_memory_that_the_check_finds():
    choices = {"preset": "d20", "settings": {"base": {"device_rows": 32}}}
    cfg = next(cfg for cfg in train_configs(choices) if cfg.STAGE == "base")
    needed = estimate_memory(cfg, model_config(choices), 8, "cuda", cfg.device_rows)
    assert f"`base needs {format_bytes(needed)} with {cfg.device_rows} rows on each device`" in (ROOT / "docs" / "ptolemy.qmd").read_text()


def test_times_of_the_presets_are_those_of_the_guide():
    said = dict(re.findall(r'^    "(\w+)": \{  # .*?, ([\w ]+)$', (ROOT / "nanochat" / "run.py").read_text(), re.M))
    for row in tables(ROOT / "docs" / "laptop.qmd"):
        if row[0] in said:
            words = {"4 hours": "four hours"}.get(row[3], row[3])
            assert said[row[0]].removeprefix("about ") == words, row[0]
    assert {"small", "medium", "large"} <= set(said)


def test_the_page_of_messages_is_the_packages():
    assert (ROOT / "docs" / "troubleshooting.qmd").read_text(encoding="utf-8") == render_troubleshooting(ROOT), "make export"


def test_every_error_of_every_module_is_found():
    for path in sorted((ROOT / "nanochat").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError" and isinstance(node.args[0], ast.JoinedStr | ast.Constant):
                texts = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) > 8]
                assert not texts or any(max(texts, key=len).strip() in message for message in read_messages(path)), f"{path.name}: {texts}"


def read_texts(path: Path) -> list[str]:
    "All texts of a module's source, with ... for what is filled in."
    def join(node: ast.expr) -> str:
        return "".join(str(value.value) if isinstance(value, ast.Constant) else "..." for value in node.values)
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return [join(node) if isinstance(node, ast.JoinedStr) else node.value for node in nodes if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)]


def continues(words: list[str], said: list[str]) -> bool:
    "Whether the words are those that `said` begins with; a ... on either side stands for values, in `said` for at most two words."
    if not words or words == ["..."]:
        return True
    if words[0] == "...":
        return any(continues(words[1:], said[n:]) for n in range(1, len(said)))
    if not said:
        return False
    if "..." in said[0]:
        filled = re.escape(said[0]).replace(re.escape("..."), ".*")
        return any(re.fullmatch(filled, " ".join(words[:n])) and continues(words[n:], said[1:]) for n in (1, 2))
    return words[0] == said[0] and continues(words[1:], said[1:])


def occurs(cell: str, text: str) -> bool:
    "Whether a text can be what a cell says a part of: the words in their order, and no more of them filled in than half."
    words, said = ([word.strip(",;:") for word in each.split()] for each in (cell, text))
    own = [word for word in words if word != "..."]
    return 2 * sum(word in said for word in own) >= len(own) and any(continues(words, said[n:]) for n in range(len(said)))


def test_messages_of_the_cluster_guide_are_the_packages(monkeypatch):
    monkeypatch.setenv("USER", "student")
    site, wide = read_site(ROOT / "slurm" / "ptolemy.env"), {"preset": "d20", "settings": {"base": {"device_rows": 32}}}
    times = jobs.check_speed({"preset": "d20"}, site, probe=False)
    monkeypatch.setattr("nanochat.common.get_device", lambda name="auto": torch.device("cuda", 0))
    monkeypatch.setattr(jobs, "device_memory", lambda device: 80 * 10**9)
    with pytest.raises(UserError) as error:
        jobs.check_memory(wide, site)
    texts = [text for path in sorted((ROOT / "nanochat").glob("*.py")) for text in read_texts(path)]
    table = (ROOT / "docs" / "ptolemy.qmd").read_text(encoding="utf-8").partition("## What a message means")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(cells) > 15
    for cell in cells:
        for words in re.findall(r"`(.+?)`", cell):
            if re.search(r"\d (min|GB)|^about$", words):
                assert words in times or words in str(error.value), words  # a number that a function gives
            elif "PENDING" not in words:  # that is Slurm's
                assert any(occurs(words, text) for text in texts), words


def test_words_of_a_message_are_found_with_values_in_it():
    text = "...; ... shows ... GPUs, and SITE_GRES=... asks for ...: correct ..."
    assert occurs("shows 4 GPUs, and SITE_GRES=... asks for 8", text) and occurs("SITE_GRES=gpu:a100:8 asks for", text) and occurs("n1 shows 4 GPUs", text)
    assert not occurs("shows 4 GPUs, and SITE_GPUS=... asks for 8", text) and not occurs("no such node", text) and not occurs("shows 4 GPUs asks for 8", text)


NAMED = re.compile(r"(?:^|[:;,?] |`|\b(?:with|and|or) )nanochat ([a-z][\w-]*)((?: (?:--)?[\w.:=/-]+)*)")  # where a message says what to type


def test_commands_in_messages_exist():
    options = {option for command in EVERY for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "--install"}  # the last one is wsl's
    found = 0
    for path in sorted((ROOT / "nanochat").glob("*.py")):
        for message in read_messages(path):
            for name, arguments in NAMED.findall(message):
                assert name in COMMANDS, message
                known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
                assert {word for word in arguments.split() if word.startswith("--")} <= known, message
                found += 1
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", message)) <= options, message
            for setting in re.findall(r"--set ([a-z]+)\.(\w+)=", message):
                assert setting[1] in _configs()[setting[0]].__dataclass_fields__, message
    assert found > 50
    assert [name for name, _ in NAMED.findall("this nanochat reads no nanochat models: nanochat fetsh gsm8k, or nanochat lm-eval, with nanochat run --set a.b=1")] == ["fetsh", "lm-eval", "run"]


def test_messages_are_read_as_they_are_said(tmp_path):
    source = '''
ADVICE = "the thread has ended: start it again"
class A:
    def advise(self, reason):
        "What to say."
        return f"stopped, {reason}; go on from {self.where}: nanochat run"
    def work(self, path, error, items):
        raise UserError(f"{path / 'x'} has {len(items)} item{'s' * (len(items) > 1)} ({error}): delete it")
        raise UserError(f"a task has {'no questions' if items else 'no answers'}, and {min(items)!r} is unknown; choose from {', '.join(items)}")
        raise UserError(self.advise(f"rank {self.ranks.world} is sick"))
        raise UserError(error)
        raise ApiError(503, ADVICE)
        raise UserError(f"too fast: --set {self.stage}.lr_scale={0.5 * self.cfg.lr_scale:g}")
'''
    (tmp_path / "a.py").write_text(source)
    assert read_messages(tmp_path / "a.py") == [
        "PATH has N item (REASON): delete it", "a task has no questions, and ITEMS is unknown; choose from ...", "a task has no answers, and ITEMS is unknown; choose from ...",
        "stopped, rank WORLD is sick; go on from WHERE: nanochat run", "503 the thread has ended: start it again",
        "too fast: --set STAGE.lr_scale=N"]
    assert split_cure("PATH has N item (REASON): delete it") == ("PATH has N item (REASON)", "delete it") and split_cure("all is lost") == ("all is lost", "")


def test_advice_is_shown_as_a_sentence_with_commands():
    assert show_cure("delete it, and nanochat fetch NAME") == "Delete it, and `nanochat fetch NAME`."
    assert show_cure("use more text, or --vocab-size N") == "Use more text, or `--vocab-size N`."
    assert show_cure("nanochat run --preset tiny --run NAME makes it") == "`nanochat run --preset tiny --run NAME` makes it."
    assert show_cure("slurm/example.env shows how") == "slurm/example.env shows how." and show_cure("") == ""


def test_advice_begins_with_words_that_messages_use():
    cures = [split_cure(message)[1] for path in (ROOT / "nanochat").glob("*.py") for message in read_messages(path)]
    assert [words for words in (*VERBS, *PHRASES) if not any(cure.startswith(words) for cure in cures)] == [], "no message's advice begins so: take it out of docs/list_messages.py"


def test_a_message_without_an_answer_and_an_answer_without_a_message_are_refused(tmp_path):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "a.py").write_text("raise UserError('all is lost')\n")
    assert make_table(["a"], {"is lost": "Begin again."}, tmp_path).endswith("| `all is lost` | Begin again. |")
    with pytest.raises(ValueError, match="says nothing about 'all is lost'"):
        make_table(["a"], {}, tmp_path)
    with pytest.raises(ValueError, match="never say"):
        make_table(["a"], {"is lost": "Begin again.", "is found": "Stop."}, tmp_path)


EMPHASIS = {"before", "batch", "sum", "mean", "same", "first", "whole", "exactly", "centred", "in the whole batch", "the last one is for validation", "samples", "mask", "pad", "stream",
            "gradients", "activations", "weights", "causal", "shards", "row groups", "n-grams"}  # not terms, or listed in another form


def read_glossary() -> list[tuple[str, str, str]]:
    "Terms, what they mean, and where they are introduced."
    return re.findall(r"^\*\*(.+?)\*\*: (.+?) \[(?:lab )?\d+\]\(\.\./nbs/(\S+)\.ipynb\)$", (ROOT / "docs" / "glossary.qmd").read_text(), re.M)


def test_the_glossary_is_in_order_and_complete():
    entries = read_glossary()
    terms = [re.sub(r"[^a-z0-9]", "", term.lower()) for term, _, _ in entries]
    assert terms == sorted(terms) and len(set(terms)) == len(terms) > 100
    assert len(re.findall(r"^\*\*", (ROOT / "docs" / "glossary.qmd").read_text(), re.M)) == len(entries)
    assert all(len(meaning.split()) < 45 for _, meaning, _ in entries)
    assert all(place.startswith("labs/") or (ROOT / "nbs" / f"{place}.ipynb").exists() for _, _, place in entries)
    known = {form for term, _, _ in entries for form in (term.lower(), f"{term.lower()}s")}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")
        for term in re.findall(r"\*\*([a-z][\w' -]{2,30})\*\*", text):
            assert term in EMPHASIS or term in known, f"{path.name}: add {term!r} to docs/glossary.qmd, or to EMPHASIS here if it isn't a term"


def bold_terms(path: Path) -> set[str]:
    "What a notebook prints in bold, where it introduces it."
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")
    return {term.lower().strip(".:") for term in re.findall(r"\*\*([^*\n]+)\*\*", text)}


def test_the_glossary_leads_to_where_a_term_is_introduced():
    bold = {str(path.relative_to(ROOT / "nbs").with_suffix("")): bold_terms(path) for path in sorted((ROOT / "nbs").glob("**/[0-9]*.ipynb"))}
    late, told = [], 0
    for term, _, place in read_glossary():
        short = re.sub(r" \(.*", "", term.lower())
        names = {short, *short.split(", "), *re.findall(r"\((.+?)\)", term.lower())}
        places = [name for name, terms in bold.items() if terms & {form for name in names for form in (name, name + "s")}]
        told += bool(places)
        if places and place > places[0]:  # earlier is well: some notebooks introduce a term without bold type
            late.append(f"{term} leads to {place}, and {places[0]} introduces it")
    assert late == [] and told > 25
