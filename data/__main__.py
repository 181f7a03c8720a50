"""python -m data: turns text into token shards, checks them and tells what they hold."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.settings import read_tree, validate
from data.config import DataConfig

COMMANDS = {
    "prepare": "train the tokenizer and write token shards into data.path (or find them there)",
    "verify": "compare every byte in data.path with the hashes taken when it was written",
    "inspect": "tell what data.path holds: counts, lengths, frequent tokens, a sample",
}
IMPORT = "turn nanoGPT's train.bin and val.bin (GPT-2 tokens), or llm.c's token files, into a prepared folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 for input that cannot be used (the reason is on standard error)."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "import-nanogpt":
            from data.nanogpt import import_nanogpt
            from data.token_files import Asked

            ids = Asked(asked.dtype, asked.vocab_size, asked.eos_id, asked.one_document)
            import_nanogpt(asked.folder, asked.out, asked.vocab, asked=ids)
        else:
            _run(asked)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description="Prepare and check training data.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        command.add_argument("config", metavar="CONFIG", help="YAML file; its `data:` section is used")
        command.add_argument(
            "overrides", metavar="key=value", nargs="*", help="changes a setting, such as data.val_fraction=0.05"
        )
    commands.choices["prepare"].add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that encode (default: one for each core); the data do not depend on it",
    )
    importing = commands.add_parser("import-nanogpt", help=IMPORT, description=IMPORT.capitalize() + ".")
    importing.add_argument("folder", type=Path, metavar="FOLDER", help="where the files are")
    importing.add_argument("--out", type=Path, required=True, metavar="DIR", help="the prepared folder to make")
    importing.add_argument(
        "--vocab", type=Path, metavar="FILE", help="GPT-2's vocab.json or encoder.json; without it no bits/byte"
    )
    importing.add_argument("--dtype", choices=("uint16", "uint32"), help="width of the ids (default: uint16)")
    importing.add_argument("--vocab-size", type=_count, metavar="N", help="number of ids (default: GPT-2's 50257)")
    importing.add_argument("--eos-id", type=int, metavar="K", help="the id between documents (default: GPT-2's 50256)")
    importing.add_argument("--one-document", action="store_true", help="take a split without that id as one document")
    return parser


def _run(asked: argparse.Namespace) -> None:
    tree = read_tree(asked.config, asked.overrides)
    if "data" not in tree:
        raise ConfigError(f"{asked.config}: there is no `data:` section; it says which text to prepare and where")
    cfg = validate(DataConfig, tree["data"], "data")
    if asked.command == "prepare":
        from data.prepare import prepare

        prepare(cfg, workers=asked.workers)
    elif asked.command == "verify":
        from data.shards import verify_folder

        manifest = verify_folder(cfg.path)
        print(f"{cfg.path}: every file matches its hash; fingerprint {manifest['fingerprint'][:12]}")
    else:
        from data.inspection import inspect

        inspect(cfg.path)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
