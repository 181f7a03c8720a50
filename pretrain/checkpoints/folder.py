"""Checkpoints: whole or absent, verified when read, loadable into any layout; tensors in safetensors, the rest in JSON.

`checkpoints/step-00000100/` holds one safetensors file per rank (fragments with their offsets), `state.json` (step,
totals, resolved config, identity of data and tokenizer, layout, versions) and `manifest.json` (size and SHA-256 of the
others). pretrain/checkpoints/saver.py writes it under a draft name and renames it when whole; the file `latest` names
the newest.
Random numbers and the order of samples are functions of (seed, step, rank): there is no state of theirs to save.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from common.errors import ConfigError
from common.files import sha256_of
from common.settings import read_tree
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.checkpoints.fragments import Fragment, head_fragment
from pretrain.config import RunConfig, from_tree
from pretrain.runtime.ranks import Ranks

log = logging.getLogger(__name__)

FORMAT = 1
DRAFT = "draft-"  # what has this prefix was never finished
LATEST = "latest"  # a file that names the newest checkpoint
ABANDONED = "abandoned-"  # begins the name of one that was set aside
MANIFEST, STATE = "manifest.json", "state.json"

Check = Literal["full", "size"]

# What may differ between a checkpoint and the run that goes on from it: the layout, and what does not touch the
# weights.
FREE_SETTINGS = (
    "run",
    "resume",
    "resume_allow",
    "resume_check",
    "data.path",
    "model.activation_checkpointing",
    "model.attention",
    "model.compile",
    "head.chunk_mib",
    "head.fused",
    "train.micro_batch",
    "train.deterministic",
    "parallel",
    "evaluation",
    "checkpoint",
    "timeouts",
    "energy",
    "logging",
    "deepspeed",
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all that is neither a weight nor a moment."""

    step: int = 0  # updates asked for; the next one's number
    updates: int = 0  # updates taken: steps that were not skipped
    tokens: int = 0  # seen in training; the cursor of the data is step * sequences per step
    train_seconds: float = 0.0
    joules: Mapping[str, float] | None = None  # so far, of all phases, by the parts measured throughout; None: of none
    best_nats: float | None = None  # per held-out token: the least of all evaluations, that of `best_step`
    best_step: int | None = None
    stale: int = 0  # evaluations in a row since the best one

    @property
    def total_j(self) -> float | None:
        return total_j(self.joules)


def total_j(joules: object) -> float | None:
    """Of all parts in a checkpoint's `joules`; None if they are not told by part."""
    return float(sum(joules.values())) if isinstance(joules, Mapping) and joules else None


def identity(cfg: RunConfig, data_fingerprint: str, tokenizer_sha256: str | None) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    settings = _flat(cfg.model_dump(mode="json"))
    fixed = {k: v for k, v in settings.items() if not any(k == f or k.startswith(f + ".") for f in FREE_SETTINGS)}
    return {**fixed, "the data's fingerprint": data_fingerprint, "the tokenizer's hash": tokenizer_sha256}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}{key}"
        out.update(_flat(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return out


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a `checkpoints/` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name))


def remove(checkpoint: Path) -> None:
    """Renamed first, so that a deletion that is cut off leaves no half checkpoint under a good name."""
    doomed = checkpoint.with_name(f"{DRAFT}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def remove_drafts(folder: Path) -> None:
    """Removes what saves or deletions that were cut off have left."""
    for draft in folder.glob(f"{DRAFT}*"):
        log.warning("removing %s: a save that never finished", draft)
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink()


def damage(checkpoint: Path, check: Check = "full", share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Args:
        check: "full" reads every file and compares its hash with the manifest's, "size" its size alone.
        share: (k, n) looks at every n-th file from the k-th on.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{checkpoint}: format {manifest['format']}, this version reads {FORMAT}"
        listed = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST}: {error!r}"
    if STATE not in listed:
        return f"{checkpoint / MANIFEST}: it does not list {STATE}"
    strange = sorted(path.name for path in checkpoint.glob("*.safetensors") if path.name not in listed)
    if strange:  # the reader of tensors would take them too
        return f"{checkpoint / strange[0]}: the manifest does not list it"

    def problem(name: str) -> str | None:
        path, (size, sha256) = checkpoint / name, listed[name]
        try:
            found = path.stat().st_size
            if found != size:
                return f"{path}: {found} bytes instead of {size}"
            same = check == "size" or sha256_of(path) == sha256
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: {error}"
        return None if same else f"{path}: its SHA-256 is not the manifest's"

    with ThreadPoolExecutor() as pool:
        return next((found for found in pool.map(problem, sorted(listed)[share[0] :: share[1]]) if found), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def find(folder: Path, resume: str, ranks: Ranks | None = None, check: Check = "full") -> Path | None:
    """The checkpoint to go on from: the newest whole one of the run for `auto`, that of a given path, None for a
    fresh start. With `ranks`, all of them call it and share the reading.

    Raises:
        ConfigError: there are checkpoints but none is whole, or there were some; `never` in a folder that has some; a
        path that is no checkpoint.
    """
    path = Path(resume)
    if resume in ("auto", "never"):
        candidates = checkpoints(folder)
    else:
        candidates = [path] if (path / MANIFEST).exists() else checkpoints(path / "checkpoints")
    candidates = _as_the_first_sees_them(candidates, ranks)
    if resume == "never":
        if candidates:
            raise ConfigError(
                f"resume=never, but {folder} holds {len(candidates)} checkpoints, the newest {candidates[-1].name}. "
                "Use resume=auto to go on from it, or another run folder (run=...) to start afresh."
            )
        return None
    if not candidates and resume == "auto":
        traces = _as_the_first_sees_them([*folder.glob(LATEST), *sorted(folder.glob(f"{ABANDONED}*"))], ranks)
        if not traces:
            return None
        raise ConfigError(
            f"resume=auto: {folder} has no checkpoint, but there were some, as {traces[0]} tells. Put them back (one "
            "that was set aside is whole: give its path as resume=...), or start afresh with resume=never or in "
            "another run folder (run=...). Nothing was changed."
        )
    if not candidates:
        raise ConfigError(f"resume={resume}: neither a checkpoint nor a run folder with checkpoints, auto or never")
    share = (ranks.rank, ranks.world) if ranks else (0, 1)
    wrong = None
    for path in reversed(candidates):
        told = [damage(path, check, share)]
        if ranks and ranks.world > 1:
            told = ranks.gather(told[0])
        wrong = next((one for one in told if one), None)
        if wrong is None:
            if path != candidates[-1]:
                log.warning("going on from %s: what was trained after it is lost, and trained again", path.name)
            return path
        log.warning("not going on from %s: %s", path.name, wrong)
    raise ConfigError(
        f"resume={resume}: none of the {len(candidates)} checkpoints can be used; the oldest: {wrong}. Restore one, or "
        "start afresh in another run folder (run=...). Nothing was changed."
    )


def _as_the_first_sees_them(paths: list[Path], ranks: Ranks | None) -> list[Path]:
    """The first rank's paths, for all: a network file system may show others an older listing."""
    if ranks is None or ranks.world == 1:
        return paths
    return [Path(name) for name in ranks.gather([str(path) for path in paths])[0]]


def run_of(path: Path) -> Path:
    """The run folder that `path` is, or that the checkpoint `path` is of. Raises ConfigError if it is neither."""
    path = path.resolve()
    run = path.parent.parent if (path / MANIFEST).exists() else path
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{path}: neither a run folder nor a checkpoint of one (there is no {run / 'config.yaml'})")
    return run


def config_of(path: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The configuration of a run folder or checkpoint, for what has to be set before the ranks meet; None if it cannot
    be read, which they say together.
    """
    try:
        return from_tree(read_tree(run_of(path) / "config.yaml", overrides))
    except ConfigError:
        return None


def find_given(path: Path, ranks: Ranks | None = None) -> tuple[Path, Path]:
    """A run folder's newest whole checkpoint, or the checkpoint that `path` is; and its run folder.

    Raises:
        ConfigError: `path` is neither, or no checkpoint is whole.
    """
    path, run = path.resolve(), run_of(path)
    found = find(run / "checkpoints", "auto" if path == run else str(path), ranks)
    if found is None:
        raise ConfigError(f"{path}: there is no checkpoint in it yet; train it first")
    return found, run


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was when a checkpoint was written."""

    key: str
    was: Any
    now: Any
    verdict: str  # harmless, allowed, or refused


def audit(state: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str]) -> list[Difference]:
    """What differs between a checkpoint's state and the run that wants to go on from it, refusals first.

    `now` has the same `identity`, `config`, `layout` and `versions` as the state. Settings that do not touch the
    weights, the layout and versions are harmless; what is left of the identity is refused, unless `allow` names it (or
    a section above it).
    """
    newer = now["identity"].keys() - state["identity"].keys()
    newer |= _flat(now.get("config", {})).keys() - _flat(state.get("config", {})).keys()
    if newer:
        state = _as_read_today(state)
    found = []
    for key, was, is_now in _differing(state["identity"], now["identity"]):
        allowed = any(key == one or key.startswith(one + ".") for one in allow)
        found.append(Difference(key, was, is_now, "allowed" if allowed else "refused"))
    known = {one.key for one in found}
    for part in ("config", "layout", "versions"):
        for key, was, is_now in _differing(_flat(state.get(part, {})), _flat(now.get(part, {}))):
            if key not in known:
                found.append(Difference(key if part == "config" else f"{part}: {key}", was, is_now, "harmless"))
    return sorted(found, key=lambda one: ["refused", "allowed", "harmless"].index(one.verdict))


def _as_read_today(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's state with the settings that did not exist when it was written, at their defaults."""
    cfg = from_tree(state["config"])
    return {**state, "identity": {**identity(cfg, "", ""), **state["identity"]}, "config": cfg.model_dump(mode="json")}


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)]


def check_audit(checkpoint: Path, found: Sequence[Difference]) -> None:
    """Raises ConfigError if a difference is refused; else says them all, as a table."""
    refused = [one for one in found if one.verdict == "refused"]
    if refused:
        told = "; ".join(f"{one.key} was {one.was!r} and is {one.now!r}" for one in refused)
        keys = ", ".join(one.key for one in refused)
        raise ConfigError(
            f"{checkpoint} cannot be resumed with this configuration: {told}. Set back what changed, allow it "
            f"(resume_allow: [{keys}]), or start afresh in another run folder (run=...). Nothing was changed."
        )
    if found:
        table = Table("", "was", "is", "verdict", title=f"What differs from {checkpoint.name}", title_justify="left")
        for one in found:
            table.add_row(one.key, repr(one.was), repr(one.now), one.verdict)
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        log.info("%s", text.getvalue().rstrip())


def load(checkpoint: Path, fragments: Mapping[str, Fragment]) -> Progress:
    """Fills the fragments of all ranks from a checkpoint of any layout."""
    dcp.load(dict(fragments), storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    state = read_state(checkpoint)
    found = Progress(**{key: state.get(key, default) for key, default in asdict(Progress()).items()})
    return found if found.total_j is not None else replace(found, joules=None)


def load_weights(checkpoint: Path, decoder: Decoder, head: HarmonicHead) -> None:
    """Fills a whole decoder and this rank's part of a head with float32 weights, without DeepSpeed or a process
    group.
    """
    wanted = {f"trunk.{n}.fp32": Fragment(p.data.view(-1), 0, p.numel()) for n, p in decoder.named_parameters()}
    wanted |= {f"head.{n}.fp32": head_fragment(head, n, p.data) for n, p in head.named_parameters()}
    load_alone(checkpoint, wanted)


def load_alone(checkpoint: Path, fragments: Mapping[str, Fragment]) -> None:
    """Fills fragments from a checkpoint, in this process without others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(dict(fragments), storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
