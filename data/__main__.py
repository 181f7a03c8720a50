"""python -m data prepare CONFIG [key=value ...]: turns text into token shards; `verify` checks them."""

import argparse
import sys
from collections.abc import Sequence

from data.config import DataConfig
from data.prepare import prepare
from data.settings import ConfigError, read_tree, validate
from data.shards import verify_folder

COMMANDS = {
    "prepare": "train the tokenizer and write token shards into data.path (or find them there)",
    "verify": "compare every byte in data.path with the hashes taken when it was written",
}


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of processes; give 1 or more")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 for input that cannot be used (the reason is on standard error)."""
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
        help="processes that encode; the result is the same for any number of them (default: one for each core)",
    )
    asked = parser.parse_args(arguments)
    try:
        tree = read_tree(asked.config, asked.overrides)
        if "data" not in tree:
            raise ConfigError(f"{asked.config}: there is no `data:` section; it says which text to prepare and where")
        cfg = validate(DataConfig, tree["data"], "data")
        if asked.command == "prepare":
            prepare(cfg, workers=asked.workers)
        else:
            manifest = verify_folder(cfg.path)
            print(f"{cfg.path}: every file matches its hash; fingerprint {manifest['fingerprint'][:12]}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
