"""`overtone verify-data CONFIG`: compares prepared data with the hashes taken when they were written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import command
from data.commands.prepare import data_section


def parser() -> argparse.ArgumentParser:
    """CONFIG, of which the `data:` section alone is read."""
    made = command.parser(
        "verify-data",
        "Compare every byte in data.path with the hashes taken when it was written.",
        ["configs/quickstart.yaml", "my.yaml data.path=/scratch/prepared"],
        "0 all are whole; 2 they are not, or bad input",
    )
    command.add_config(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Reads every byte of the prepared folder; exit code 2 for the first file that is missing or differs."""
    return command.run(_verify, command.parse(parser(), argv))


def _verify(asked: argparse.Namespace) -> None:
    cfg = data_section(asked)
    from data.shards import verify_folder

    manifest = verify_folder(cfg.path)
    print(f"{cfg.path}: every file matches its hash; fingerprint {manifest['fingerprint'][:12]}")
