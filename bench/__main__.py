"""`python -m bench train|decode|tokenizer|data|quality|import`."""
import argparse
import os
import sys

from bench.harness import check_peer
from nanochat.common import UserError


def parse_arguments(
    given: list[str],  # what stands behind the command
) -> argparse.Namespace:
    "Options of all benchmarks."
    parser = argparse.ArgumentParser("nanochat bench", description="Measure this nanochat beside others, on this machine.")
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in (("train", "steps of training"), ("decode", "writing tokens"), ("quality", "bits per byte after minutes of training"),
                       ("data", "batches of the loader beside those that training eats"), ("tokenizer", "training a vocabulary, and encoding"),
                       ("import", "how long `nanochat` takes to start")):
        sub = what.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name != "quality":
            sub.add_argument("--rounds", type=int, default=10 if name == "import" else 5, help="turns of each variant; medians are shown")
        if name in ("train", "decode", "quality", "data"):
            sub.add_argument("--config", default="tiny" if name == "quality" else "small", help="tiny, small, wide, d12 or d20")
            sub.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
            sub.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
            sub.add_argument("--peer", action="append", default=[], metavar="PATH", help="a checkout of the public nanochat; may be repeated")
            sub.add_argument("--only", default="", help="parts of names of variants, with commas")
            sub.add_argument("--compile", action="store_true", help="with torch.compile too")
            sub.add_argument("--batch", type=int, default=0, help="rows of a batch; 0: the configuration's")
        if name in ("train", "data"):
            sub.add_argument("--steps", type=int, default=3, help="steps of a turn")
        if name == "decode":
            sub.add_argument("--prompts", default="64,1024", help="tokens of prompts")
            sub.add_argument("--batches", default="1,8,64", help="texts side by side")
            sub.add_argument("--new", type=int, default=128, help="tokens to write")
        if name in ("quality", "tokenizer"):
            sub.add_argument("--corpus", default="tinyworld" if name == "quality" else "", help="tinyworld, tinystories, fineweb_edu, climbmix or folder:PATH")
        if name == "quality":
            sub.add_argument("--shards", type=int, default=8, help="training shards of the corpus")
            sub.add_argument("--minutes", default="1,2,5", help="budgets of training, with commas")
            sub.add_argument("--seeds", type=int, default=3, help="trainings of each, from different weights; luck moves a short one far")
            sub.add_argument("--vocab-size", type=int, default=0, help="tokens; 0: the configuration's")
        if name == "tokenizer":
            sub.add_argument("--vocab-size", type=int, default=8192, help="tokens, the 9 special ones included")
            sub.add_argument("--megabytes", type=float, default=20.0, help="of text")
    return parser.parse_args(given)


def main() -> None:
    "Run one benchmark: exit code 2 for a mistake."
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    args = parse_arguments(sys.argv[1:])
    try:
        for path in getattr(args, "peer", []):
            check_peer(path)
        if args.what in ("train", "decode", "quality"):
            from bench import models as suite
        elif args.what == "import":
            from bench import startup as suite
        else:
            from bench import text as suite
        getattr(suite, "measure_import" if args.what == "import" else args.what)(args)
    except UserError as error:
        print(f"nanochat bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
