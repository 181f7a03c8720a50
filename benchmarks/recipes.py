"""`python -m benchmarks.recipes [NAME ...]`: what `launch plan` predicts for every recipe of configs/ and real steps.

Each recipe is made small (two layers, few heads, a vocabulary of 2,000, 320 positions) and keeps the rest: blocks,
head, ZeRO stage, vocabulary group, recomputing, tied tables, passes. DeepSpeed trains it as the first of 8 ranks over a
fake process group, whose collectives send nothing, with stand-ins for a GPU's kernels (pretrain/activations.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.footprint import Compared, measured, pairs, show
from benchmarks.measuring import parser, wide_console
from common.settings import read_tree
from pretrain.activations import kernels_of_a_gpu
from pretrain.config import RunConfig, from_tree, load

WORLD = 8
HEAD_WIDTH, LENGTH, VOCAB, LARGEST_BATCH, PASSES = 16, 320, 2000, 2, 2
BUCKETS = {
    "reduce_bucket_size": 200_000,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_max_live_parameters": 600_000,
    "stage3_max_reuse_distance": 100_000,
}
OFFLOADED = (
    "quickstart+optimizer",
    "gpt2-124m-untied+optimizer",
    "qwen2-0.5b+optimizer",
    "llama3-8b+optimizer",
    "llama3-8b+optimizer+param",
)
CONFIGS = Path(__file__).parent.parent / "configs"


def recipes() -> list[str]:
    """Names of the recipes that train."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if "train" in read_tree(path, []))


def small(cfg: RunConfig) -> RunConfig:
    """A recipe in a size whose steps take a second, on WORLD ranks."""
    whole, tree = cfg.model, cfg.model_dump(mode="json")
    key_heads = 2 if whole.kv_heads else 4
    heads = key_heads * (whole.heads // whole.key_heads())
    dim = HEAD_WIDTH * heads
    tree["model"] |= {"seq_len": LENGTH, "layers": 2, "heads": heads, "dim": dim, "vocab_size": VOCAB, "compile": False}
    if whole.kv_heads:
        tree["model"]["kv_heads"] = key_heads
    if whole.head_dim:
        tree["model"]["head_dim"] = HEAD_WIDTH * whole.attention_width() // whole.dim
    if whole.mlp_dim:
        tree["model"]["mlp_dim"] = whole.mlp_dim * dim // whole.dim
    micro = min(cfg.train.micro_batch, LARGEST_BATCH)
    several = cfg.sequences_per_step() > cfg.train.micro_batch * WORLD
    passes = PASSES if several else 1
    tree["train"] |= {"micro_batch": micro, "tokens_per_step": LENGTH * WORLD * micro * passes}
    tree["data"]["tokenizer"] = {"vocab_size": VOCAB}
    tree["head"]["chunk_mib"] = 1
    tree["deepspeed"] = {"zero_optimization": BUCKETS}
    return from_tree(tree)


def compared(names: list[str]) -> Iterator[Compared]:
    """Every kind of bytes of these recipes, planned and counted in this process."""
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    for name in names:  # of a recipe, and of what is offloaded
        recipe, *offloaded = name.split("+")
        cfg = small(load(CONFIGS / f"{recipe}.yaml"))
        sections = {f"offload_{what}": {"device": "cpu"} for what in offloaded}
        cfg = cfg.model_copy(update={"deepspeed": {"zero_optimization": {**BUCKETS, **sections}}})
        with kernels_of_a_gpu():
            seen = measured([cfg])[0]
        yield from pairs(name, cfg, seen, WORLD)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    command = parser("recipes", __doc__)
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="of recipes, such as llama3-8b+optimizer (default: all)"
    )
    show(wide_console(120), compared(command.parse_args(argv).names or [*recipes(), *OFFLOADED]))


if __name__ == "__main__":
    main()
