"""Saving behind the training loop: a snapshot into host memory, then a thread of its own that writes, hashes, publishes
and deletes what is no longer kept.

One save at a time; a failure is told to the loop and leaves older checkpoints alone.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.storage import WriteResult

from common import checkout
from common.files import discard, flush, publish, replace_file, sha256_of
from common.strict_json import to_json
from pretrain.checkpoints.folder import (
    ABANDONED,
    DRAFT,
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    Progress,
    checkpoints,
    name_of,
    remove,
    step_of,
)
from pretrain.checkpoints.fragments import Fragment
from pretrain.config import CheckpointConfig
from pretrain.runtime.agreement import sees
from pretrain.runtime.ranks import Ranks

log = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says on which rank and why."""


@dataclass(frozen=True)
class Saved:
    """A save that was published."""

    path: Path
    step: int
    seconds: float  # from the start to the published folder
    size: int  # bytes, of all ranks


class _Writer(HuggingFaceStorageWriter):
    """Tells which files all ranks wrote, on the first of them: no folder's listing is trusted to be whole."""

    files: list[str] = []

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        self.files = sorted({result.storage_data.relative_path for rank in results for result in rank})
        super().finish(metadata, results)


class Snapshot:
    """Copies of fragments in host memory, in buffers that are made once and used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, fragments: Mapping[str, Fragment]) -> dict[str, Fragment]:
        """The fragments that this rank writes, copied."""
        copies = {}
        for name, fragment in fragments.items():
            if not fragment.writes:
                continue
            local = fragment.local
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            copies[name] = Fragment(buffer, fragment.start, fragment.numel())
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the next update changes what is still being copied
        return copies


class Saver:
    """All ranks together: `start` a save, `wait` for it once it is `done`, before the next one and before leaving."""

    def __init__(self, folder: Path, ranks: Ranks, cfg: CheckpointConfig, timeout_s: float = 1800) -> None:
        self.folder, self.ranks, self.cfg = folder, ranks, cfg
        self.group: Any = None  # versions of torch differ in the type that new_group gives
        if ranks.world > 1:  # of its own: its collectives run beside those of training
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._snapshot = Snapshot()
        self._running: Future[Saved] | None = None

    def start(self, fragments: Mapping[str, Fragment], progress: Progress, state: Mapping[str, Any]) -> None:
        """Takes a snapshot and begins to write `folder/step-N`; the save before it has been waited for."""
        assert self._running is None, "its buffers are still read"
        began = time.perf_counter()
        snapshot = self._snapshot.of(fragments)
        whole = {"format": FORMAT, **asdict(progress), **state, "versions": versions()}
        self._running = self._thread.submit(self._save, snapshot, whole, began, progress.best_step)

    def done(self) -> bool:
        """Whether a save has ended, well or not, and waits to be told."""
        return self._running is not None and self._running.done()

    def wait(self) -> Saved | None:
        """The save under way, once it ended; None if there is none.

        Raises:
            SaveError: it failed, on this rank or another.
        """
        running, self._running = self._running, None
        return None if running is None else running.result()

    def close(self) -> None:
        """Leaves the thread; a save under way ends first."""
        self._thread.shutdown(wait=True)

    def _save(self, fragments: dict[str, Fragment], state: dict[str, Any], began: float, best: int | None) -> Saved:
        final = self.folder / name_of(state["step"])
        draft = self.folder / f"{DRAFT}{final.name}"
        try:
            self._together(lambda: self._make(draft))
            names = self._together(lambda: self._write(fragments, draft))[0]
            files = self._together(lambda: self._hashed(draft, names))
            self._together(lambda: self._publish(draft, final, state, files, best))
        except SaveError:
            if self.ranks.first:
                with suppress(OSError):
                    discard(draft)  # if the disk is full, others need the room
            raise
        size = sum(entry["size"] for part in files for entry in part.values())
        return Saved(final, state["step"], time.perf_counter() - began, size)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Does a part of the save and waits for all ranks: the results by rank, or SaveError on all if one fails."""
        result, error = None, None
        try:
            result = work()
        except BaseException as problem:  # as torch's CheckpointException is: the other ranks must hear of it
            error = _told(problem, self.ranks.rank)
        outcomes: list[Any] = [(result, error)]
        if self.group is not None:
            outcomes = [None] * self.ranks.world
            dist.all_gather_object(outcomes, (result, error), group=self.group)
        errors = dict.fromkeys(error for _, error in outcomes if error)  # each once
        if errors:
            raise SaveError("; ".join(errors))
        return [value for value, _ in outcomes]

    def _make(self, draft: Path) -> None:
        if self.ranks.first:
            discard(draft)
            draft.mkdir()

    def _write(self, fragments: dict[str, Fragment], draft: Path) -> list[str]:
        """Writes this rank's part; the names of all ranks' files, on the first rank."""
        writer = _Writer(str(draft), save_distributed=True)
        dcp.save(dict(fragments), storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        return writer.files

    def _hashed(self, draft: Path, names: list[str]) -> dict[str, dict[str, Any]]:
        """This rank's share of the files, flushed, with sizes and hashes."""
        files = [draft / name for name in names[self.ranks.rank :: self.ranks.world]]
        for file in files:
            flush(file)
        return {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in files}

    def _publish(
        self, draft: Path, final: Path, state: dict[str, Any], files: list[dict[str, Any]], best: int | None
    ) -> None:
        if not self.ranks.first:
            return
        listed = {name: entry for part in files for name, entry in part.items()}
        apart = [name for name, entry in listed.items() if not sees(draft / name, entry["size"])]
        if apart:
            raise FileNotFoundError(
                f"{draft}: of {len(listed)} parts, {', '.join(apart)} cannot be seen on {gethostname()}: the ranks do "
                "not write into one folder. The run folder must be on storage that all hosts share"
            )
        (draft / STATE).write_text(to_json(state, indent=1))
        listed[STATE] = {"size": (draft / STATE).stat().st_size, "sha256": sha256_of(draft / STATE)}
        (draft / MANIFEST).write_text(to_json({"format": FORMAT, "files": listed}, indent=1))
        for later in checkpoints(self.folder):
            if step_of(later) >= step_of(final):
                abandon(later)
        publish(draft, final)
        try:
            replace_file(self.folder / LATEST, f"{final.name}\n")
            for old in superfluous(checkpoints(self.folder), self.cfg, best):
                remove(old)
        except OSError as problem:  # the checkpoint is there all the same
            log.warning("%s is saved, but putting the folder in order failed: %r", final, problem)


def _told(problem: BaseException, rank: int) -> str:
    """A problem of this rank, or those of the ranks that torch has collected."""
    failures = {rank: problem}
    if isinstance(problem, CheckpointException):
        failures = {failed: error for failed, (error, _) in problem.failures.items()}
    return "; ".join(f"rank {failed}: {error!r}" for failed, error in failures.items())


def abandon(later: Path) -> None:
    """Sets aside a checkpoint of steps that this run, resumed from before, trains anew: or `auto` would find it."""
    names = (f"{ABANDONED}{later.name}{end}" for end in ("", *(f"-{k}" for k in range(2, 1000))))
    aside = next(later.with_name(name) for name in names if not os.path.lexists(later.with_name(name)))
    log.warning("%s is of an earlier run beyond this one's resume: kept as %s", later.name, aside.name)
    os.replace(later, aside)


def superfluous(published: list[Path], cfg: CheckpointConfig, best: int | None) -> list[Path]:
    """The checkpoints, oldest first, that retention lets go: never the newest."""
    stays = set(published[-cfg.keep :])
    for path in published:
        step = step_of(path)
        if (cfg.keep_every and step % cfg.keep_every == 0) or (cfg.keep_best and step == best):
            stays.add(path)
    return [path for path in published if path not in stays]


@functools.cache
def versions() -> dict[str, str | None]:
    """What writes this checkpoint; the revision of this checkout is None outside git."""
    installed = checkout.versions()
    return {**{name: installed[name] for name in ("python", "torch", "deepspeed")}, "revision": checkout.revision()}
