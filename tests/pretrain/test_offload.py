"""ZeRO's offload to host memory trains as the GPU's own does, clips and skips with the head, and its checkpoints go on
anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from tests.pretrain.checkpoints.test_layouts import BF16_LOSS, compare
from tests.pretrain.checkpoints.test_resume import STEPS, check_exact, config, tensors
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, opened, tiny_config, train_layout, train_plain


def offload(zero: int, *what: str, **changes: Any) -> dict[str, Any]:
    """Changes of a tiny config: that ZeRO stage, with `what` (optimizer, param) in host memory."""
    sections = {f"offload_{name}": {"device": "cpu"} for name in what}
    return {"parallel__zero": zero, "deepspeed": {"zero_optimization": sections}, **changes}


OFFLOADS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer", "param"), (3, "optimizer"), (3, "param")]


def check_losses(chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train_layout(tiny_config(**layout), steps=3) for layout in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_offloaded_runs_equal_plain_pytorch(world: int, tmp_path: Path) -> None:
    plain = train_plain(tiny_config(), steps=3)
    assert max(plain["norms"]) > 0.5, "clipping is active"
    passes = {"train__micro_batch": 4 // world, "parallel__vocab": world}  # two
    chosen = [offload(*which, **passes) for which in (OFFLOADS[:3] if world == 1 else OFFLOADS[2:])]
    chosen += [offload(*which, **passes, train__precision="bf16") for which in OFFLOADS[: 3 * (world - 1)]]
    for layout, found in zip(chosen, run_ranks(check_losses, world, tmp_path, chosen=chosen)[0], strict=True):
        if "train__precision" not in layout:
            compare(found, plain, f"{world} ranks, {layout}")
        else:
            assert np.allclose(found["losses"], plain["losses"], atol=BF16_LOSS, rtol=0), layout


@pytest.mark.slow
def test_gradients_of_several_passes_add_up_in_float32(tmp_path: Path) -> None:
    """At bf16 DeepSpeed has other buffers with offload: the norms tell what they rounded."""
    several: dict[str, Any] = {"train__precision": "bf16", "train__micro_batch": 1}
    chosen = [offload(zero, *what, **several) for zero in (2, 3) for what in ((), ("optimizer",))]
    found = run_ranks(check_losses, 1, tmp_path, chosen=chosen)[0]
    for own, host in zip(found[::2], found[1::2], strict=True):
        assert host["norms"][0] == pytest.approx(own["norms"][0], rel=1e-5)


def check_poisoned(chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train_layout(tiny_config(**layout), steps=3, poison=1) for layout in chosen]


@pytest.mark.slow
def test_a_nan_skips_the_step_of_masters_in_host_memory_too(tmp_path: Path) -> None:
    chosen = [offload(*which, parallel__vocab=2, train__precision="bf16") for which in OFFLOADS[:3]]
    for layout, found in zip(chosen, run_ranks(check_poisoned, 2, tmp_path, chosen=chosen)[0], strict=True):
        assert found["applied"] == [True, False, True], layout
        assert all(np.isfinite(values).all() for values in found["parameters"].values()), layout


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(world: int, tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    variants = [offload(2, "optimizer", train__precision="bf16")]
    if world == 2:
        variants = [offload(1, "optimizer"), offload(3, "optimizer", "param", train__precision="bf16")]
    run_ranks(check_exact, world, tmp_path, base=tmp_path, variants=variants)
    for number in range(len(variants)):
        whole, again = (
            tensors(tmp_path / f"{name}-{number}/checkpoints/step-{STEPS:08d}") for name in ("whole", "again")
        )
        assert whole and whole == again, variants[number]


HOPS = [
    (1, offload(0)),
    (2, offload(3, "optimizer", "param")),
    (1, offload(1, "optimizer")),
    (2, offload(2)),
    (2, offload(2, "optimizer")),
]


def check_hop(base: Path, run: str, first: int, steps: int, changes: dict[str, Any]) -> list[float]:
    """Losses of some steps of a run, which goes on from where it is."""
    paths = {"run": str(base / run), "data__path": str(base / "data")}
    cfg = tiny_config(train__steps=2 * len(HOPS), train__micro_batch=2, **paths, **changes)
    with opened(cfg) as trained:
        losses = []
        for step in range(first, first + steps):
            taken = trained.step(step)
            trained._advance(taken)
            losses.append(trained.ranks.sum(taken.loss.double()).item() / trained.ranks.world)
        trained.save()
        trained.finish_save()
    return losses


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_offload(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    whole = {"base": tmp_path, "run": "whole", "first": 0, "steps": 2 * len(HOPS), "changes": HOPS[0][1]}
    expected = run_ranks(check_hop, 1, tmp_path, **whole)[0]
    found: list[float] = []
    for world, changes in HOPS:
        hop = {"base": tmp_path, "run": "hops", "first": len(found), "steps": 2, "changes": changes}
        found += run_ranks(check_hop, world, tmp_path, **hop)[0]
    assert np.allclose(found, expected, atol=2e-5, rtol=0), (found, expected)


def host_adamw(parameter: torch.Tensor, **settings: Any) -> Any:
    from pretrain.cpu_adam import host_adamw

    return host_adamw([{"params": [parameter], "weight_decay": settings.pop("weight_decay")}], 1, **settings)


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([1, 7, 64, 1001]), lr=st.sampled_from([0.0, 1e-4, 0.3]), decay=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-8, 1e-3]), betas=st.sampled_from([(0.9, 0.95), (0.0, 0.999)]), cut=st.integers(1, 4),
)  # fmt: skip
def test_updates_in_host_memory_are_adamw_s_and_depend_on_their_number_alone(
    size: int, lr: float, decay: float, eps: float, betas: tuple[float, float], cut: int
) -> None:
    stream = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=stream)
    gradients = [torch.randn(size, generator=stream) for _ in range(5)]
    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}

    def steps(parameter: torch.Tensor, optimizer: Any, taken: list[torch.Tensor]) -> None:
        for gradient in taken:
            parameter.grad = gradient.clone()
            optimizer.step()

    truth, own = torch.nn.Parameter(start.double()), torch.nn.Parameter(start.clone())
    steps(truth, torch.optim.AdamW([truth], **given), [gradient.double() for gradient in gradients])
    optimizer = host_adamw(own, **given)
    steps(own, optimizer, gradients)
    assert (own - truth).abs().max() <= 1e-5 * (1 + start.abs().max())
    halfway = torch.nn.Parameter(start.clone())
    before = host_adamw(halfway, **given)
    steps(halfway, before, gradients[:cut])
    after = host_adamw(halfway, **given)
    after.state[halfway] = before.state[halfway]
    steps(halfway, after, gradients[cut:])
    assert torch.equal(halfway, own)


def test_a_machine_that_cannot_compile_it_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="CPU Adam cannot be compiled here .*; install g.. and ninja, let TORCH_EXT"):
        host_adamw(torch.nn.Parameter(torch.ones(3)), weight_decay=0.0, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "file")


def zero(**settings: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": settings}}


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            zero(offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
            "nvme: checkpoints read weights and moments",
        ),
        (zero(offload_param={"device": "nvme"}), "offload_param.device=nvme: checkpoints"),
        (zero(offload_optimizer={"device": "cpu"}), "needs parallel.zero=1 or 2 or 3, and it is 0"),
        (offload(2, "param"), "offload_param.device=cpu needs parallel.zero=3, and it is 2"),
        (zero(offload_optimizer={"devise": "cpu"}), "devise: unknown key; did you mean .*offload_optimizer.device"),
        (zero(offload_optimizer="cpu"), 'offload_optimizer: given "cpu"; expected a mapping'),
        (zero(offload_optimizer={"device": "gpu"}), "device: given \"gpu\"; expected 'none' or 'cpu'"),
        (zero(offload_optimizer={"pin_memory": 1}), "pin_memory: given 1; expected a valid boolean"),
        (zero(cpu_offload=True), "use deepspeed.zero_optimization.offload_optimizer.device"),
    ],
)
def test_offload_that_cannot_be_is_refused_in_words(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(**changes)


def test_offload_that_is_off_is_none() -> None:
    for section in ({}, {"device": "none"}, {"pin_memory": False}, None):
        cfg = tiny_config(**zero(offload_optimizer=section, offload_param=section))
        assert not cfg.offloads("optimizer") and not cfg.offloads("param")
    assert config(Path("x"), "run", **offload(3, "param")).offloads("param")
