"""`python -m pretrain.verify RUN [key=value ...]`: is a run folder whole, and does its training repeat?

Every checkpoint's files are compared with its manifest, and `latest` with them. Then the first logged steps after a
checkpoint, the newest one that has enough of them, are trained again in a folder of their own; with --last, all those
up to the last ones. Batch fingerprints must be those of metrics.jsonl, and losses too: to rounding, or with --exact bit
for bit, as they are on the same layout and machine with as many threads, and on GPUs with train.deterministic. Prints
PASS and how near the losses are (exit code 0), or FAIL and the first difference (1); 2 for bad input. The run folder is
only read. `deepspeed --module pretrain.verify RUN` does so on many ranks.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT
from pretrain.replay import Differs, verify
from pretrain.run_folder import settings_if_any
from pretrain.runtime import ranks as process


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.verify", description="Check a run folder.")
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the layout, such as train.micro_batch=4")
    parser.add_argument("--steps", type=int, default=5, help="logged steps to train again (default %(default)s)")
    parser.add_argument("--last", action="store_true", help="the last ones logged, and those before to a checkpoint")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="losses must be the logged ones bit for bit: same machine, layout, OMP_NUM_THREADS",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds this one
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for kind in (UserWarning, FutureWarning):  # as in training
        warnings.filterwarnings("ignore", category=kind, module="torch|deepspeed")
    ranks = process.start_command(cfg=settings_if_any(args.run, args.overrides))
    try:
        code, told = 0, f"PASS: {verify(args.run, args.overrides, args.steps, ranks, last=args.last, exact=args.exact)}"
    except Differs as wrong:
        code, told = 1, f"FAIL: {wrong}"
    except ConfigError as error:
        code, told = EXIT_BAD_INPUT, f"error: {error}"
    if ranks.first:
        print(told, file=sys.stderr if code == EXIT_BAD_INPUT else sys.stdout)
    process.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
