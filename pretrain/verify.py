"""`overtone verify RUN [key=value ...]`: is a run folder whole, and does its training repeat?

Every checkpoint's files are compared with its manifest, and `latest` with them. Then the first logged steps after a
checkpoint, the newest one that has enough of them, are trained again in a folder of their own; with --last, all those
up to the last ones. Batch fingerprints must be those of metrics.jsonl, and losses too: to rounding, or with --exact bit
for bit, as they are on the same layout and machine with as many threads, and on GPUs with train.deterministic. Prints
PASS and how near the losses are (exit code 0), or FAIL and the first difference (1); 2 for bad input. The run folder is
only read. `deepspeed --module pretrain.verify RUN` does so on many ranks.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from common import command
from common.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """RUN, settings of the layout, and how much is trained again."""
    made = command.parser(
        "verify",
        "Is a run folder whole, and does its training repeat? Compares every checkpoint's files with their hashes and "
        "trains some logged steps again in a folder of their own. The run folder is only read. On many ranks: "
        "deepspeed --module pretrain.verify RUN.",
        [
            "runs/quickstart",
            "runs/quickstart --steps 2 --last --exact",
            "runs/quickstart train.micro_batch=4 parallel.vocab=1",
        ],
        "0 PASS; 1 FAIL, with the first difference; 2 bad input",
    )
    command.add_run(made)
    command.add_settings(made, "train.micro_batch=4, where the layout is another")
    made.add_argument(
        "--steps", type=int, default=5, metavar="N", help="logged steps to train again (default %(default)s)"
    )
    made.add_argument("--last", action="store_true", help="the last ones logged, and those before to a checkpoint")
    about = "losses must be the logged ones bit for bit: same machine, layout, OMP_NUM_THREADS"
    made.add_argument("--exact", action="store_true", help=about)
    command.add_rank_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies on this rank, and prints on the first; exit code 0 PASS, 1 FAIL, 2 bad input."""
    return command.run(_verify, command.parse(parser(), argv, strict=False))


def _verify(asked: argparse.Namespace) -> int:
    with command.importing():
        from pretrain.replay import Differs, verify
        from pretrain.run_folder import settings_if_any
        from pretrain.runtime import ranks as process

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for kind in (UserWarning, FutureWarning):  # as in training
        warnings.filterwarnings("ignore", category=kind, module="torch|deepspeed")
    run = Path(asked.run)
    settings = settings_if_any(run, asked.overrides)
    ranks = process.start_command(cfg=settings, allow_code=asked.allow_different_code)
    try:
        code, told = 0, f"PASS: {verify(run, asked.overrides, asked.steps, ranks, last=asked.last, exact=asked.exact)}"
    except Differs as difference:
        code, told = 1, f"FAIL: {difference}"
    except ConfigError as error:
        code, told = command.refuse(error, says=ranks.first), ""
    if ranks.first and told:
        print(told)
    process.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
