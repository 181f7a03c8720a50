"""python -m launch run CONFIG [key=value ...]: checks a training job, then runs it with deepspeed.
python -m launch plan CONFIG [key=value ...]: tells what it will take.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.settings import ConfigError
from launch import plan
from launch.deepspeed import check, check_tools, command, environment, one_line, run
from launch.hosts import place
from pretrain.config import EXIT_BAD_INPUT, EXIT_RECORD, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the job's exit code, 2 for input that cannot be used (standard error tells why)."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Plan and run training jobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="check a config, its data and the layout, then train it with deepspeed",
        description="Check a config, its data and the layout, then train it with deepspeed. Exit codes: 0 done; 2 bad "
        "input; 3 too many non-finite steps; 75 stopped by a signal after a save, the same command goes on; 128 + N: a "
        "rank was killed by signal N; others: a rank failed.",
    )
    job.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
    job.add_argument("overrides", metavar="key=value", nargs="*", help="changes a setting, such as train.steps=100")
    job.add_argument("--hostfile", type=Path, metavar="H", help="train on its hosts: a line `HOST slots=N` for each")
    job.add_argument(
        "--num-gpus", type=int, metavar="N", help="ranks on each host (default: every GPU; 2 where none is)"
    )
    job.add_argument("--dry-run", action="store_true", help="check everything, print the deepspeed command, and stop")
    plan.add_arguments(commands)
    asked, rest = parser.parse_known_args(arguments)  # argparse takes no positional after an option
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        commands.choices[asked.command].error(f"unknown: {' '.join(unknown)}; expected key=value or one of the options")
    overrides = [*asked.overrides, *rest]
    try:
        cfg = load(asked.config, overrides)
        if asked.command == "plan":
            return plan.tell(asked, cfg)
        placement = place(asked.hostfile, asked.num_gpus)
        check(cfg, placement)
        if not asked.dry_run:
            check_tools(placement)
        words, added = command(asked.config, overrides, placement), environment(placement)
        print(one_line(words, added), flush=True)
        if asked.dry_run:
            return 0
        return run(words, added, cfg.run / EXIT_RECORD, remote=placement.hostfile is not None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
