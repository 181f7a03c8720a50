"""What must hold after every kill: whole checkpoints, never an older one; and at the end: the undisturbed figures."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import load_file

from pretrain.checkpoints import folder as checkpoint
from pretrain.checkpoints.contents import damage
from pretrain.checkpoints.folder import DRAFT, LATEST
from tests.support.records import read_records

HARMS = ("truncate", "flip", "remove")


class Fault(Exception):
    """Something that must not happen, in words."""


class Watchdog:
    """What must hold between two runs: published checkpoints are whole, and the newest whole one is never older."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = 0  # step of the newest whole checkpoint
        self._harmed: dict[str, int] = {}  # name -> time of the folder's last change, in ns

    def whole(self) -> list[Path]:
        """The whole checkpoints, oldest first.

        Raises:
            Fault: another is not, and nobody harmed it; or the newest was lost.
        """
        whole = []
        for path in checkpoint.checkpoints(self.folder):
            if self._harmed.get(path.name) == path.stat().st_mtime_ns:
                continue
            if wrong := damage(path):
                raise Fault(f"a published checkpoint is not whole: {wrong}")
            whole.append(path)
        newest = checkpoint.step_of(whole[-1]) if whole else 0
        if newest < self.newest:
            raise Fault(f"the newest whole checkpoint was step {self.newest} and is step {newest}")
        self.newest = newest
        return whole

    def harm(self, rng: random.Random) -> str | None:
        """Truncates, changes or removes a file of the newest whole checkpoint; None if it is the only one."""
        whole = self.whole()
        if len(whole) < 2:
            return None
        *_, before, victim = whole
        file = rng.choice(sorted(path for path in victim.iterdir() if path.stat().st_size))
        how = rng.choice(HARMS)
        if how == "remove":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            at = rng.randrange(len(content))
            if how == "truncate":
                del content[at:]
            else:
                content[at] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        os.utime(victim)
        self._harmed[victim.name] = victim.stat().st_mtime_ns
        self.newest = checkpoint.step_of(before)
        return how


def check_end(folder: Path, steps: int) -> None:
    """Raises Fault unless a finished run's checkpoints are in order."""
    saved = checkpoint.checkpoints(folder)
    if drafts := sorted(path.name for path in folder.glob(f"{DRAFT}*")):
        raise Fault(f"left over after the end: {', '.join(drafts)}")
    if not saved or checkpoint.step_of(saved[-1]) != steps:
        raise Fault(f"no checkpoint of the last step {steps}: {[path.name for path in saved]}")
    if (named := (folder / LATEST).read_text().strip()) != saved[-1].name:
        raise Fault(f"`{LATEST}` names {named}, the newest is {saved[-1].name}")
    if wrong := next(filter(None, map(damage, saved)), None):
        raise Fault(f"after the end a checkpoint is not whole: {wrong}")


def compare(whole: Path, cut: Path, steps: int, tolerance: float) -> float:
    """The greatest difference of a loss between two runs.

    Raises:
        Fault: the first difference beyond `tolerance`; a step that is missing or there twice; another batch.
    """
    expected, records_cut = read_records(whole), read_records(cut)
    worst = 0.0
    for kind, keys in (("train", ("loss", "batch", "tokens", "lr")), ("eval", ("loss", "bits_per_byte"))):
        a, b = ([record for record in records if record["kind"] == kind] for records in (expected, records_cut))
        if (have := [one["step"] for one in b]) != [one["step"] for one in a]:
            raise Fault(f"{kind} records are of the steps {first_odd(have)}")
        for was, now in zip(a, b, strict=True):
            for key in keys:
                approximate = tolerance and isinstance(was[key], float) and key != "lr"
                apart = abs(was[key] - now[key]) if isinstance(was[key], float) else 0.0
                if (apart > tolerance) if approximate else (was[key] != now[key]):
                    raise Fault(f"{kind}, step {was['step']}: {key} is {now[key]!r}, undisturbed {was[key]!r}")
                worst = max(worst, apart if key == "loss" else 0.0)
    if len([record for record in records_cut if record["kind"] == "train"]) != steps:
        raise Fault(f"there are not {steps} steps in {cut / 'metrics.jsonl'}")
    if not tolerance:
        one, other = (tensors(run / "checkpoints" / checkpoint.name_of(steps)) for run in (whole, cut))
        if wrong := next((name for name in {**one, **other} if one.get(name) != other.get(name)), None):
            raise Fault(f"the last checkpoint's {wrong} is not that of the undisturbed run")
    return worst


def first_odd(steps: Sequence[int]) -> str:
    """Where a sequence of step numbers does not count on."""
    odd = next((k for k, (a, b) in enumerate(itertools.pairwise([0, *steps])) if b != a + 1), None)
    return f"1 to {len(steps)}" if odd is None else f"..., {', '.join(map(str, steps[max(0, odd - 2) : odd + 2]))}, ..."


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint, by its file and name."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.name}: {name}": values.tobytes() for path in files for name, values in load_file(path).items()}
