"""`overtone study CONFIG [key=value ...] [options of overtone run]`: tunes heads alike, trains the chosen settings with
fresh seeds, and tells what came of it, in a table, results.json, results.csv and a page. Run again, it goes on with
what is not done.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command
from common.errors import ConfigError
from common.files import lock, replace_file
from common.progress import say
from common.strict_json import to_json

if TYPE_CHECKING:
    from rich.table import Table

PAGE, RESULTS, ROWS = "study.html", "results.json", "results.csv"
JOBS = "runs at once (default: 1); above 1 neither time nor energy of a run is told"


def parser() -> argparse.ArgumentParser:
    """Options of the command; what it does not know goes to `overtone run`."""
    made = command.parser(
        "study",
        "Tune every head with the same number of trials, train the chosen settings with fresh seeds, and compare them "
        "on the test split, in a table, results.json, results.csv and a page. Run again, it goes on with what is not "
        "done. Options that are not listed go to `overtone run`, such as --hostfile H.",
        [
            "configs/study-small.yaml --dry-run",
            "configs/study-small.yaml --jobs 2 --num-gpus 1",
            "configs/study-small.yaml tuning.trials=8 out=studies/eight-trials",
            "configs/study-small.yaml --report",
        ],
        "0 done; 2 bad input; 75 stopped by a signal, the same command goes on; others: a run failed with that code",
    )
    made.usage = (
        "overtone study [-h] [--report] [--dry-run] [--jobs N] CONFIG [key=value ...] [options of overtone run]"
    )
    made.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/study-small.yaml")
    made.add_argument("--report", action="store_true", help="train nothing: write the results of what is done")
    made.add_argument("--dry-run", action="store_true", help="train nothing: tell the runs, steps and tokens it takes")
    made.add_argument("--jobs", type=command.count, default=1, metavar="N", help=JOBS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command: trains what is left, of whichever kind the file says, and writes results; its exit code."""
    words = sys.argv[1:] if argv is None else argv
    # CONFIG first, since an option of another command may take any word as its value.
    words = sorted(words, key=lambda word: "=" in word or not word.endswith((".yaml", ".yml")))
    asked, rest = parser().parse_known_args(words)
    asked.overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    asked.launch = [word for word in rest if word not in asked.overrides]
    return command.run(_study, asked)


def _study(asked: argparse.Namespace) -> int:
    from common.settings import read_tree

    tree = read_tree(asked.config, asked.overrides)
    kinds = {"language": _language, "algorithmic": _algorithmic, "vision": _vision}
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{asked.config}: kind={str(kind)[:80]!r}: expected one of {', '.join(kinds)}")
    return kinds[kind](tree, asked)


def _language(tree: dict[str, Any], asked: argparse.Namespace) -> int:
    with command.importing():
        from pretrain.study import language_config

        study = language_config.from_tree(tree)
        from pretrain.study import protocol, records, results, search, tables  # bring torch
        from pretrain.study.page import language

    kept = records.Records(study)
    choice = search.check(study, kept)
    if asked.dry_run:
        _print(tables.plan(search.plan(study)))
        say(protocol.in_advance(study))
        return 0
    with _alone(study.out):
        training = search.Training(study, kept, asked.launch, asked.jobs, say)
        try:
            training.catch_up(choice) if asked.report else training.all(choice)
        except search.Stopped as stopped:
            print(f"stopped: {stopped}; the same command goes on", file=sys.stderr)
            return stopped.code or 1
        outcome = results.gather(study, kept, search.read_choice(study))
        write(study.out, outcome, outcome["runs"], language.page(outcome))
    return _tell(study.out, tables.language(outcome))


def _algorithmic(tree: dict[str, Any], asked: argparse.Namespace) -> int:
    from common.settings import validate
    from pretrain.study.algorithmic_config import AlgorithmicConfig

    with command.importing():
        study = validate(AlgorithmicConfig, tree)  # brings torch last
        _refuse_options(asked, "an algorithmic study")
        from pretrain.study import algorithmic, tables
        from pretrain.study.page import algorithmic as pages

    with _alone(study.out):
        outcome = algorithmic.run(study, say)
        write(study.out, outcome, outcome["cells"], pages.page(outcome))
    return _tell(study.out, tables.algorithmic(outcome))


def _vision(tree: dict[str, Any], asked: argparse.Namespace) -> int:
    from common.settings import validate
    from pretrain.study.vision.config import VisionConfig

    study = validate(VisionConfig, tree)
    _refuse_options(asked, "a vision study")
    with command.importing():
        from pretrain.study import tables
        from pretrain.study.page import vision as pages
        from pretrain.study.vision import grid

    with _alone(study.out):
        outcome = grid.run(study, say)
        write(study.out, outcome, outcome["cells"], pages.page(outcome))
    return _tell(study.out, tables.vision(outcome))


def _refuse_options(asked: argparse.Namespace, kind: str) -> None:
    """Raises ConfigError for options that only studies of language have: the others' processes are in their files."""
    options = {"--report": asked.report, "--dry-run": asked.dry_run, "--jobs": asked.jobs != 1}
    if given := " ".join([*asked.launch, *(name for name, there in options.items() if there)]):
        raise ConfigError(f"{given}: {kind} takes no such option")


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _tell(folder: Path, table: Table) -> int:
    _print(table)
    say(f"written: {folder / PAGE}, {RESULTS} and {ROWS} beside it")
    return 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a study's folder: two at once would train the same runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be written: {error}; give a folder that can") from None
    with file:
        if not lock(file):
            raise ConfigError(f"{folder}: another process works on this study; wait for it, or end it")
        yield


def write(folder: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]], page: str) -> None:
    """Replaces a study's results, whole, as rows and as a page."""
    replace_file(folder / RESULTS, to_json(results) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(folder / ROWS, table.getvalue())
    replace_file(folder / PAGE, page)


if __name__ == "__main__":
    sys.exit(main())
