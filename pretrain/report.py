"""`python -m pretrain.report RUN [RUN ...]`: what runs came to, side by side, from their metrics.jsonl, those that
were scored on one held-out text in one table.

With `--interpret`, also how their prototypes, embeddings and hidden states lie (docs/interpretability.md): measured on
the newest whole checkpoint and held-out text, and written to interpret.json in each run folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT
from common.files import replace_file
from common.plain import plain, to_json
from pretrain.analysis.summary import groups_of, summarise
from pretrain.analysis.tables import geometry_tables, notes_of, tables_of
from pretrain.run_folder import INTERPRETED, RunFolder


def geometry_of(runs: Sequence[Path], words: Sequence[str] | None) -> dict[str, Any]:
    """The measures of pretrain/analysis/interpretation.py: `runs`, by folder, and `cka`, of every two of them.

    Raises ConfigError.
    """
    from pretrain.analysis import interpretation
    from pretrain.analysis.words import NEAREST

    sources = {str(run): interpretation.open_run(run, words or NEAREST, strict=words is not None) for run in runs}
    measured = {name: interpretation.measure(source) for name, source in sources.items()}
    figures = {name: one.figures for name, one in measured.items()}
    return plain({"runs": figures, "cka": interpretation.compare(measured)})


def _write(run: Path, figures: dict[str, Any], cka: list[dict[str, Any]]) -> Path:
    """Writes a run's own figures and its comparisons to its folder, whole or not at all."""
    path = RunFolder(run).interpreted
    mine = [pair for pair in cka if str(run) in pair["runs"]]
    replace_file(path, to_json({**figures, "cka": mine}, indent=1) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description="What runs came to, side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--interpret", action="store_true", help=f"measure geometry too, and write {INTERPRETED} to each run folder"
    )
    parser.add_argument(
        "--words", nargs="+", metavar="WORD", help="with --interpret: show the nearest prototypes of these"
    )
    parser.add_argument(
        "--energy",
        nargs="+",
        default=[],
        metavar="key=value",
        help="instead of the runs' own settings: grid, price_per_kwh, pue, target_loss",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables; writes no file")
    args = parser.parse_args(argv)
    try:
        if args.words and not args.interpret:
            raise ConfigError("--words: only with --interpret")
        found = {str(run): summarise(run, args.energy) for run in args.runs}
        locked = [str(run) for run in args.runs if not os.access(run, os.W_OK)]
        if args.interpret and locked and not args.json:
            raise ConfigError(f"{locked[0]}: {INTERPRETED} cannot be written there; use --json, which writes no file")
        geometry = geometry_of(args.runs, args.words) if args.interpret else None
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if args.json:
        compare = {"comparable": groups_of(found)} if len(found) > 1 else {}
        print(to_json({"runs": found, **compare, **({"geometry": geometry} if geometry else {})}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in tables_of(found):
        console.print(part, soft_wrap=isinstance(part, str))
    for note in notes_of(found):
        console.print(note, soft_wrap=True)
    if geometry:
        for group in groups_of(found):
            of_group = {name: geometry["runs"][name] for name in group}
            pairs = [pair for pair in geometry["cka"] if set(pair["runs"]) <= set(group)]
            console.print(*geometry_tables({"runs": of_group, "cka": pairs}), sep="\n")
        for run in args.runs:
            console.print(f"written: {_write(run, geometry['runs'][str(run)], geometry['cka'])}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
