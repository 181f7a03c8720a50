"""A configuration small enough for tests, and its training in plain PyTorch: what every layout must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from pretrain.config import RunConfig, from_tree
from tests.support.shards import EOS, make_folder

if TYPE_CHECKING:  # the loop needs DeepSpeed, whose start takes seconds
    from pretrain.decisions import Outcome
    from pretrain.loop import Run

V, T, SEQUENCES = 67, 8, 8


def tiny_tree(**changes: Any) -> dict[str, Any]:
    """Plain values of a tiny run; `changes` are dotted paths with `__` for the dot."""
    tree: dict[str, Any] = {
        "run": "run",
        "data": {"path": "data", "source": {"kind": "embedded"}, "tokenizer": {"vocab_size": V}},
        "model": {"seq_len": T, "layers": 2, "heads": 2, "dim": 32},
        "head": {"distance": "euclidean"},
        "train": {"steps": 5, "tokens_per_step": SEQUENCES * T, "micro_batch": 4, "precision": "float32"},
        "optim": {"lr": 0.01, "clip": 0.5, "weight_decay": 0.1},
        "parallel": {"vocab": 1, "zero": 0},
        "logging": {"tensorboard": False},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def tiny_config(**changes: Any) -> RunConfig:
    return from_tree(tiny_tree(**changes))


def tokens_of(step: int) -> Tensor:
    """(SEQUENCES, T + 1) tokens, the same on every rank."""
    return torch.randint(0, V, (SEQUENCES, T + 1), generator=torch.Generator().manual_seed(step))


def train_layout(cfg: RunConfig, steps: int = 5, poison: int | None = None) -> dict[str, Any]:
    """Trains on the ranks of this process group; at the step `poison` one rank's prototype gradient gets a NaN.

    Returns plain values: losses and norms by step, whether each step was applied, and all parameters by name.
    """
    import deepspeed

    from model.vocab_parallel import full_rows
    from pretrain.engine import Trainer
    from pretrain.runtime import ranks as process

    ranks = process.start()
    ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
    trainer = Trainer(cfg, ranks, EOS)
    losses, norms, applied = [], [], []
    for step in range(steps):
        mine = tokens_of(step)[ranks.rank :: ranks.world]
        if step == poison and ranks.rank == ranks.world - 1:
            handle = trainer.head.prototypes.register_hook(lambda grad: grad * torch.nan)
        taken = trainer.train_step(mine.split(cfg.train.micro_batch), cfg.optim.lr)
        if step == poison and ranks.rank == ranks.world - 1:
            handle.remove()
        losses.append(ranks.sum(taken.loss.clone()).item() / ranks.world)
        norms.append(taken.norm.item())
        applied.append(taken.applied)
    plain = type(trainer.engine.optimizer).__name__ == "AdamW"
    parameters = {
        name: (p.detach() if plain else deepspeed.utils.safe_get_full_fp32_param(p)).clone().numpy()
        for name, p in trainer.engine.module.named_parameters()
    }
    parameters["prototypes"] = full_rows(trainer.head.prototypes, trainer.head.shard).numpy()
    parameters |= {n: p.detach().numpy().copy() for n, p in trainer.head.named_parameters() if n != "prototypes"}
    optimizer = type(trainer.engine.optimizer).__name__
    trainer.engine.destroy()
    return {"losses": losses, "norms": norms, "applied": applied, "parameters": parameters, "optimizer": optimizer}


def train_plain(cfg: RunConfig, steps: int = 5) -> dict[str, Any]:
    """The same updates with a plain module, torch's cross-entropy over reference scores, one clip and one AdamW."""
    from model.decoder import Decoder, document_positions
    from model.head import HarmonicHead
    from model.reference import scores_reference
    from pretrain.optim import parameter_groups

    decoder = Decoder(cfg.model, hidden_length=cfg.head.hidden_length(cfg.model.dim), seed=cfg.train.seed)
    head = HarmonicHead(V, cfg.model.dim, seed=cfg.train.seed + 1, **cfg.head.arguments())
    groups = parameter_groups([decoder, head], cfg.optim)
    for group in groups:
        group["lr"] = cfg.optim.lr * cast(float, group["lr_scale"])
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=cfg.optim.betas, eps=cfg.optim.eps)
    everything = [*decoder.parameters(), *head.parameters()]
    losses, norms = [], []
    for step in range(steps):
        tokens = tokens_of(step)
        inputs = tokens[:, :-1]
        embedded = torch.nn.functional.embedding(inputs, head.prototypes) if cfg.model.tied else inputs
        positions = document_positions(inputs, EOS) if cfg.model.document_mask else None
        hidden = decoder(embedded, positions).reshape(-1, cfg.model.dim)
        scores = scores_reference(hidden, head.prototypes, head.score_function, head.exponent)
        loss = torch.nn.functional.cross_entropy(scores, tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(everything, cfg.optim.clip or 1e30).item())
        optimizer.step()
        losses.append(loss.item())
    parameters = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    parameters["prototypes"] = head.prototypes.detach().numpy()
    parameters |= {n: p.detach().numpy() for n, p in head.named_parameters() if n != "prototypes"}
    return {"losses": losses, "norms": norms, "parameters": parameters}


def make_data(
    folder: Path, train_tokens: int = 2000, val_tokens: int = 137, seed: int = 5, test_tokens: int = 0
) -> Path:
    """A prepared folder of random documents for `tiny_config(data__path=...)`; without a test split unless asked."""
    stream = np.random.default_rng(seed)

    def documents(tokens: int) -> list[np.ndarray]:
        return [stream.integers(5, V, size=min(40, tokens - first)) for first in range(0, tokens, 40)]

    splits = {"train": documents(train_tokens), "val": documents(val_tokens)}
    if test_tokens:
        splits["test"] = documents(test_tokens)
    make_folder(folder, vocab_size=V, **splits)
    return folder


@contextmanager
def opened(cfg: RunConfig) -> Iterator[Run]:
    """A run on the ranks of this process group; it is closed on leaving."""
    from pretrain.opening import open_run
    from pretrain.runtime import ranks as process

    ranks = process.start(cfg=cfg)
    ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
    run = open_run(cfg, ranks)
    try:
        yield run
    finally:
        run.close()
        ranks.barrier()
        run.trainer.engine.destroy()


def outcome_of(cfg: RunConfig) -> Outcome:
    """How a whole run on the ranks of this process group ends."""
    with opened(cfg) as run:
        return run.train()


def run_to_end(cfg: RunConfig) -> list[float]:
    """A whole run on the ranks of this process group; returns the logged losses by step (rank 0's, from the file)."""
    from tests.support.records import read_records

    outcome = outcome_of(cfg)
    assert outcome.code == 0, outcome
    return [record["loss"] for record in read_records(cfg.run) if record["kind"] == "train"]


TEXT_V = 300


def make_text(folder: Path) -> Path:
    """A folder prepared from a few documents of text, with a tokenizer of its own, for `text_config`."""
    from common.settings import validate
    from data.config import DataConfig
    from data.prepare import prepare

    words = ["harmonic", "loss", "takes", "the", "café", "apart,", "one", "naïve", "prototype", "at", "time", "🙂"]
    random = np.random.default_rng(1)
    text = folder.with_name("text.txt")
    documents = (" ".join(random.choice(words, 12 + k % 9)) for k in range(400))
    text.write_text("\n\n".join(documents), encoding="utf-8")
    prepare(validate(DataConfig, _text_section(folder), "data"))
    return folder


def _text_section(folder: Path) -> dict[str, Any]:
    source = {"kind": "files", "paths": [str(folder.with_name("text.txt"))], "separator": "\n\n"}
    return {"path": str(folder), "source": source, "tokenizer": {"vocab_size": TEXT_V}, "val_fraction": 0.05}


def text_config(base: Path, **changes: Any) -> RunConfig:
    """A tiny run on `make_text(base / "data")`, of 32 positions."""
    usual = {
        "model__seq_len": 32,
        "train__tokens_per_step": 8 * 32,
        "train__steps": 4,
        "data": _text_section(base / "data"),
    }
    return tiny_config(**{"run": str(base / "run"), **usual, **changes})
