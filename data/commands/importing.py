"""`overtone import FOLDER --out DIR`: takes the token files of nanoGPT or llm.c."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import command


def parser() -> argparse.ArgumentParser:
    """The folder with the token files, the one to make, and what the files themselves do not tell of their ids."""
    made = command.parser(
        "import",
        "Turn nanoGPT's train.bin and val.bin (GPT-2 tokens), or llm.c's token files, into a prepared folder. Train on "
        "it with data.source={kind: prepared}.",
        [
            "nanoGPT/data/openwebtext --out prepared/openwebtext --vocab vocab.json",
            "llm.c/dev/data/fineweb10B --out prepared/fineweb",
            "mine --out prepared/mine --dtype uint32 --vocab-size 100277 --eos-id 100257",
        ],
    )
    made.add_argument("folder", type=Path, metavar="FOLDER", help="where the files are")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="the prepared folder to make")
    made.add_argument(
        "--vocab", type=Path, metavar="FILE", help="GPT-2's vocab.json or encoder.json; without it no bits/byte"
    )
    made.add_argument("--dtype", choices=("uint16", "uint32"), help="width of the ids (default: uint16)")
    made.add_argument("--vocab-size", type=command.count, metavar="N", help="number of ids (default: GPT-2's 50257)")
    made.add_argument("--eos-id", type=int, metavar="K", help="the id between documents (default: GPT-2's 50256)")
    made.add_argument("--one-document", action="store_true", help="take a split without that id as one document")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Imports the files; exit code 2 if they are not what the options say."""
    return command.run(_import, command.parse(parser(), argv))


def _import(asked: argparse.Namespace) -> None:
    from data.nanogpt import import_nanogpt
    from data.token_files import Asked

    ids = Asked(asked.dtype, asked.vocab_size, asked.eos_id, asked.one_document)
    import_nanogpt(asked.folder, asked.out, asked.vocab, asked=ids)
