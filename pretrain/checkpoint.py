"""Checkpoints: whole or absent, verified when read, loadable into any layout; tensors in safetensors, the rest in JSON.

`checkpoints/step-00000100/` holds one safetensors file per rank (fragments with their offsets), `state.json` (step,
cursor, totals, identity of config, data and tokenizer) and `manifest.json` (size and SHA-256 of the others). It is
written under a draft name, flushed, and renamed when whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from data.files import publish, sha256_of
from data.settings import ConfigError
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.config import RunConfig
from pretrain.fragments import Fragment, head_fragment
from pretrain.ranks import Ranks

log = logging.getLogger(__name__)

FORMAT = 1
DRAFT = "draft-"  # a folder of this prefix was never finished

# What may differ between a checkpoint and the run that goes on from it: the layout, and what does not touch the
# weights.
FREE_SETTINGS = (
    "run",
    "resume",
    "data.path",
    "model.activation_checkpointing",
    "model.compile",
    "head.chunk_mib",
    "train.micro_batch",
    "parallel",
    "evaluation",
    "checkpoint",
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
    train_gpu_j: float | None = None  # None: not measured


def identity(cfg: RunConfig, data_fingerprint: str, tokenizer_sha256: str) -> dict[str, Any]:
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


def save(
    folder: Path,
    fragments: Mapping[str, Fragment],
    progress: Progress,
    who: Mapping[str, Any],
    layout: Mapping[str, Any],
    ranks: Ranks,
    keep: int,
) -> Path:
    """Writes `folder/step-N` from all ranks together and then deletes all but the newest `keep`. Returns its path."""
    final = folder / f"step-{progress.step:08d}"
    draft = folder / f"{DRAFT}{final.name}"
    if ranks.first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    ranks.barrier()
    dcp.save(dict(fragments), storage_writer=HuggingFaceStorageWriter(str(draft), save_distributed=True))
    ranks.barrier()
    if ranks.first:
        versions = {"torch": torch.__version__}
        state = {"format": FORMAT, **asdict(progress), "identity": who, "layout": layout, "versions": versions}
        (draft / "state.json").write_text(json.dumps(state, indent=1))
        _write_manifest(draft)
        if final.exists():  # the same step, saved again after a resume from before it
            _remove(final)
        publish(draft, final)
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    ranks.barrier()
    return final


def _write_manifest(draft: Path) -> None:
    files = sorted(path for path in draft.iterdir() if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(sha256_of, files)
    manifest = {f.name: {"size": f.stat().st_size, "sha256": h} for f, h in zip(files, hashes, strict=True)}
    (draft / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": manifest}, indent=1))


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a `checkpoints/` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _remove(checkpoint: Path) -> None:
    """Renamed first, so that a deletion that is cut off leaves no half checkpoint under a good name."""
    doomed = checkpoint.with_name(f"{DRAFT}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def remove_drafts(folder: Path) -> None:
    """Removes what saves or deletions that were cut off have left."""
    for draft in folder.glob(f"{DRAFT}*"):
        log.warning("removing %s: a save that never finished", draft)
        shutil.rmtree(draft)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: every file is read and compared with the manifest."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        listed = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{checkpoint}: format {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{checkpoint / 'manifest.json'}: {error!r}"

    def problem(name: str) -> str | None:
        path, expected = checkpoint / name, listed[name]
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != expected["size"]:
            return f"{path}: {path.stat().st_size} bytes instead of {expected['size']}"
        return None if sha256_of(path) == expected["sha256"] else f"{path}: its SHA-256 is not the manifest's"

    with ThreadPoolExecutor() as pool:
        return next((found for found in pool.map(problem, listed) if found), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: the newest whole one of the run for `auto`, that of a given path, None for a
    fresh start.

    Raises:
        ConfigError: there are checkpoints but none is whole; `never` in a folder that has some; a path that is no
        checkpoint.
    """
    if resume in ("auto", "never"):
        candidates = checkpoints(folder)
        if resume == "never":
            if candidates:
                raise ConfigError(
                    f"resume=never, but {folder} holds {len(candidates)} checkpoints, the newest "
                    f"{candidates[-1].name}. "
                    "Use resume=auto to go on from it, or another run folder (run=...) to start afresh."
                )
            return None
        if not candidates:
            return None
    else:
        path = Path(resume)
        candidates = [path] if (path / "manifest.json").exists() else checkpoints(path / "checkpoints")
        if not candidates:
            raise ConfigError(f"resume={resume}: neither a checkpoint nor a run folder with checkpoints, auto or never")
    for path in reversed(candidates):
        wrong = damage(path)
        if wrong is None:
            return path
        log.warning("not going on from %s: %s", path.name, wrong)
    raise ConfigError(
        f"resume={resume}: none of the {len(candidates)} checkpoints can be used; the newest: {wrong}. Restore "
        f"it, or start "
        "afresh in another run folder (run=...). Nothing was changed."
    )


def check_identity(checkpoint: Path, who: Mapping[str, Any]) -> None:
    """Raises ConfigError if the run's fixed settings, data or tokenizer are not the checkpoint's."""
    saved = read_state(checkpoint)["identity"]
    differing = [k for k in {**saved, **who} if saved.get(k) != who.get(k)]
    if differing:
        told = "; ".join(f"{k} was {saved.get(k)!r} and is {who.get(k)!r}" for k in differing)
        raise ConfigError(
            f"{checkpoint} cannot be resumed with this configuration: {told}. Set back what changed, or start "
            f"afresh in "
            "another run folder (run=...). Nothing was changed."
        )


def load(checkpoint: Path, fragments: Mapping[str, Fragment]) -> Progress:
    """Fills the fragments of all ranks from a checkpoint of any layout."""
    dcp.load(dict(fragments), storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    state = read_state(checkpoint)
    return Progress(**{key: state[key] for key in asdict(Progress())})


def load_weights(checkpoint: Path, decoder: Decoder, head: HarmonicHead) -> None:
    """Fills a whole decoder and this rank's part of a head with float32 weights, without DeepSpeed or a process
    group.
    """
    wanted = {f"trunk.{n}.fp32": Fragment(p.data.view(-1), 0, p.numel()) for n, p in decoder.named_parameters()}
    wanted |= {f"head.{n}.fp32": head_fragment(head, n, p.data) for n, p in head.named_parameters()}
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
