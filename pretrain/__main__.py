"""`python -m pretrain CONFIG [key=value ...]` on one process; `deepspeed --module pretrain CONFIG [key=value ...]`
on many.

Exit codes: 0 done; 2 bad input; 3 too many non-finite steps in a row; 75 stopped by a signal after a save. Rank 0
leaves them, with the reason, in the run folder's `exit.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import traceback
import warnings

from data.settings import ConfigError
from pretrain.config import EXIT_BAD_INPUT, EXIT_RECORD, RunConfig, check_data, check_layout, load


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain", description="Train a configuration.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, such as train.steps=100")
    # deepspeed adds this one; the environment has it too
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for noisy in ("torch", "DeepSpeed", "deepspeed", "zeus"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for kind in (UserWarning, FutureWarning):  # torch deprecates collectives' names that DeepSpeed still uses
        warnings.filterwarnings("ignore", category=kind, module="torch|deepspeed")
    try:
        cfg = load(args.config, args.overrides)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_layout(cfg, world, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world))
        check_data(cfg)
        return _train(cfg)
    except ConfigError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _train(cfg: RunConfig) -> int:
    from pretrain import ranks as process  # torch: after the input was checked

    ranks = process.start()
    from pretrain.loop import Outcome, Run  # DeepSpeed: after it was told the device

    ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
    try:
        run = Run(cfg, ranks)
        outcome = run.train()
    except ConfigError as error:
        outcome = Outcome(EXIT_BAD_INPUT, str(error), 0)
        if ranks.first:
            _leave_record(cfg, outcome)
        raise
    except BaseException as error:
        traceback.print_exc()
        if ranks.first:
            _leave_record(cfg, Outcome(1, repr(error), 0))
        sys.stdout.flush()
        sys.stderr.flush()
        for (
            child
        ) in multiprocessing.active_children():  # they would live on: Zeus has one that watches each CPU counter
            child.terminate()
        os._exit(1)  # leaving the process group politely would wait for ranks that may wait for this one
    run.close()
    process.stop()
    if ranks.first:
        _leave_record(cfg, outcome)
        if outcome.code:
            print(f"stopped at step {outcome.step}: {outcome.reason} (exit code {outcome.code})", file=sys.stderr)
    return outcome.code


def _leave_record(cfg: RunConfig, outcome: object) -> None:
    try:
        if cfg.run.is_dir():
            (cfg.run / EXIT_RECORD).write_text(json.dumps(vars(outcome)))
    except OSError as error:
        logging.error("%s: %s", cfg.run / EXIT_RECORD, error)


if __name__ == "__main__":
    sys.exit(main())
