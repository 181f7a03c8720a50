"""`overtone plan CONFIG`: the plan of a run (launch/estimate.py) as tables or as plain values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from common import command
from common.gpus import GIB, GPUS
from common.strict_json import to_json
from common.units import duration, energy
from launch.cluster import Cluster
from launch.estimate import Plan, assumptions, plan


def parser() -> argparse.ArgumentParser:
    """CONFIG, the GPUs to plan for, and what to assume of them."""
    made = command.parser(
        "plan",
        "Plan a run: parameters, memory of a GPU, traffic, time and energy. Arithmetic on stated assumptions: needs no "
        "GPU and no data, and measures nothing.",
        [
            "configs/gpt2-124m-untied.yaml --gpus 32",
            "configs/gpt2-1.5b-untied.yaml --gpus 64 --gpu a100-40gb --link 12.5 parallel.zero=3",
            "configs/gpt2-124m-untied.yaml --budget-tokens 10e9 --json",
        ],
    )
    command.add_config(made, "configs/gpt2-1.5b.yaml")
    default = Cluster()
    made.add_argument("--gpus", type=int, metavar="N", default=default.gpus, help="of all nodes (%(default)s)")
    made.add_argument("--gpu", metavar="NAME", default=default.gpu, help=f"{', '.join(GPUS)} (%(default)s)")
    made.add_argument("--gpus-per-node", type=int, metavar="N", default=default.per_node, help="(%(default)s)")
    made.add_argument(
        "--link", type=float, metavar="GB/S", help="between nodes, per GPU and direction (default: reference system's)"
    )
    made.add_argument(
        "--node-link", type=float, metavar="GB/S", help="inside a node, per GPU and direction, such as 64 for PCIe 5.0 "
        "(default: the GPU's, mostly NVLink)",
    )  # fmt: skip
    made.add_argument("--host-memory", type=float, metavar="GIB", help="of each host (default: reference system's)")
    made.add_argument(
        "--mfu", type=float, metavar="F", default=default.mfu, help="fraction of the peak that is reached (%(default)s)"
    )
    made.add_argument("--watts", type=float, metavar="W", help="drawn by a GPU (default: the most that it takes)")
    made.add_argument("--budget-tokens", type=float, metavar="N", help="of the whole run (default: of train.steps)")
    made.add_argument("--json", action="store_true", help="plain values instead of tables")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; exit code 2 where the GPUs cannot share the run."""
    return command.run(tell, command.parse(parser(), argv))


def tell(asked: argparse.Namespace) -> None:
    """Prints the plan that the command line asks for. Raises ConfigError."""
    from pretrain.config import load

    cfg = load(asked.config, asked.overrides)
    cluster = Cluster(
        gpu=asked.gpu,
        gpus=asked.gpus,
        per_node=asked.gpus_per_node,
        network_bytes_s=None if asked.link is None else asked.link * 1e9,
        node_bytes_s=None if asked.node_link is None else asked.node_link * 1e9,
        host_bytes=None if asked.host_memory is None else asked.host_memory * GIB,
        mfu=asked.mfu,
        watts=asked.watts,
    )
    found = plan(cfg, cluster, asked.budget_tokens)
    if asked.json:
        print(to_json(found.as_dict(), indent=1))
    else:
        _print(found)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _print(planned: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(120, Console().width), highlight=False)
    own, cluster, time = planned.parameters, planned.cluster, planned.time
    tables = [
        f"token embedding {own.token_embedding:,}" if own.token_embedding else "tied: the prototypes embed tokens too",
        *([f"positions {own.positions:,}"] if own.positions else []),
    ]
    console.print(f"{own.total:,} parameters: trunk {own.trunk:,} ({', '.join(tables)}), head {own.head:,}")
    passes = f"{planned.accumulation} pass{'es' * (planned.accumulation > 1)}"
    console.print(
        f"{cluster.gpus} x {cluster.gpu}, {cluster.ranks_per_node} in a node; ZeRO {planned.zero}, vocabulary groups "
        f"of {planned.vocab_ranks}, {passes} per step. Planned, not measured."
    )
    console.print(_memory_table(planned, Table(title="memory of a GPU, GiB", title_justify="left")))
    for name, size in planned.activation_bytes.items():
        console.print(f"activations {name}: {_gib(size)} GiB")
    for line in _room(planned):
        console.print(line)
    console.print(_traffic_table(planned, Table(title="what a GPU sends in a step", title_justify="left")))
    console.print(
        f"a step takes {duration(time.total_s)}: {duration(time.compute_s)} computing, {duration(time.exposed_s)} "
        f"waiting for communication, {duration(time.update_s)} updating; {planned.tokens_per_s:,.0f} tokens/s"
    )
    if planned.faster:
        gain = planned.time.total_s / planned.faster_s
        words = " ".join(planned.faster)
        console.print(f"faster: {words}: {duration(planned.faster_s)} a step, {gain:.2f} times as fast")
    spent = f"{duration(planned.seconds)} and {energy(planned.gpu_j)}"
    console.print(f"{planned.budget_tokens:,} tokens take {spent}{_of_site(planned)}")
    for note in planned.notes:
        console.print(f"note: {note}")
    console.print("assumed:")
    for line in assumptions(cluster):
        console.print(f"- {line}")


def _traffic_table(planned: Plan, table: Any) -> Any:
    """What a GPU sends, a row for each collective."""
    for head in ("", "", "ranks", "calls", "sent in its node, MB", "between nodes, MB", "takes", "hidden behind"):
        table.add_column(head)
    for collective in planned.collectives:
        sent = (collective.wire - collective.between_nodes, collective.between_nodes)
        table.add_row(
            collective.what, collective.kind, str(collective.ranks), f"{collective.calls:,}",
            *(f"{size / 1e6:,.1f}" for size in sent),
            duration(collective.seconds(planned.cluster.hardware)), collective.behind,
        )  # fmt: skip
    return table


def _room(planned: Plan) -> Iterator[str]:
    """Whether it fits, on GPUs, hosts and disks, and what would make it fit."""
    verdict, most = "fits" if planned.fits else "does not fit", planned.memory
    yield f"{verdict}: {_gib(most.peak)} of {_gib(planned.usable_bytes)} GiB, in the phase `{most.fullest}`"
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in planned.host.items())
    of = _gib(planned.cluster.usable_host_bytes)
    yield f"memory of a host: {_gib(sum(planned.host.values()))} of {of} GiB: {parts}"
    yield f"a checkpoint: {_gib(planned.checkpoint_bytes)} GiB; all that stay: {_gib(planned.disk_bytes)} GiB"
    if planned.changes is None:
        yield "no change of checkpointing, ZeRO stage, vocabulary group, micro-batch, GPUs or offload makes it fit"
    elif planned.changes:
        yield f"it would with {' '.join(planned.changes)}"
    yield f"largest micro-batch that fits: {planned.largest_micro_batch or 'none'}"


def _of_site(planned: Plan) -> str:
    """What `energy.pue`, grid and price make of the GPUs' energy; empty where none is given."""
    site = [energy(planned.site_kwh * 3.6e6)] if planned.energy.pue != 1 else []
    site += [] if planned.gco2e is None else [f"{planned.gco2e / 1e3:,.4g} kgCO2e"]
    site += [] if planned.cost is None else [f"{planned.cost:,.2f} in the currency of energy.price_per_kwh"]
    return f"; of the site: {', '.join(site)}" if site else ""


def _memory_table(planned: Plan, table: Any) -> Any:
    """Kinds of memory by ZeRO stage, standing ones and those of the fullest phase."""
    table.add_column("")
    rows: dict[str, dict[int, int]] = {}
    for stage, used in planned.memory_by_stage.items():
        table.add_column(f"ZeRO {stage}", justify="right")
        for name, size in (*used.standing.items(), *used.phases[used.fullest].items()):
            if size:
                rows.setdefault(name, {})[stage] = size
    for name, sizes in rows.items():
        table.add_row(name, *(_gib(sizes[stage]) if stage in sizes else "" for stage in planned.memory_by_stage))
    table.add_row("peak", *(_gib(used.peak) for used in planned.memory_by_stage.values()))
    table.add_row("in the phase", *(used.fullest for used in planned.memory_by_stage.values()))
    return table
