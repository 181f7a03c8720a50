"""`python -m data COMMAND ...`: the commands of data/, as `overtone` runs them."""

if __name__ == "__main__":
    import common.starting  # noqa: F401

import sys
from collections.abc import Sequence

from common.command import dispatch

MODULES = {
    "prepare": "data.commands.prepare",
    "verify": "data.commands.verify",
    "inspect": "data.commands.inspect",
    "import-nanogpt": "data.commands.importing",
}
ABOUT = f"usage: python -m data {'|'.join(MODULES)} ...; --help behind one of them tells more"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command that the first word names. `arguments`: None takes the process's own words."""
    return dispatch(sys.argv[1:] if arguments is None else arguments, MODULES, ABOUT)


if __name__ == "__main__":
    sys.exit(main())
