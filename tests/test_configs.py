"""Every recipe in configs/ parses, says how it is run, builds on the meta device and has the size that its name
says.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.config import RunConfig, check_layout, dump, load

CONFIGS = sorted(path for path in Path("configs").glob("*.yaml") if not path.stem.startswith("study-"))
SIZES = {  # embedding counted once, as most are tied; that of GPT-2 and Llama is the recipe's own
    "gpt2-124m": 124e6,
    "gpt2-350m": 355e6,
    "gpt2-774m": 774e6,
    "gpt2-1.5b": 1558e6,
    "qwen2-0.5b": 494e6 - (151_936 - 51_200) * 896,
    "qwen3-0.6b": 596e6 - (151_936 - 51_200) * 1024,
    "bert-base": 109.5e6,
    "llama3-8b": 8.03e9 - 128_256 * 4096,
}
WORLDS = {
    "quickstart": (1, 2),
    "benchmark-cpu": (1, 2),
    "gpt2-124m": (1, 8, 16),
    "gpt2-350m": (8, 16),
    "gpt2-774m": (16, 32),
    "gpt2-1.5b": (16, 64),
    "qwen2-0.5b": (8, 16),
    "qwen3-0.6b": (8, 16),
    "bert-base": (1, 8),
    "llama3-8b": (64, 128),
}


def test_the_recipes_are_there() -> None:
    expected = {"quickstart", "gpt2-124m-cosine", "gpt2-124m-softmax", *SIZES}
    assert expected <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    cfg = load(path)
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header and f"python -m data prepare {path}" in header[0] and f"python -m launch run {path}" in header[0]
    family = path.stem.removesuffix("-cosine").removesuffix("-softmax")
    for world in WORLDS[family]:
        check_layout(cfg, world, min(world, 8))
    assert cfg.data.tokenizer.vocab_size % 1024 == 0
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg

    with torch.device("meta"):
        decoder = Decoder(cfg.model.model_copy(update={"compile": False}))  # there is nothing to compile for on meta
        head = HarmonicHead(cfg.model.vocab_size, cfg.model.dim, distance=cfg.head.distance, device="meta")
    inputs = torch.zeros(2, cfg.model.seq_len, dtype=torch.int64, device="meta")
    hidden = decoder(head.embed(inputs) if cfg.model.tied else inputs)
    assert hidden.shape == (2, cfg.model.seq_len, cfg.model.dim)
    assert head.prototypes.shape == (cfg.model.vocab_size, cfg.model.dim)
    if family in SIZES:
        counted = sum(p.numel() for p in decoder.parameters())
        assert counted == cfg.model.parameters()
        embedding = cfg.model.vocab_size * cfg.model.dim if cfg.model.tied else 0  # it is the head's
        assert counted + embedding == pytest.approx(SIZES[family], rel=0.02)


def test_124m_recipes_differ_in_the_head_alone() -> None:
    def without_head(cfg: RunConfig) -> dict:
        return {key: value for key, value in cfg.model_dump().items() if key not in ("run", "head")}

    euclidean, cosine, softmax = (load(f"configs/gpt2-124m{kind}.yaml") for kind in ("", "-cosine", "-softmax"))
    assert without_head(euclidean) == without_head(cosine) == without_head(softmax)
    assert [cfg.head.distance for cfg in (euclidean, cosine, softmax)] == ["euclidean", "cosine", "dot"]
