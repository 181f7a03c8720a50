"""Prototypes sharded by rows over a vocabulary group, and the few collectives that this takes.

A group of one (`group=None`) is the degenerate case of the same code: every collective is then the identity.
Legend: k ranks in the group, n tokens on this rank, N = k * n tokens of the group, D width, R rows on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """Which of the vocabulary's rows this rank holds: the real rows [start, stop) of `rows_of(total, k)` stored ones.

    Stored rows beyond `stop - start` are padding that makes shards equal; they are never scored.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None  # None: every row is here
    total: int | None = None  # None: `stop`

    @property
    def size(self) -> int:
        """Real rows of the whole group: the vocabulary."""
        return self.stop if self.total is None else self.total

    @property
    def ranks(self) -> int:
        """Ranks in the group; 1 without one."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place in the group, from 0; 0 without one."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def real(self) -> int:
        """How many of the stored rows are real."""
        return self.stop - self.start


def rows_of(total: int, ranks: int) -> int:
    """Rows that each of `ranks` ranks stores for `total` prototypes: equal everywhere, the last ones padded."""
    return -(-total // ranks)


def shard_of(total: int, group: ProcessGroup | None = None) -> VocabShard:
    """The shard of `total` prototypes that this rank holds in `group`."""
    if group is None:
        return VocabShard(0, total)
    rows, rank = rows_of(total, dist.get_world_size(group)), dist.get_rank(group)
    return VocabShard(min(total, rank * rows), min(total, (rank + 1) * rows), group, total)


class Pending:
    """The result of a collective that may still be under way: `wait()` for it."""

    def __init__(self, result: Tensor, work: dist.Work | None = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """The result; on a GPU it is the current stream that waits."""
        if self._work is not None:
            self._work.wait()
        return self._result


def start_reduce(x: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Element-wise reduction of a tensor of any shape over the group, in place."""
    return Pending(x, dist.all_reduce(x, op, group=group, async_op=True) if group is not None else None)


def start_gather(x: Tensor, group: ProcessGroup | None) -> Pending:
    """(n, ...) on each rank -> (k * n, ...), in the order of the group's ranks. n is the same on every rank."""
    if group is None:
        return Pending(x)
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    return Pending(out, dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True))


def start_scatter(x: Tensor, group: ProcessGroup | None) -> Pending:
    """(k * n, ...) partial sums on each rank -> (n, ...): this rank's rows, summed over the group."""
    if group is None:
        return Pending(x)
    out = x.new_empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]))
    return Pending(out, dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True))


def max_across(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Element-wise maximum over the group, in place."""
    return start_reduce(x, group, dist.ReduceOp.MAX).wait()


def sum_across(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Element-wise sum over the group, in place."""
    return start_reduce(x, group).wait()


def gather_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(n, ...) on each rank -> (k * n, ...): `start_gather`, waited for."""
    return start_gather(x, group).wait()


def own_rows(x: Tensor, shard: VocabShard) -> Tensor:
    """This rank's part of a gathered (k * n, ...) tensor."""
    n = x.shape[0] // shard.ranks
    return x[shard.rank * n : (shard.rank + 1) * n]


def local_targets(targets: Tensor, shard: VocabShard) -> Tensor:
    """(n,) rows of the whole vocabulary -> (n,) rows on this rank, -1 where another rank holds it or it is ignored."""
    here = (targets >= shard.start) & (targets < shard.stop)
    return torch.where(here, targets - shard.start, -1)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, tokens: Tensor, shard: VocabShard) -> Tensor:  # type: ignore[override]
        local = local_targets(gather_rows(tokens, shard.group), shard)  # (N,)
        ctx.save_for_backward(local)
        ctx.rows_shape, ctx.shard = rows.shape, shard
        own = rows[local.clamp_min(0)] * (local >= 0)[:, None]  # (N, D), zeros for the rows of others
        return start_scatter(own, shard.group).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (local,) = ctx.saved_tensors
        grads = (
            gather_rows(grad, ctx.shard.group).float() * (local >= 0)[:, None]
        )  # float32: a frequent token adds up thousands
        total = grads.new_zeros(ctx.rows_shape).index_add_(0, local.clamp_min(0), grads)
        return total / ctx.shard.ranks, None, None


def lookup(rows: Tensor, tokens: Tensor, shard: VocabShard | None = None) -> Tensor:
    """Vocabulary-parallel embedding: rows (R, D) of this rank, tokens (...) -> (..., D) in the dtype of `rows`.

    The gradient of `rows` is the group's sum divided by its size: the gradient of a loss that is averaged over the
    ranks (as `harmonic_loss(reduction="mean")` is), complete within the group.
    """
    shard = shard or VocabShard(0, rows.shape[0])
    return _Lookup.apply(rows, tokens.reshape(-1), shard).view(*tokens.shape, rows.shape[1])


def full_rows(rows: Tensor, shard: VocabShard) -> Tensor:
    """All real prototypes (V, D), gathered from the group: for evaluation and export, where V x D fits."""
    return gather_rows(rows.detach(), shard.group)[: shard.size]


def group_members(ranks: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Vocabulary groups and replica groups of a world of `ranks`: consecutive ranks share a vocabulary.

    Returns (vocabulary groups, replica groups): ranks of one replica group hold the same rows. Raises ValueError unless
    `size` divides `ranks`.
    """
    if size < 1 or ranks % size:
        raise ValueError(f"a vocabulary group of {size} ranks does not divide a world of {ranks}")
    vocab = [list(range(first, first + size)) for first in range(0, ranks, size)]
    return vocab, [list(range(first, ranks, size)) for first in range(size)]
