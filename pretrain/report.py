"""`overtone report RUN [RUN ...]`: what runs came to, side by side, from their metrics.jsonl, those that were scored on
one held-out text in one table.

With `--interpret`, also how their prototypes, embeddings and hidden states lie (docs/interpretability.md): measured on
the newest whole checkpoint and held-out text, and written to interpret.json in each run folder.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import command
from common.errors import ConfigError
from common.files import replace_file, writing
from common.strict_json import plain, to_json
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
    with writing(run):
        replace_file(path, to_json({**figures, "cka": mine}, indent=1) + "\n")
    return path


def parser() -> argparse.ArgumentParser:
    """The runs, and what to tell of them."""
    made = command.parser(
        "report",
        "What runs came to, side by side: loss, bits/byte, speed, memory, energy. With --interpret, also how their "
        "prototypes, embeddings and hidden states lie.",
        [
            "runs/quickstart",
            "runs/quickstart runs/quickstart-softmax --json",
            "runs/quickstart --interpret --words the of list",
            "runs/quickstart --energy grid=germany price_per_kwh=0.3",
        ],
    )
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    about = f"measure geometry too, and write {INTERPRETED} to each run folder"
    made.add_argument("--interpret", action="store_true", help=about)
    about = "with --interpret: show the nearest prototypes of these"
    made.add_argument("--words", nargs="+", metavar="WORD", help=about)
    about = "instead of the runs' own settings: grid, price_per_kwh, pue, target_loss"
    made.add_argument("--energy", nargs="+", default=[], metavar="SETTING=VALUE", help=about)
    made.add_argument("--json", action="store_true", help="one JSON object instead of tables; writes no file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, and writes geometry where it is asked for; exit code 2 for what is no run folder."""
    return command.run(_report, command.parse(parser(), argv))


def _report(asked: argparse.Namespace) -> None:
    if asked.words and not asked.interpret:
        raise ConfigError("--words: only with --interpret")
    with command.importing():
        from pretrain.analysis.summary import groups_of, summarise

    summaries = {str(run): summarise(run, asked.energy) for run in asked.runs}
    locked = [str(run) for run in asked.runs if not os.access(run, os.W_OK)]
    if asked.interpret and locked and not asked.json:
        raise ConfigError(f"{locked[0]}: {INTERPRETED} cannot be written there; use --json, which writes no file")
    geometry = geometry_of(asked.runs, asked.words) if asked.interpret else None
    if asked.json:
        compare = {"comparable": groups_of(summaries)} if len(summaries) > 1 else {}
        print(to_json({"runs": summaries, **compare, **({"geometry": geometry} if geometry else {})}))
    else:
        _tell(asked.runs, summaries, geometry)


def _tell(runs: Sequence[Path], summaries: dict[str, Any], geometry: dict[str, Any] | None) -> None:
    """Prints the tables, and writes each run's geometry into its folder."""
    from rich.console import Console

    from pretrain.analysis.summary import groups_of
    from pretrain.analysis.tables import geometry_tables, notes_of, tables_of

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in tables_of(summaries):
        console.print(part, soft_wrap=isinstance(part, str))
    for note in notes_of(summaries):
        console.print(note, soft_wrap=True)
    if geometry is None:
        return
    for group in groups_of(summaries):
        of_group = {name: geometry["runs"][name] for name in group}
        pairs = [pair for pair in geometry["cka"] if set(pair["runs"]) <= set(group)]
        console.print(*geometry_tables({"runs": of_group, "cka": pairs}), sep="\n")
    for run in runs:
        console.print(f"written: {_write(run, geometry['runs'][str(run)], geometry['cka'])}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
