"""What benchmarks share: this machine in words, tables, times, calls in processes of their own, a run to be timed.

torch is imported where it is asked for: help does without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from common.files import replace_file
from common.machine import cpu_name
from common.strict_json import plain, to_json

if TYPE_CHECKING:
    import torch

    from pretrain.batches import Batches
    from pretrain.config import RunConfig
    from pretrain.engine import Trainer
    from pretrain.runtime.ranks import Ranks

R = TypeVar("R")


def parser(name: str, document: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, which its module's first line describes, after the command if it begins so."""
    what = (document or "").split("\n")[0].split("`: ")[-1]
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=what[:1].upper() + what[1:])


def kept(out: Path | None, name: str = "runs") -> list[dict[str, Any]]:
    """What an earlier call of a benchmark has left in its JSON file under a name; nothing without one."""
    return list(json.loads(out.read_text())[name]) if out and out.exists() else []


def keep(out: Path | None, results: dict[str, Any]) -> None:
    """Replaces that file, if there is one to be: what was measured, and the machine."""
    if out:
        replace_file(out, to_json(plain({"machine": machine("cpu"), **results})) + "\n")


def in_processes(
    work: Callable[..., R], calls: Sequence[tuple[Any, ...]], count: int
) -> Iterator[tuple[tuple[Any, ...], R]]:
    """Calls `work` with each tuple of arguments, `count` at a time, in processes of their own; each call with what it
    gave, as they end.
    """
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(work, *call): call for call in calls}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def wide_console(width: int = 110) -> Console:
    """In a file too, a row is a line."""
    return Console(width=max(width, Console().width), highlight=False)


def markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in Markdown; the first row is its heading."""
    yield f"| {' | '.join(rows[0])} |"
    yield f"|{' --- |' * len(rows[0])}"
    for row in rows[1:]:
        yield f"| {' | '.join(row)} |"


def machine(device: str | torch.device) -> str:
    """What it computes with, in words."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def wait(device: torch.device | None) -> None:
    """Until the device has done what it was told; None: the processor, which has."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds."""
    wait(device)
    began = time.perf_counter()
    result = work()
    wait(device)
    spent = time.perf_counter() - began
    del result  # giving memory back is not part of it
    return spent


def apart(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it in a process of its own on a CPU; here on a GPU, whose allocator tells rows apart, and where every
    process would make a context anew.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        return function(*arguments)
    return alone(function, *arguments)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def batches_of(cfg: RunConfig, ranks: Ranks) -> Batches:
    """A rank's passes over the run's prepared training data, from step 0 on."""
    from data.loader import Windows
    from data.shards import open_split
    from pretrain.batches import Batches

    return Batches(Windows(open_split(cfg.data.path, "train"), cfg.model.seq_len, cfg.train.seed), cfg, ranks)


def trainer_of(cfg: RunConfig, eos_id: int | None = None) -> Trainer:
    """A trainer on this process's rank, new and in no run folder; `eos_id` as `Trainer` takes it. Collective."""
    from pretrain.runtime import ranks as process

    ranks = process.start_command()
    from pretrain.engine import Trainer  # DeepSpeed asks which accelerator there is: the start has told it

    return Trainer(cfg, process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world)), eos_id)
