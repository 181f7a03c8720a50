"""A checkpoint's float32 weights as plain safetensors, from any layout, without DeepSpeed and without a process group.

`decoder.*` and `head.*` in files of limited size, with the index that Hugging Face's loaders read (its metadata has the
step, which an exponent's ramp needs). One file's tensors are in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import ConfigError
from common.files import discard, publish
from common.strict_json import to_json
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.checkpoints.contents import read_state
from pretrain.checkpoints.folder import DRAFT
from pretrain.checkpoints.fragments import Fragment
from pretrain.checkpoints.loading import load_alone
from pretrain.config import RunConfig
from pretrain.modules import build_modules
from pretrain.runtime.ranks import Ranks

INDEX = "model.safetensors.index.json"


def without_weights(cfg: RunConfig) -> tuple[Decoder, HarmonicHead]:
    """The decoder and the head of the whole vocabulary, on the meta device."""
    meta = torch.device("meta")
    with meta:
        return build_modules(cfg, Ranks(0, 1, 0, 1, meta))


def shapes(decoder: Decoder, head: HarmonicHead) -> dict[str, torch.Size]:
    """Every weight's name in the exported files, and its shape."""
    parts: dict[str, nn.Module] = {"decoder": decoder, "head": head}
    return {f"{part}.{name}": p.shape for part, module in parts.items() for name, p in module.named_parameters()}


def stored_name(name: str) -> str:
    """In the checkpoint."""
    part, _, rest = name.partition(".")
    return f"{'trunk' if part == 'decoder' else part}.{rest}.fp32"


def groups(sizes: Mapping[str, torch.Size], most: float) -> Iterator[list[str]]:
    """Names in order, as many at a time as fit `most` bytes of float32; one at least."""
    chosen: list[str] = []
    held = 0
    for name, shape in sizes.items():
        if chosen and held + 4 * shape.numel() > most:
            yield chosen
            chosen, held = [], 0
        chosen.append(name)
        held += 4 * shape.numel()
    if chosen:
        yield chosen


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft of the folder `out`, which is there, whole, when the block ends well; else nothing is.

    Raises:
        ConfigError: `out` exists or cannot be made.
    """
    if os.path.lexists(out):
        raise ConfigError(f"--out {out}: exists already; give a new folder")
    draft = out.with_name(f"{DRAFT}{out.name}")
    try:
        discard(draft)
        draft.mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {out}: cannot be made: {error}") from None
    try:
        yield draft
        publish(draft, out)
    except (OSError, SafetensorError) as error:
        _give_up(draft)
        raise ConfigError(f"--out {out}: cannot be written ({error}); make room, or give another folder") from None
    except BaseException:
        _give_up(draft)
        raise


def _give_up(draft: Path) -> None:
    with suppress(OSError):
        discard(draft)


def write_weights(checkpoint: Path, sizes: Mapping[str, torch.Size], folder: Path, max_bytes: float) -> int:
    """Writes the weights of these names and shapes in files of at most `max_bytes`, and their index; returns the bytes
    of all.
    """
    parts = list(groups(sizes, max_bytes))
    where = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(
            read_weights(checkpoint, {name: sizes[name] for name in names}), folder / file, metadata={"format": "pt"}
        )
        where.update(dict.fromkeys(names, file))
    total = sum(4 * shape.numel() for shape in sizes.values())
    about = {"total_size": total, "step": read_state(checkpoint)["step"]}
    (folder / INDEX).write_text(to_json({"metadata": about, "weight_map": where}, indent=1))
    for file in set(where.values()):  # safetensors lets only their owner read them
        shutil.copymode(folder / INDEX, folder / file)
    return total


def read_weights(checkpoint: Path, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Some float32 weights of a checkpoint, by their exported names, each of the shape that is wanted, on the CPU."""
    found = {name: torch.empty(shape) for name, shape in wanted.items()}
    fragments = {stored_name(name): Fragment(t.view(-1), 0, t.numel()) for name, t in found.items()}
    load_alone(checkpoint, fragments)
    return found
