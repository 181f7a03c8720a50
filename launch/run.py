"""python -m launch run CONFIG [key=value ...]: checks a training job, then runs it with deepspeed.

`python -m launch doctor` examines the hosts for one; `python -m launch plan` tells what it will take; `python -m launch
slurm` writes a script that runs it under Slurm.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT
from common.variables import JOB_VARIABLE
from launch import plan, slurm
from launch.hosts import Placement, place
from launch.job import End
from pretrain.config import RunConfig, load
from pretrain.runtime.claim import Claim


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the job's exit code, 2 for input that cannot be used (standard error tells why)."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Plan and run training jobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="check a config, its data and the layout, then train it with deepspeed",
        description="Check a config, its data, the layout and the hosts, then train it with deepspeed. Exit codes: 0 "
        "done; 2 bad input; 3 too many non-finite steps; 4 a checkpoint could not be written; 75 stopped by a signal "
        "after a save, the same command goes on; 128 + N: a rank was killed by signal N and none told why; others: a "
        "rank failed.",
    )
    job.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
    _add_job(job)
    about = "examine this machine, or the hosts of a hostfile: versions, data, disks, clocks, network"
    examined = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help=about,
        description=f"{about.capitalize()}. Exit codes: 0 nothing is wrong; 1.",
    )
    examined.add_argument("config", metavar="CONFIG", nargs="?", help="also its data and its run folder")
    _add_hosts(examined)
    planned = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="what a config will take: memory of a GPU, traffic, time and energy, without running anything",
        description="Plan a run: parameters, memory of a GPU, traffic, time and energy. Arithmetic on stated "
        "assumptions: needs no GPU and no data, and measures nothing. Exit code 2: bad input.",
    )
    plan.add_options(planned)
    queued = commands.add_parser(
        "slurm",
        allow_abbrev=False,
        help="write an sbatch script that runs a job under Slurm and queues it again when it is stopped; submit it",
        description="Check a config, its data and the layout, then write an sbatch script into the run folder, and "
        "submit it if asked to. The job saves before its time is over, and whenever it is told to stop, and is queued "
        "again until it is done. Exit codes: 0 done; 2 bad input, or Slurm refuses the script.",
    )
    slurm.add_options(queued)
    asked, rest = parser.parse_known_args(arguments)  # argparse takes no positional after an option
    if asked.command == "doctor" and asked.config is None and rest and not rest[0].startswith("-"):
        asked.config = rest.pop(0)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        commands.choices[asked.command].error(f"unknown: {' '.join(unknown)}; expected key=value or one of the options")
    overrides = [*asked.overrides, *rest]
    try:
        cfg = None if asked.config is None else load(asked.config, overrides)
        if asked.command == "plan":
            assert cfg is not None
            return plan.tell(asked, cfg)
        if asked.command == "slurm":
            assert cfg is not None
            slurm.queue(asked, cfg, overrides)
            return 0
        placement = place(
            asked.hostfile, asked.num_gpus, include=asked.include, exclude=asked.exclude, hosts=asked.num_nodes
        )
        if asked.command == "doctor":
            from launch.doctor import doctor

            return doctor(placement, cfg)
        assert cfg is not None
        return _run(asked, cfg, overrides, placement)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_hosts(job: argparse.ArgumentParser) -> None:
    job.add_argument("overrides", metavar="key=value", nargs="*", help="changes a setting, such as train.steps=100")
    job.add_argument("--hostfile", type=Path, metavar="H", help="use its hosts: a line `HOST slots=N` for each")
    job.add_argument("--include", default="", metavar="S", help="only these hosts and slots: node1@node2:0,2")
    job.add_argument("--exclude", default="", metavar="S", help="all but these hosts and slots")
    job.add_argument("--num-nodes", type=int, metavar="N", help="only the first N hosts of the hostfile")
    job.add_argument(
        "--num-gpus", type=int, metavar="N", help="ranks on each host (default: every GPU; 2 where none is)"
    )


def _add_job(job: argparse.ArgumentParser) -> None:
    _add_hosts(job)
    job.add_argument(
        "--launcher",
        choices=("pdsh", "openmpi", "slurm", "none"),
        default="pdsh",
        help="how the hosts are reached; none: run the same command on each of them (default %(default)s)",
    )
    job.add_argument("--node-rank", type=int, metavar="K", help="--launcher none: this is host K of them, from 0")
    job.add_argument("--master-port", type=int, metavar="P", help="where the ranks meet (default: a free port)")
    job.add_argument("--max-restarts", type=int, default=0, metavar="N", help="start a failed job again, up to N times")
    job.add_argument("--elastic", action="store_true", help="restarts go without hosts that do not answer")
    job.add_argument("--dry-run", action="store_true", help="check everything, print the deepspeed command, and stop")


def _run(asked: argparse.Namespace, cfg: RunConfig, overrides: Sequence[str], placement: Placement) -> int:
    from launch import invocation
    from launch.restart import keep_running

    invocation.check_launcher(placement, asked.launcher)
    invocation.check(cfg, placement)
    if asked.max_restarts < 0:
        raise ConfigError(f"--max-restarts {asked.max_restarts}: expected 0 or more")
    if asked.max_restarts and cfg.resume != "auto":
        raise ConfigError(
            f"--max-restarts with resume={cfg.resume}: a job that is started again would not go on from its own newest "
            "checkpoint. Set resume=auto; to begin elsewhere, train to the first checkpoint without --max-restarts"
        )
    by_ssh = placement.hostfile is not None and asked.launcher in ("pdsh", "openmpi")
    if asked.elastic and not by_ssh:
        raise ConfigError("--elastic: it chooses among the hosts of a --hostfile, which pdsh or OpenMPI reaches")
    if asked.max_restarts and asked.launcher in ("none", "slurm"):
        raise ConfigError(
            f"--max-restarts: with --launcher {asked.launcher} each host has a launcher of its own, and none sees all "
            "hosts; whatever starts them restarts"
        )
    if not asked.dry_run:
        invocation.check_tools(placement, asked.launcher)

    def start(placement: Placement) -> End:
        return _start(asked, cfg, overrides, placement)

    return keep_running(start, cfg, placement, restarts=asked.max_restarts, elastic=asked.elastic)


def _start(asked: argparse.Namespace, cfg: RunConfig, overrides: Sequence[str], placement: Placement) -> End:
    """Runs the job once, or prints how, for a dry run."""
    from launch import invocation, job
    from launch.lease import take
    from launch.reach import answers

    launcher = asked.launcher if placement.hostfile is not None else None
    if launcher == "slurm":
        words = invocation.srun(asked.config, overrides, placement, port=asked.master_port)
        print(invocation.one_line(words, {}), flush=True)
        if not asked.dry_run:
            os.execvp(words[0], words)  # it hands signals to the launchers on the hosts, and their exit codes back
        return job.DONE
    facts = answers(placement) if launcher in ("pdsh", "openmpi") else {}
    node = None
    if launcher == "none":
        node = asked.node_rank
        if node is None:
            node = 0 if asked.dry_run else invocation.own_node(placement)
        if not 0 <= node < len(placement.ranks):
            raise ConfigError(f"--node-rank {node}: {placement.hostfile} has hosts 0 to {len(placement.ranks) - 1}")
    address, port = invocation.meeting_point(placement, facts) if launcher else (None, None)
    port = asked.master_port or port or invocation.free_port()

    def command_for(node: int | None, claim: Claim | None = None) -> tuple[list[str], dict[str, str]]:
        folder = cfg.run if launcher == "pdsh" else None
        added = invocation.environment(placement, facts, claim=claim, node=node, folder=folder)
        if launcher == "openmpi":
            added |= {"MASTER_ADDR": str(address), "MASTER_PORT": str(port)}
        words = invocation.command(
            asked.config,
            overrides,
            placement,
            launcher=launcher or "pdsh",
            address=address,
            port=port,
            node=node or 0,
            folder=cfg.run,
            exports=list(added),
        )
        return words, added

    if asked.dry_run:
        for number, host in enumerate(placement.ranks) if node is not None else [(None, "")]:
            print((f"{host}: " if host else "") + invocation.one_line(*command_for(number)), flush=True)
        return job.DONE
    grace_s = max(job.GRACE_S, cfg.checkpoint.grace_s)
    patience_s = cfg.timeouts.rendezvous_s if node else cfg.timeouts.heartbeat_s + grace_s
    with take(cfg.run, placement, node, patience_s) as claim:
        words, added = command_for(node, claim)
        told = {name: value for name, value in added.items() if name != JOB_VARIABLE}  # given again, it is another job
        print(invocation.one_line(words, told), flush=True)
        if launcher in ("pdsh", "openmpi"):
            invocation.write_files(placement, facts, claim.run, claim=claim)
        return job.run(words, added, claim, placement, node=node, grace_s=grace_s)


if __name__ == "__main__":
    sys.exit(main())
