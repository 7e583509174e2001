"""docs/troubleshooting.qmd: its prose is docs/_troubleshooting.md, its messages are the package's own, read from the source."""
import ast
import html
import itertools
import re
from pathlib import Path

RAISED = {"UserError", "DamagedCheckpoint", "StageFailed", "SandboxError", "ApiError", "RuntimeError", "warnings.warn"}
PARTS = {"export", "web"}  # modules whose ValueErrors become the answer to a request, or a part of a sentence
WORDS = (("STAGE", r"\bSTAGE\b|self\.stage"), ("RUN", r"\brun\.name\b|cfg\.run\b"), ("PROCESS", r"pread"), ("N", r"error\.(start|object)|^len\(|//| [*+-] \d|\d \*| \+ |MAX_|\bsize\b"),
         ("TEXT", r"SITE_MAIL"), ("EXECUTABLE", r"sys\.executable"), ("...", r"join\(|\bknown\b"), ("REASON", r"error|reason|failure|problem|damage|sentence"), ("PATH", r"path|file|folder|place|shard\b|base_dir|clone|target|metrics|^meta$|^index$"))
SILENT = re.compile(r"'[^']*'|\[[^\]]*\]|\b(str|repr|list|tuple|min|self|cfg|config|model|name|shape)\b")  # what names no value


def name_value(node: ast.expr) -> str:
    "A word in capitals for a value that stands in a message."
    text = ast.unparse(node.body if isinstance(node, ast.IfExp) else node)
    if asked := re.search(r"\.get\('(?!SITE)(\w+)'\)", text):
        return asked[1].upper()
    for word, pattern in WORDS:
        if re.search(pattern, text):
            return word
    names = re.findall(r"[A-Za-z_]\w*", SILENT.sub("", text))
    word = names[-1].upper() if names else "NAME" if "name" in text else "N"
    return word[:-1] if re.fullmatch(r"\w+S\[\d\]", text.upper()) else word


def is_plural(node: ast.expr) -> bool:
    "Whether this is an s, or none."
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)


def render(node: ast.expr, known: dict[str, str]) -> list[str]:
    "The texts that an expression may give."
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [text for part in (node.body, node.orelse) for text in render(part, known) if text and text != ", ..."] or [""]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*(render(value, known) for value in node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in render(node.left, known) for b in render(node.right, known)]
    if is_plural(node):
        return [""]
    if isinstance(node, ast.FormattedValue):
        worded = isinstance(node.value, ast.IfExp) and isinstance(node.value.body, ast.Constant | ast.JoinedStr) or is_plural(node.value)
        return render(node.value, known) if worded else [known.get(ast.unparse(node.value)) or name_value(node.value)]
    return [known.get(ast.unparse(node), "")]


def read_names(tree: ast.Module) -> tuple[dict[str, str], dict[str, ast.expr]]:
    "A module's constant texts, and what its functions and errors make of a reason."
    known, sayings = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            known |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name) and target.id.isupper()}
        if isinstance(node, ast.FunctionDef) and node.name == "advise":
            sayings["advise"] = next(n.value for n in ast.walk(node) if isinstance(n, ast.Return))
        if isinstance(node, ast.ClassDef) and node.name == "DamagedCheckpoint":
            sayings[node.name] = next(n.args[0] for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("__init__"))
    return known, sayings


def read_messages(file: Path) -> list[str]:
    "What one module can say when something is wrong, in the order of its lines."
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known, sayings = read_names(tree)
    kinds = RAISED | ({"ValueError"} if file.stem in PARTS else set())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in kinds and n.args]
    found: list[str] = []
    for call in sorted(calls, key=lambda n: n.lineno):
        args, kind = call.args, ast.unparse(call.func)
        if kind == "DamagedCheckpoint":
            texts = render(sayings[kind], {"self.what": " ".join(render(a, {})[0] or "FILE" for a in args[1:])})
        elif isinstance(args[0], ast.Call) and ast.unparse(args[0].func).endswith("advise"):
            texts = render(sayings["advise"], {"reason": render(args[0].args[0], {})[0]})
        else:
            texts = render(args[1] if kind == "ApiError" else args[0], known)
            if kind == "ApiError":
                texts = [f"{args[0].value} {text}" for text in texts if text and isinstance(args[0], ast.Constant)]
        found += [re.sub(r"REASON:? REASON", "REASON", " ".join(text.split())) for text in texts if re.search(r"[a-z]{2}", text)]
    return list(dict.fromkeys(found))


# Advice begins with what is to be typed, with what is to be done, or with one of a few phrases.
TYPED = r"nanochat |--[a-z]|[A-Z_]{6,}=|chmod |pip |cd |slurm/|EXECUTABLE "
VERBS = ("add build check choose convert copy correct delete don't export fetch follow free give go install leave look make name open put read remove repair restore run score see"
         " shorten start submit train try use wait").split()
PHRASES = ("a copy elsewhere", "another cluster", "each line above", "its own message", "its terminal", "more of", "on a machine with", "one a line", "the same command",
           "the server's terminal")
CURE = re.compile(rf"[:;?] (?={TYPED}|(?:{'|'.join(VERBS)})[ :]|{'|'.join(PHRASES)})")


def split_cure(message: str) -> tuple[str, str]:
    "What is wrong, and what the message itself says to do about it: `wrong: advice`, where there may be more than one colon."
    match = CURE.search(message)
    return (message[:match.start()] + ("?" if match[0][0] == "?" else ""), message[match.end():]) if match else (message, "")


def show_code(text: str) -> str:
    "Text as it was typed or printed, in a cell of a table."
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


COMMAND = re.compile(r"(?:nanochat (?:run|chat|serve|lab|eval|report|fetch|info|doctor|submit|status|export|import|lm-eval|leaderboard|grade)\b|--[a-z]|[A-Z_]{6,}=|chmod |rm -r |pip install|sbatch |scancel "
                     r"|touch |iconv |wsl --|make setup|make release|cd |EXECUTABLE ).*?(?=,? or |, |; | and | makes | takes | with |$)")


def show_cure(cure: str) -> str:
    "A message's own advice as a sentence, with what is to be typed as code."
    sentence = COMMAND.sub(lambda match: show_code(match[0]), cure)
    first = sentence[:1] if re.match(r"\S*[/.]", sentence) else sentence[:1].upper()  # the name of a file keeps its letters
    return first + sentence[1:] + "." * (cure[-1] not in ".?") if cure else ""


def make_table(modules: list[str], notes: dict[str, str], root: Path) -> str:
    "A Markdown table of what some modules can say. Raises `ValueError` for a message without an answer, and for a note without a message."
    rows, used = [], set()
    for message in dict.fromkeys(m for module in modules for m in read_messages(root / "nanochat" / f"{module}.py")):
        wrong, cure = split_cure(message)
        of_it = max((words for words in notes if words in message and words != "REASON" or words == wrong), key=len, default="")  # the most exact
        used.add(of_it)
        if not cure and not of_it:
            raise ValueError(f"docs/_troubleshooting.md says nothing about {message!r}: add a line with some of its words, -> and a sentence")
        rows.append(f"| {show_code(wrong)} | {' '.join(filter(None, (notes.get(of_it), show_cure(cure))))} |")
    if unused := set(notes) - used:
        raise ValueError(f"docs/_troubleshooting.md has a note for {min(unused)!r}, which {', '.join(modules)} never say")
    return "\n".join(["| it says | and that means |", "|------------|------------|", *rows])


def render_troubleshooting(root: Path) -> str:
    "The page, with a table in the place of each block that begins with `::: messages` and the names of modules."
    template, named = (root / "docs" / "_troubleshooting.md").read_text(encoding="utf-8"), set()

    def replace(block: re.Match) -> str:
        modules = block[1].split()
        named.update(modules)
        return make_table(modules, dict(line.split(" -> ", 1) for line in block[2].splitlines() if line.strip()), root)

    page = re.sub(r"^::: messages ([\w ]+)\n(.*?)^:::$", replace, template, flags=re.M | re.S)
    page = page.replace("\n---\n", "\n---\n\n<!-- make export writes this page from docs/_troubleshooting.md and the messages in nanochat/*.py: change those -->\n", 1)
    if missing := {file.stem for file in (root / "nanochat").glob("*.py") if read_messages(file)} - named:
        raise ValueError(f"docs/_troubleshooting.md has no block for the messages of {min(missing)}")
    return page
