"""Reading a checkpoint beside the run that writes it, which deletes its older ones.

Who reads a checkpoint holds a shared lock on its folder, and the run leaves one alone that is locked. Where the file
system has no locks between hosts, a checkpoint may still go while it is read: that is found out, and is no damage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.errors import ConfigError
from common.files import lock

if TYPE_CHECKING:
    from pretrain.runtime.ranks import Ranks

TRIES = 10  # newest checkpoints that may vanish in a row

Result = TypeVar("Result")


class Vanished(ConfigError):
    """A checkpoint was deleted, or another one took its name, while it was read."""


def _vanished(checkpoint: Path) -> Vanished:
    return Vanished(
        f"{checkpoint}: it was deleted while it was read, as a run that trains does with its older ones; give the run "
        "folder, for the newest, or a checkpoint that stays (checkpoint.keep, checkpoint.keep_every)"
    )


@contextmanager
def held(checkpoint: Path) -> Iterator[None]:
    """Keeps the run from deleting a checkpoint in the block, where the file system has locks.

    Raises:
        Vanished: it is not there, or was not when the block ended, however that ended.
    """
    try:
        handle = os.open(checkpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise _vanished(checkpoint) from None
    try:
        if not _locked(handle, shared=True) or _gone(checkpoint, handle):
            raise _vanished(checkpoint)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:  # as torch's CheckpointException is
            if _gone(checkpoint, handle):
                raise _vanished(checkpoint) from None
            raise
        if _gone(checkpoint, handle):
            raise _vanished(checkpoint)
    finally:
        os.close(handle)


@contextmanager
def unread(checkpoint: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint, which then nobody begins to in the block."""
    try:
        handle = os.open(checkpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # no folder
        yield True
        return
    try:
        yield _locked(handle, shared=False)
    finally:
        os.close(handle)


def _locked(handle: int, shared: bool) -> bool:
    try:
        return lock(handle, shared=shared)
    except OSError:  # no locks on folders here
        return True


def _gone(checkpoint: Path, handle: int) -> bool:
    try:
        now, then = os.stat(checkpoint), os.fstat(handle)
    except OSError:
        return True
    return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)


def agreed(ranks: Ranks | None, work: Callable[[], Result]) -> Result:
    """Does what each rank does without the others; where it fails on one with a ConfigError, raises that on all.
    Collective.
    """
    result: Result | None = None
    error: ConfigError | None = None
    try:
        result = work()
    except ConfigError as problem:
        error = problem
    plain = None if error is None else (isinstance(error, Vanished), str(error))
    failed = next(filter(None, ranks.gather(plain) if ranks else [plain]), None)
    if failed is not None:
        raise (Vanished if failed[0] else ConfigError)(failed[1])
    return result  # type: ignore[return-value]


@contextmanager
def held_by_all(checkpoint: Path | None, ranks: Ranks | None) -> Iterator[None]:
    """As `held`, with all ranks, which raise together. Collective. None: there is nothing to hold."""
    with ExitStack() as stack:
        if checkpoint is not None:
            agreed(ranks, lambda: stack.enter_context(held(checkpoint)))
        yield
        agreed(ranks, stack.close)


def looked_at(checkpoint: Path, damage: Callable[[], str | None]) -> str | None:
    """What is wrong with a checkpoint, which is held while it is looked at. Raises Vanished."""
    try:
        with held(checkpoint):
            return damage()
    except Vanished:
        if not os.path.lexists(checkpoint):
            raise
        if checkpoint.is_symlink() and not checkpoint.exists():
            return f"{checkpoint}: a link to {os.readlink(checkpoint)}, which is not there"
        return damage()


def again(work: Callable[[], Result]) -> Result:
    """Calls what chooses a checkpoint and reads it again while the one that it chose vanishes. Raises Vanished."""
    for _ in range(TRIES - 1):
        try:
            return work()
        except Vanished:
            continue
    return work()
