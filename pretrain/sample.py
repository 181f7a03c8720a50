"""`python -m pretrain.sample RUN [--prompt TEXT]`: continues a text with a trained model, any head, token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for input that cannot be used (the reason is on standard error)."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.sample", description="Continue a text.")
    parser.add_argument("run", type=Path, help="a run folder (its newest whole checkpoint), or one checkpoint's folder")
    parser.add_argument("--prompt", default="", help="the text to go on from (default: a new document)")
    parser.add_argument("--tokens", type=int, help="most tokens to add (default: as many as there are positions for)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (default %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens alone")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that together reach P alone")
    parser.add_argument("--seed", type=int, help="the same seed draws the same tokens (default: another each time)")
    asked = parser.parse_args(argv)
    try:
        from pretrain.analysis.sampling import continuation  # torch: after the arguments were read

        added = continuation(**vars(asked))
        print(asked.prompt, end="", flush=True)
        for text in added:
            print(text, end="", flush=True)
        print()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
