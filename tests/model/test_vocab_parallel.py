"""Sharded equals whole: loss, every gradient and the tied lookup, on 1 to 4 ranks, with V that does not divide."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.harmonic import harmonic_loss
from model.head import HarmonicHead
from model.vocab_parallel import VocabShard, full_rows, group_members, lookup, rows_of, shard_of
from tests.support.ranks import run_ranks
from tests.support.variants import VARIANTS, distance_of, params_of

N_LOCAL, D = 6, 8


def tokens(world: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(world)
    x = torch.randn(world * N_LOCAL, D, generator=stream)
    w = torch.randn(v, D, generator=stream)
    y = torch.randint(0, v, (world * N_LOCAL,), generator=stream)
    y[::5] = -100
    return x, w, y


def check_sharded(v: int, variant: str, dtype: torch.dtype = torch.float32) -> None:
    """On each rank: losses and gradients of its own part equal those of the whole, every reduction. What ignored tokens
    hold there is no number.
    """
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    world, rank = dist.get_world_size(), dist.get_rank()
    shard = shard_of(v, group)
    x, w, y = tokens(world, v)
    x = x.to(dtype)
    poisoned = x.clone()
    poisoned[::5] = torch.tensor([torch.nan, torch.inf], dtype=dtype).repeat(D // 2)
    mine = slice(rank * N_LOCAL, (rank + 1) * N_LOCAL)
    rows = rows_of(v, world)
    for reduction in ("mean", "sum", "none"):
        whole = [t.clone().requires_grad_() for t in (x, w, torch.tensor(3.0))]
        options = {"distance": distance_of(variant), "reduction": reduction}
        of_whole, of_part = params_of(variant, D), params_of(variant, D)
        expected = harmonic_loss(whole[0], whole[1], y, exponent=whole[2], **options, **of_whole)
        weights = torch.linspace(0.5, 1.5, len(y))
        (expected @ weights if reduction == "none" else expected).backward()
        stored = torch.zeros(rows, D)
        stored[: shard.real] = w[shard.start : shard.stop]
        part = [poisoned[mine].clone().requires_grad_(), stored.requires_grad_(), torch.tensor(3.0).requires_grad_()]
        found = harmonic_loss(
            part[0], part[1], y[mine], exponent=part[2], shard=shard, chunk_bytes=4000, **options, **of_part
        )  # fmt: skip
        (found @ weights[mine] if reduction == "none" else found).backward()
        digits = 10 if variant == "squared_euclidean_softmax" else 1  # its scores reach 100
        fine = {"rtol": 2e-5 * digits, "atol": 2e-6 * digits}
        close = fine if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(found, expected[mine] if reduction == "none" else expected, **close)
        factor = world if reduction == "mean" else 1  # averaged over ranks, as data parallelism does
        torch.testing.assert_close(part[0].grad, whole[0].grad[mine] * factor, **close)
        torch.testing.assert_close(part[1].grad[: shard.real], whole[1].grad[shard.start : shard.stop], **close)
        assert (part[1].grad[shard.real :] == 0).all(), "padding rows get no gradient"
        if variant != "dot":
            torch.testing.assert_close(part[2].grad, whole[2].grad, **close)
        if "factor" in of_whole:
            torch.testing.assert_close(of_part["factor"].grad, of_whole["factor"].grad, **close)


def check_every_head() -> None:
    for variant in VARIANTS:
        check_sharded(37, variant)
        check_sharded(5, variant)  # over 4 ranks: one without rows
    for variant in ("euclidean", "cosine", "manhattan", "mahalanobis full", "dot"):
        check_sharded(4, variant)  # over 3 ranks, and 1 over 2: a rank without real rows
        check_sharded(1, variant)
        check_sharded(37, variant, torch.bfloat16)


@pytest.mark.parametrize("world", [1, 2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))])
def test_sharded_head_equals_whole(world: int, tmp_path: Path) -> None:
    run_ranks(check_every_head, world, tmp_path)


def check_tiny_rows(scale: float) -> None:
    """Gradients that grow with 1 / scale end at the largest number, with the group's factor of a mean too."""
    shard = shard_of(37, dist.group.WORLD)
    world, rank = shard.ranks, dist.get_rank()
    x, w, y = tokens(world, 37)
    x, w = ((t.sign() * t.abs().clamp_min(1) * scale) for t in (x, w))
    mine = slice(rank * N_LOCAL, (rank + 1) * N_LOCAL)
    whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    harmonic_loss(whole, w, y, exponent=200.0).backward()
    stored = torch.zeros(rows_of(37, world), D)
    stored[: shard.real] = w[shard.start : shard.stop]
    harmonic_loss(part, stored, y[mine], exponent=200.0, shard=shard).backward()
    most = torch.finfo(torch.float32).max
    expected = (whole.grad[mine].double() * world).clamp(-most, most)
    assert part.grad.isfinite().all() and (part.grad.abs() == most).any(), part.grad.abs().max()
    torch.testing.assert_close(part.grad.double() * scale, expected * scale, rtol=1e-4, atol=1e-4)


def test_gradients_of_tiny_rows_are_finite(tmp_path: Path) -> None:
    run_ranks(check_tiny_rows, 2, tmp_path, scale=1.2e-38)


def check_agreed_noise() -> None:
    """Every rank draws from a generator in a state of its own; the group uses one seed."""
    torch.manual_seed(dist.get_rank())
    shard = shard_of(37, dist.group.WORLD)
    x, w, y = tokens(dist.get_world_size(), 37)
    mine = slice(dist.get_rank() * N_LOCAL, (dist.get_rank() + 1) * N_LOCAL)
    stored = torch.zeros(rows_of(37, shard.ranks), D)
    stored[: shard.real] = w[shard.start : shard.stop]
    options = {"distance": "hamming", "kind": "gumbel", "exponent": 2.0, "reduction": "none"}
    found = harmonic_loss(x[mine], stored, y[mine], shard=shard, **options)
    drawn = [
        int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(rank))) for rank in range(shard.ranks)
    ]
    torch.testing.assert_close(found, harmonic_loss(x, w, y, seed=max(drawn), **options)[mine])


def test_gumbel_noise_is_agreed_on(tmp_path: Path) -> None:
    run_ranks(check_agreed_noise, 2, tmp_path)


def check_lookup_and_initialisation(v: int) -> None:
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    shard = shard_of(v, group)
    head = HarmonicHead(v, D, shard=shard, seed=3)
    whole = HarmonicHead(v, D, seed=3)
    torch.testing.assert_close(full_rows(head.prototypes, shard), whole.prototypes.detach(), rtol=0, atol=0)
    x, _, y = tokens(world, v)
    mine = slice(rank * N_LOCAL, (rank + 1) * N_LOCAL)
    torch.testing.assert_close(head.log_probs(x[mine]), whole.log_probs(x)[mine])
    ids, weights = y.clamp_min(0), torch.linspace(-1, 1, len(y))[:, None]
    (lookup(whole.prototypes, ids) * weights).sum().backward()
    embedded = head.embed(ids[mine])
    torch.testing.assert_close(embedded, whole.prototypes[ids[mine]], rtol=0, atol=0)
    (embedded * weights[mine]).sum().backward()
    expected = whole.prototypes.grad[shard.start : shard.stop] / world
    torch.testing.assert_close(head.prototypes.grad[: shard.real], expected)


@pytest.mark.parametrize("world", [2, 3])
def test_tied_lookup_log_probs_and_initial_rows_do_not_depend_on_sharding(world: int, tmp_path: Path) -> None:
    run_ranks(check_lookup_and_initialisation, world, tmp_path, v=37)


def test_initial_rows_across_blocks() -> None:
    """A shard in the middle of the vocabulary draws the very rows that the whole head has there."""
    whole = HarmonicHead(2500, D, seed=9).prototypes
    part = HarmonicHead(2500, D, seed=9, shard=VocabShard(1000, 2100)).prototypes
    assert torch.equal(part[:1100], whole[1000:2100])


def test_groups() -> None:
    assert group_members(4, 2) == ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    assert group_members(3, 3) == ([[0, 1, 2]], [[0], [1], [2]])
    with pytest.raises(ValueError, match="does not divide"):
        group_members(4, 3)


def test_a_failing_rank_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="(?s)rank . of 2.*on purpose"):
        run_ranks(fail_on_purpose, 2, tmp_path)


def test_ranks_may_leave_their_group(tmp_path: Path) -> None:
    assert run_ranks(leave_one_by_one, 2, tmp_path) == [0, 1]


def leave_one_by_one() -> int:
    rank = dist.get_rank()
    dist.destroy_process_group()
    time.sleep(rank)  # the first is done before the second has told what it found
    return rank


def fail_on_purpose() -> None:
    raise ValueError("on purpose")
