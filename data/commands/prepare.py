"""`overtone prepare CONFIG`: turns text into a tokenizer and token shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import command
from common.errors import ConfigError

if TYPE_CHECKING:
    from data.config import DataConfig


def parser() -> argparse.ArgumentParser:
    """CONFIG, of which the `data:` section alone is read, and the number of workers."""
    made = command.parser(
        "prepare",
        "Train the tokenizer and write token shards into data.path, or find them there. Killed, the same command goes "
        "on from what is done, to the same bytes.",
        ["configs/quickstart.yaml", "configs/quickstart.yaml --workers 2", "my.yaml data.path=/scratch/prepared"],
    )
    command.add_config(made)
    about = "processes that encode (default: one for each core); the data do not depend on it"
    made.add_argument("--workers", type=command.count, metavar="N", help=about)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares the data, or finds them prepared; exit code 2 if that cannot be."""
    return command.run(_prepare, command.parse(parser(), argv))


def _prepare(asked: argparse.Namespace) -> None:
    cfg = data_section(asked)
    from data.prepare import prepare

    prepare(cfg, workers=asked.workers)


def data_section(asked: argparse.Namespace) -> DataConfig:
    """The `data:` section of CONFIG, with the command line's settings. Raises ConfigError if it is missing or wrong."""
    from common.settings import read_tree, validate
    from data.config import DataConfig

    tree = read_tree(asked.config, asked.overrides)
    if "data" not in tree:
        raise ConfigError(f"{asked.config}: there is no `data:` section; it says which text to prepare and where")
    return validate(DataConfig, tree["data"], "data")
