"""`overtone sample RUN [--prompt TEXT]`: continues a text with a trained model, any head, token by token."""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common import command


def parser() -> argparse.ArgumentParser:
    """RUN, the text to go on from, and how to draw tokens."""
    made = command.parser(
        "sample",
        "Continue a text with a trained model, token by token.",
        ['runs/quickstart --prompt "The list"', "runs/quickstart --tokens 100 --temperature 0.8 --top-p 0.95 --seed 1"],
    )
    command.add_run(made)
    made.add_argument("--prompt", default="", metavar="TEXT", help="what to go on from (default: a new document)")
    made.add_argument(
        "--tokens", type=int, metavar="N", help="most tokens to add (default: as many as there are positions for)"
    )
    made.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest (default %(default)s)"
    )
    made.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens alone")
    made.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that together reach P alone")
    made.add_argument(
        "--seed", type=int, metavar="K", help="the same seed draws the same tokens (default: another each time)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints prompt and continuation, token by token; exit code 2 if there is no checkpoint."""
    return command.run(_sample, command.parse(parser(), argv))


def _sample(asked: argparse.Namespace) -> None:
    with command.importing():
        from pretrain.analysis.sampling import continuation

    added = continuation(**{**vars(asked), "run": Path(asked.run)})
    print(asked.prompt, end="", flush=True)
    for text in added:
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
