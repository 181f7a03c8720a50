"""Checkpoints written without training, and their files taken apart and put together again, so that tests can say what
is in them and have the manifest agree.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoints.contents import METADATA, SHARDING, SUFFIX, sizes_of
from pretrain.checkpoints.folder import FORMAT, MANIFEST, MOMENTS, STATE, Progress, name_of
from pretrain.checkpoints.resume import identity
from pretrain.config import RunConfig

Tree = dict[str, Any]


def write_checkpoint(folder: Path, cfg: RunConfig, step: int, ranks: int = 1) -> Path:
    """A whole checkpoint in `folder` as that many ranks write it, each its part of every tensor; other values at every
    step.
    """
    path = folder / name_of(step)
    path.mkdir(parents=True)
    random = np.random.default_rng(step)
    sizes = sizes_of(cfg.model, cfg.head).items()
    wholes = {f"{name}.{what}": random.random(size, np.float32) for name, size in sizes for what in ("fp32", *MOMENTS)}
    for rank in range(ranks):
        offsets, tensors = {}, {}
        for name, whole in wholes.items():
            first, end = (len(whole) * k // ranks for k in (rank, rank + 1))
            if end > first:
                offsets[name], tensors[name] = {"saved_offsets": [first]}, whole[first:end]
        about = {METADATA: {"format": "pt", "DCP_VERSION": "1.0", SHARDING: json.dumps(offsets)}}
        write_tensors(path / f"shard-{rank + 1:05d}-model-00001-of-00001{SUFFIX}", about, tensors)
    state = {"format": FORMAT, **asdict(Progress(step=step, updates=step, tokens=step * cfg.train.tokens_per_step))}
    state |= {"identity": identity(cfg, "the data", "the tokenizer"), "config": cfg.model_dump(mode="json")}
    layout = {"world": ranks, "parallel": cfg.parallel.model_dump(mode="json")}
    (path / STATE).write_text(json.dumps({**state, "layout": layout, "versions": {}}))
    seal(path)
    return path


def write_tensors(file: Path, header: Tree, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file; `header` is what it says beside its tensors."""
    end, listed = 0, dict(header)
    for name, values in tensors.items():
        listed[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    write_parts(file, json.dumps(listed).encode(), b"".join(values.tobytes() for values in tensors.values()))


def write_parts(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file of these bytes. `length`: what it says of its header's; None: the truth."""
    said = len(header) if length is None else length
    file.write_bytes(said.to_bytes(8, "little") + header + data)


def read_parts(file: Path) -> tuple[Tree, bytes]:
    """A safetensors file's header and data."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def seal(checkpoint: Path) -> None:
    """Has the manifest agree with the files that are there."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST and path.is_file())
    listed = {path.name: entry_of(path.read_bytes()) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": listed}))


def entry_of(content: bytes) -> Tree:
    """What a manifest says of a file."""
    return {"size": len(content), "sha256": sha256(content).hexdigest()}


def as_json(tree: Any) -> bytes:
    """As Python writes it: with NaN, and with halves of characters as escapes."""
    return json.dumps(tree).encode()
