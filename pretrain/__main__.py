"""`overtone train CONFIG [key=value ...]` on one process; `deepspeed --module pretrain CONFIG [key=value ...]` on many.

Exit codes: 0 done; 1 this rank failed, or ended because another did, or saved because deepspeed's launcher was killed;
2 bad input; 3 too many non-finite steps in a row; 4 a checkpoint could not be written; 75 stopped by a signal after a
save. Rank 0 leaves them, but for 2, with the reason in the run folder's `exit.json`; see pretrain/runtime/watch.py for
what a rank that fails leaves.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from common import command
from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_PREEMPTED
from common.output import bear_loss
from pretrain.runtime.endings import EXIT_RECORD, leave_exit
from pretrain.runtime.signals import StopSignal

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.runtime.watch import Watch


def parser() -> argparse.ArgumentParser:
    """CONFIG and settings, and what deepspeed's launcher adds."""
    made = command.parser(
        "train",
        "Train a configuration on this process alone, without a launcher and without its checks of the machine: "
        "`overtone run` trains on many. Run again, it goes on from the newest whole checkpoint.",
        [
            "configs/quickstart.yaml train.micro_batch=16",
            "configs/quickstart.yaml head.distance=cosine run=runs/quickstart-cosine",
        ],
        "0 done; 2 bad input; 3 too many non-finite steps in a row; 4 a checkpoint could not be written; 75 stopped by "
        "a signal after a save, the same command goes on; 130 interrupted by a second Ctrl-C, unsaved",
    )
    command.add_config(made)
    command.add_rank_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on this rank; the exit codes are at the file's head."""
    bear_loss()
    with StopSignal() as stop:  # to the end: whoever stops a rank may say so again, and it would lose its code
        return command.run(partial(_start, stop), command.parse(parser(), argv))


def _start(stop: StopSignal, args: argparse.Namespace) -> int:
    from pretrain.config import check_data, check_layout, load
    from pretrain.run_folder import RunFolder
    from pretrain.runtime.claim import job_of
    from pretrain.runtime.environment import adopt, place_of
    from pretrain.runtime.watch import Watch, leave_refusal

    adopt(os.environ)  # who is the first is not known yet: each rank says what is wrong with it
    place = place_of(os.environ)
    first, first_here = place.rank == 0, place.local_rank == 0
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for noisy in ("torch", "DeepSpeed", "deepspeed", "zeus"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for kind in (UserWarning, FutureWarning):  # torch deprecates collectives' names that DeepSpeed still uses
        warnings.filterwarnings("ignore", category=kind, module="torch|deepspeed")
    try:
        cfg = load(args.config, args.overrides)
        job_of(os.environ)
    except ConfigError as error:
        leave_refusal(os.environ, place.rank, error)
        return command.refuse(error, says=first_here)
    with Watch(cfg, os.environ) as watch:
        try:
            check_layout(cfg, place.world, place.local_world)
            check_data(cfg)
            if place.world == 1:  # of many, the first one tells what the disk holds
                RunFolder(cfg.run).check_resume(cfg.resume)
            return _train(cfg, watch, stop, args.allow_different_code)
        except KeyboardInterrupt as error:
            print(error, file=sys.stderr)
            watch.fail(error, EXIT_INTERRUPTED)
        except ConfigError as error:
            command.refuse(error, says=first_here)
            watch.fail(error, EXIT_BAD_INPUT)


def _train(cfg: RunConfig, watch: Watch, stop: StopSignal, allow_code: bool) -> int:
    refused = None
    try:
        watch.hold()
    except ConfigError as error:
        if watch.world == 1:
            raise
        refused = str(error)  # for the others to hear too
    with command.importing():
        from pretrain.runtime import ranks as process  # torch: after the input was checked
        from pretrain.runtime.meeting import agree, check_shared, meet

    meeting = meet()
    watch.job, refused = meeting.decide("job", (watch.job, refused), lambda told: told[0])
    if refused:
        raise ConfigError(refused)
    agree(meeting, cfg, allow_code)
    check_shared(meeting, cfg.run)
    ranks = process.start(cfg=cfg, meeting=meeting)
    watch.pulse(cfg.timeouts.first_step_s)
    with command.importing():
        from pretrain.opening import open_run  # DeepSpeed: after it was told the device

    watch.join(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
    run = open_run(cfg, ranks, watch.pulse)
    outcome = run.train(stop)
    run.close()
    stops = [stop for stop in ranks.gather(watch.stopping) if stop is not None]
    if stops and outcome.code == EXIT_PREEMPTED:  # nobody sent a signal
        outcome = replace(outcome, code=stops[0].code, reason=stops[0].reason)
    watch.leave()
    process.stop()
    if ranks.first:
        try:
            leave_exit(cfg.run, str(watch.job), outcome.code, outcome.reason, outcome.step)
        except OSError as error:
            logging.error("%s: %s", cfg.run / EXIT_RECORD, error)
        if outcome.code:
            print(f"stopped at step {outcome.step}: {outcome.reason} (exit code {outcome.code})", file=sys.stderr)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
