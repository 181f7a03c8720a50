"""`python -m pretrain.export RUN|CHECKPOINT --out FOLDER`: a checkpoint's float32 weights as plain safetensors.

From any layout, without DeepSpeed and without a process group: `decoder.*` and `head.*` in files of at most --max-gb,
with the index that Hugging Face's loaders read, beside the run's config.yaml. One file's tensors are in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from data.files import publish
from data.settings import ConfigError
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.checkpoint import find_given
from pretrain.config import EXIT_BAD_INPUT, RunConfig, load
from pretrain.fragments import Fragment

INDEX = "model.safetensors.index.json"


def shapes(cfg: RunConfig) -> dict[str, torch.Size]:
    """Every weight's name in the exported files, and its shape: of the whole vocabulary."""
    decoder: nn.Module = Decoder(cfg.model).to("meta")
    head: nn.Module = HarmonicHead(cfg.model.vocab_size, cfg.model.dim, seed=0, device="meta", **cfg.head.arguments())
    parts = {"decoder": decoder, "head": head}
    return {f"{part}.{name}": p.shape for part, module in parts.items() for name, p in module.named_parameters()}


def stored_name(name: str) -> str:
    """In the checkpoint."""
    part, _, rest = name.partition(".")
    return f"{'trunk' if part == 'decoder' else part}.{rest}.fp32"


def groups(sizes: dict[str, torch.Size], most: int) -> Iterator[list[str]]:
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


def export(checkpoint: Path, cfg: RunConfig, out: Path, max_bytes: int) -> int:
    """Writes the folder `out`, whole or not at all; returns the bytes of the weights. Raises ConfigError if it exists."""
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; give a new folder")
    draft = out.with_name(f"draft-{out.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    sizes = shapes(cfg)
    parts = list(groups(sizes, max_bytes))
    where = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(_read(checkpoint, {name: sizes[name] for name in names}), draft / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
    total = sum(4 * shape.numel() for shape in sizes.values())
    (draft / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    shutil.copy(checkpoint.parent.parent / "config.yaml", draft / "config.yaml")
    publish(draft, out)
    return total


def _read(checkpoint: Path, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    found = {name: torch.empty(shape) for name, shape in wanted.items()}
    fragments = {stored_name(name): Fragment(t.view(-1), 0, t.numel()) for name, t in found.items()}
    dcp.load(fragments, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.export", description="Weights as plain safetensors.")
    parser.add_argument("run", type=Path, help="a run folder (its newest whole checkpoint), or one checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--max-gb", type=float, default=5.0, help="of one file, 10^9 bytes (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        checkpoint, run = find_given(args.run)
        total = export(checkpoint, load(run / "config.yaml"), args.out, int(args.max_gb * 1e9))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{args.out}: {total / 1e9:.2f} GB of weights of {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
