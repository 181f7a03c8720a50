"""`overtone`, and `python -m overtone` or `python -m model`: the commands where a checkout is around, else where they
are to be had.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

INSTALLED = """\
This installation holds the harmonic head and the decoder, for programs of your own: from overtone import HarmonicHead
The commands (overtone prepare, train, evaluate, ...) run from a checkout: git clone the repository, then make setup."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the command's exit code; 2 where this is not a checkout."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"overtone {__version__}")
        return 0
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if package.name != "model" or not (checkout / "cli" / "__main__.py").is_file():
        print(INSTALLED, file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    try:
        from cli.__main__ import main as run

        return run(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
