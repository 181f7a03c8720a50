"""`overtone inspect CONFIG`: tells what prepared data hold."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import command
from data.commands.prepare import data_section


def parser() -> argparse.ArgumentParser:
    """CONFIG, of which the `data:` section alone is read."""
    made = command.parser(
        "inspect",
        "Tell what data.path holds: counts, lengths, frequent tokens, a sample.",
        ["configs/quickstart.yaml", "my.yaml data.path=/scratch/prepared"],
    )
    command.add_config(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what the prepared folder holds; exit code 2 if there is none, or a damaged one."""
    return command.run(_inspect, command.parse(parser(), argv))


def _inspect(asked: argparse.Namespace) -> None:
    cfg = data_section(asked)
    from data.inspection import inspect

    inspect(cfg.path)
