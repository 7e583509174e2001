"""How long it takes until something happens."""
import statistics
import subprocess
import sys
import time
from argparse import Namespace

from bench.harness import HERE, describe_machine, show_results
from nanochat.common import get_device

HELP = "import sys; sys.argv = ['nanochat', '--help']\nfrom nanochat.cli import main\ntry: main()\nexcept SystemExit: pass"
PROGRAMS = {"python alone": "pass", "import nanochat": "import nanochat", "nanochat --help": HELP, "import torch": "import torch",
            "import transformers, NanoChatForCausalLM": "from transformers import NanoChatForCausalLM"}


def time_program(
    code: str,  # for python -c
) -> tuple[float, bool]:  # seconds of a fresh process, and whether it imported torch
    "Run a program from the start."
    command = [sys.executable, "-c", code + "\nimport sys; print('torch' in sys.modules, file=sys.stderr)"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip().split("\n")[-1])
    return seconds, done.stderr.rstrip().endswith("True")


def measure_import(args: Namespace) -> None:
    "Fresh processes, by turns."
    machine = describe_machine(get_device("cpu"))
    print(machine)
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    torch_too = {}
    for turn in range(args.rounds + 1):
        for name in list(seconds):
            try:
                took, torch_too[name] = time_program(PROGRAMS[name])
            except RuntimeError as error:
                print(f"{name} failed: {error}")
                del seconds[name]
                continue
            seconds[name] += [took] if turn else []  # the first may have to read from the disk, and to compile
    results = {name: {"ms": 1000 * statistics.median(values), "torch": "imported" if torch_too[name] else "not imported"} for name, values in seconds.items()}
    title = f"import, medians of {args.rounds} fresh processes"
    print(f"added to {show_results('import', machine, 'fresh process', results, title, set(), 'ms')}")
