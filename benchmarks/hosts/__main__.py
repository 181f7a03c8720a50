"""`python -m benchmarks.hosts [--only NAME ...] [--out DIR]`: what is done to jobs between hosts, and how they end.

Each scenario has two hosts of its own, network namespaces of this machine, and trains a tiny model on their CPUs. The
table says how long after what was done the command ended, with which exit code and last line. Needs root, sshd, pdsh
and, for some, mpirun and Slurm.
"""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.hosts import differ, ends
from benchmarks.hosts.network import Hosts, why_not
from benchmarks.hosts.stage import Ended, Stage, prepare
from benchmarks.measuring import markdown, parser

SCENARIOS = {**differ.SCENARIOS, **ends.SCENARIOS}
HEAD = ("scenario", "what is done", "s until the end", "exit code", "last line", "left")


def play(name: str, folder: Path, data: Path) -> Ended:
    """Runs a scenario in a folder of its own."""
    folder.mkdir(parents=True)
    with Hosts(2, folder) as hosts:
        return SCENARIOS[name](Stage(folder, hosts, data))


def row(name: str, ended: Ended) -> list[str]:
    """Of the table."""
    last = ended.last.replace("|", "\\|")
    return [name, str(SCENARIOS[name].__doc__), f"{ended.seconds:.0f}", str(ended.code), last, ended.note]


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the scenarios and prints the table; exit code 1 if one could not be played."""
    asked = parser("hosts", __doc__)
    asked.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    asked.add_argument("--out", type=Path, help="where logs and run folders stay (default: nowhere)")
    words = asked.parse_args(argv)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 1
    failed, rows = False, [list(HEAD)]
    with tempfile.TemporaryDirectory() as temporary:
        out = words.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        data = prepare(out)
        for number, name in enumerate(words.only):
            try:
                rows.append(row(name, play(name, out / f"{number}-{re.sub('[^a-zA-Z0-9]+', '-', name)}", data)))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            except Exception:  # the others can still be played
                failed = True
                traceback.print_exc()
    print("\n".join(markdown(rows)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
