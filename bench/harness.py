"""Starts workers, lets them take turns, and writes down what they say."""
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir

HERE = Path(__file__).resolve().parent
FIELDS = ("date", "machine", "configuration", "variant", "measure", "value")


class WorkerFailed(RuntimeError):
    "A worker that could not start, or ended; the message is one line."


@dataclass
class Variant:
    "One thing to be measured, in a process of its own."
    name: str  # as the table says it
    script: Path  # what the worker runs
    job: dict[str, Any]  # its first argument, as JSON
    path: Path  # the folder that its packages come from
    environment: dict[str, str] = field(default_factory=dict)
    ours: bool = False  # whether it is this repository's


class Worker:
    "A running variant."

    def __init__(
        self,
        variant: Variant,
    ):
        self.name, self.log = variant.name, tempfile.TemporaryFile("w+")
        self.cache = tempfile.TemporaryDirectory(prefix="bench-")  # what others compiled would hide how long it takes
        environment = {**os.environ, "GOMP_SPINCOUNT": "2000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                       "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", self.cache.name),
                       "PYTHONPATH": str(variant.path), **variant.environment}  # threads that wait soon sleep, in all alike
        self.process = subprocess.Popen([sys.executable, str(variant.script), json.dumps(variant.job)], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        try:
            self.about = self.read()
        except BaseException:
            self.close()
            raise

    def read(self) -> dict:
        "The next answer. Raises `WorkerFailed`."
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self.last_words()}
        if "error" in answer:
            self.close()
            raise WorkerFailed(f"{self.name} failed: {answer['error']}")
        return answer

    def last_words(self) -> str:
        "The last line that the process wrote where errors go."
        self.process.wait()
        self.log.seek(0)
        return next((line.strip() for line in reversed(self.log.read().splitlines()) if line.strip()), f"exit code {self.process.returncode}")

    def ask(self, do: str, **arguments: Any) -> dict:
        "Send a command, and wait for its answer."
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # `read` finds out why
        return self.read()

    def close(self) -> None:
        "End the process."
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.cache.cleanup()


class Team:
    "Workers that take turns; one that fails is reported in a line, and the others go on."

    def __init__(
        self,
        variants: list[Variant],
        say: Callable[[str], None] = print,
    ):
        self.workers, self.say = {}, say
        for variant in variants:
            try:
                self.workers[variant.name] = Worker(variant)
            except WorkerFailed as error:
                say(str(error))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        "End all of them."
        for worker in self.workers.values():
            worker.close()

    def ask(self, do: str, first: int = 0, **arguments: Any) -> dict[str, dict]:  # name -> answer
        "The same command for one after another; `first` says who begins."
        answers = {}
        for name, worker in take_turns(list(self.workers.items()), first):
            try:
                answers[name] = worker.ask(do, **arguments)
            except WorkerFailed as error:
                self.say(str(error))
                del self.workers[name]
        return answers

    def measure(
        self,
        rounds: int,
        do: str,
        **arguments: Any,
    ) -> dict[str, dict]:  # name -> measure -> the median of the rounds, of what isn't a number the last
        "A command again and again, by turns."
        answers: dict[str, list[dict]] = {}
        for turn in range(rounds):
            for name, answer in self.ask(do, first=turn, **arguments).items():
                answers.setdefault(name, []).append(answer)
        return {name: {key: median([answer[key] for answer in answers[name]]) for key in answers[name][0]} for name in self.workers}


def take_turns(
    items: list,
    turn: int,
) -> list:  # in an order in which each begins once
    "So that nobody always comes after the same one."
    start = turn % len(items) if items else 0
    return items[start:] + items[:start]


def median(values: list) -> Any:
    "The median of numbers; the last of anything else."
    return statistics.median(values) if all(isinstance(value, (int, float)) for value in values) else values[-1]


def describe_machine(device: Any) -> str:
    "One line that says what the numbers were measured on."
    import torch

    from nanochat.costs import measure_peak

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    size = 8192 if device.type == "cuda" else 2048
    peaks = ", ".join(f"{measure_peak(device, dtype, size) / 1e9:,.0f} GFLOP/s in {str(dtype)[6:]}" for dtype in (torch.float32, torch.bfloat16))
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}; products reach {peaks}"


def append_csv(
    what: str,  # the benchmark
    machine: str,
    configuration: str,
    results: dict[str, dict],  # variant -> measure -> value
) -> Path:  # of the file that has grown
    "Add to the CSV file of a benchmark."
    path = base_dir() / "bench" / f"{what}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([FIELDS] if new else [])
        date = datetime.now().isoformat(timespec="seconds")
        writer.writerows([date, machine, configuration, name, measure, value] for name, measures in results.items() for measure, value in measures.items())
    return path


def format_value(value: Any) -> str:
    "A number with three or four digits."
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,d}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def format_table(
    results: dict[str, dict],  # variant -> measure -> value
    ours: set[str],  # the names of those that are ours
    decides: str,  # the measure that ratios are of
    lower: bool = False,  # whether less of it is better
) -> str:
    "Variants below each other, with how many times better our best is than each; the last line compares with the best peer."
    better = min if lower else max
    best = {side: better((m[decides] for name, m in results.items() if (name in ours) == side and decides in m), default=None) for side in (True, False)}

    def ratio(value: float) -> str:
        return f"{(value / best[True] if lower else best[True] / value):.2f}"

    columns = list(dict.fromkeys(measure for measures in results.values() for measure in measures))
    head = ["", *columns, "ours / it"]
    lines = [[name, *(format_value(m[c]) if c in m else "" for c in columns), ratio(m[decides]) if best[True] and decides in m else ""]
             for name, m in results.items()]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    text = "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in [head, *lines])
    return text + (f"\nours / best peer, {decides}: {ratio(best[False])} (above 1: ours is better)" if None not in best.values() else "")


def show_results(
    what: str,  # the benchmark
    machine: str,
    configuration: str,
    results: dict[str, dict],  # variant -> measure -> value
    title: str,
    ours: set[str],  # the names of those that are ours
    decides: str,  # the measure that ratios are of
    lower: bool = False,  # whether less of it is better
) -> Path:  # of the CSV file that has grown
    "Print a table under its title, and keep its numbers."
    print(f"\n{title}\n{format_table(results, ours, decides, lower)}", flush=True)
    return append_csv(what, machine, configuration, results)


def check_peer(
    path: str,  # given with --peer
) -> Path:
    "A checkout of the public nanochat. Raises `UserError` for anything else."
    folder = Path(path).expanduser().resolve()
    if not (folder / "nanochat" / "gpt.py").exists() or folder == HERE.parent or (folder / "nanochat" / "_modidx.py").exists():
        raise UserError(f"{path} is not a checkout of the public nanochat, there is no nanochat/gpt.py of its own in it: "
                        "git clone https://github.com/karpathy/nanochat, and --peer nanochat")
    return folder
