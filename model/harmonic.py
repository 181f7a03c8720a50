"""Harmonic loss: exact, chunked, differentiable, vocabulary-parallel; nothing of size tokens x vocabulary is ever in
memory.

Tokens are taken in chunks whose working memory follows from a budget. For each chunk: gather the group's hidden states,
score them against this rank's prototypes, combine (max, sum, target score) over the group with one MAX and one
packed SUM, and, for reduced losses, take the gradient at once, while the chunk's scores are at hand. For
`reduction="none"` the backward pass scores again.

Legend: k ranks in the vocabulary group, n tokens on this rank, N = k * n; a chunk has m local and M = k * m gathered
tokens; V prototypes in all, R real ones on this rank, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.distances import DISTANCES, Distance, RowsGradient, Statistics
from model.kernels import eager
from model.kernels.choose import kernels_for
from model.vocab_parallel import (
    VocabShard,
    gather_rows,
    local_targets,
    max_across,
    own_rows,
    rows_of,
    scatter_rows,
    sum_across,
)

CHUNK_BYTES = 256 * 2**20  # 500 tokens of 50,000 prototypes: each chunk passes over w twice and over its gradient once
MOST_SCALING = 60  # powers of two; beyond, gradients of tiny rows would overflow
ROW_BLOCK = 1024  # prototypes transformed at a time


@dataclass(frozen=True)
class _Call:
    """What stays the same over the chunks of one call."""

    distance: Distance
    shard: VocabShard
    reduction: str
    ignore_index: int
    chunk_bytes: int
    differentiate: bool

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of the local tokens; every rank of the group makes the same ones."""
        rows = rows_of(self.shard.size, self.shard.ranks)
        wide = eager.accumulator(hidden.dtype).itemsize
        # a gathered token's scores, one temporary of them, its rounded gradients; x, its gradient, its difference to
        # the target
        per_token = self.shard.ranks * (rows * (2 * wide + hidden.element_size()) + hidden.shape[1] * 3 * wide)
        most = max(1, self.chunk_bytes // per_token)
        step = -(-hidden.shape[0] // -(-hidden.shape[0] // most)) if hidden.shape[0] else 1  # equal ones, no small rest
        for first in range(0, hidden.shape[0], step):
            yield slice(first, min(first + step, hidden.shape[0]))


def harmonic_loss(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    distance: str = "euclidean",
    exponent: float | Tensor = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    shard: VocabShard | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """-log p[target] with p_j = d_j^-n / sum_k d_k^-n, exactly (arXiv:2502.01628, eq. 2; softmax for `dot`).

    Args:
        hidden: (n, D) in bfloat16, float32 or float64: the dtype of the products. Scores and sums are float32 (float64
            for float64). n is the same on every rank of the group.
        prototypes: (at least shard.real, D), usually float32 masters; rows beyond `shard.real` are padding.
        targets: (n,) int64 rows of the whole vocabulary, or `ignore_index`.
        distance: a name in `model.distances.DISTANCES`.
        exponent: n > 0, a number or a one-element tensor that may require a gradient; unused by `dot`.
        reduction: "mean" over the non-ignored targets of the whole group (0 where there are none), "sum" over the
            group, or "none": (n,), 0 where ignored.
        shard: which rows these prototypes are; None: all of them.
        chunk_bytes: budget of the working memory (one token at a time is the least that it can be).

    Gradients of "sum" and "none" are those of the group's sum. For "mean" the gradient of `hidden` is multiplied by the
    group's size, so that averaging over ranks, as data parallelism does, gives the gradient of the mean; those of the
    prototypes and of the exponent are complete within the group, to be averaged only over replicas of the shard.

    Raises:
        ValueError: unknown distance or reduction, shapes that do not fit, exponent <= 0, a target out of range (looked
            for on CPU only: on a GPU it would stop the device).
    """
    shard = shard or VocabShard(0, prototypes.shape[0])
    exponent = _checked(hidden, prototypes, targets, distance, exponent, reduction, ignore_index, shard)
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, prototypes, exponent))
    call = _Call(DISTANCES[distance], shard, reduction, ignore_index, chunk_bytes, differentiate)
    function = _PerToken if reduction == "none" else _Reduced
    return function.apply(hidden, prototypes, exponent, targets, call)


def harmonic_log_probs(
    hidden: Tensor, prototypes: Tensor, *, distance: str = "euclidean", exponent: float | Tensor = 1.0
) -> Tensor:
    """(n, D), all prototypes (V, D) -> (n, V) log-probabilities, without gradient. This one is of size n x V."""
    none = torch.full((hidden.shape[0],), -100, device=hidden.device)
    shard = VocabShard(0, prototypes.shape[0])
    exponent = _checked(hidden, prototypes, none, distance, exponent, "none", -100, shard)
    entry = DISTANCES[distance]
    with torch.no_grad():
        side = _Prototypes(hidden, prototypes, entry, shard)
        stats = entry.contraction.statistics(side.tokens(hidden), side.rows, none, exponent)
        scores = entry.contraction.scores(stats, exponent)
        return scores - (stats.top + stats.total.log())[:, None]


def _checked(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    distance: str,
    exponent: float | Tensor,
    reduction: str,
    ignore_index: int,
    shard: VocabShard,
) -> Tensor:
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r}: expected one of {', '.join(DISTANCES)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected mean, sum or none")
    if hidden.dim() != 2 or prototypes.dim() != 2 or hidden.shape[1] != prototypes.shape[1]:
        given = f"hidden {tuple(hidden.shape)}, prototypes {tuple(prototypes.shape)}"
        raise ValueError(f"expected hidden (N, D) and prototypes (V, D), got {given}")
    if hidden.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"hidden is {hidden.dtype}: expected bfloat16, float32 or float64")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected targets ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if not 0 <= shard.real <= prototypes.shape[0]:
        raise ValueError(f"the shard has {shard.real} real rows, but {prototypes.shape[0]} prototypes were given")
    if targets.device.type == "cpu" and targets.numel():
        last = targets.max().item()
        first = torch.where(targets == ignore_index, last, targets).min().item()
        if last >= shard.size or (first < 0 and first != ignore_index):
            raise ValueError(f"targets reach from {first} to {last}: expected 0 to {shard.size - 1}, or {ignore_index}")
    if not isinstance(exponent, Tensor):
        if not exponent > 0:
            raise ValueError(f"exponent={exponent}: expected a positive number")
        exponent = torch.tensor(float(exponent), device=hidden.device)
    return exponent.to(eager.accumulator(hidden.dtype)).reshape(())


class _Prototypes:
    """Both sides of one call after scaling and the distance's transform, and the way back for gradients."""

    def __init__(self, hidden: Tensor, prototypes: Tensor, distance: Distance, shard: VocabShard) -> None:
        self.dtype = hidden.dtype
        self.wide = eager.accumulator(hidden.dtype)
        self.source = prototypes.detach()[: shard.real]
        self.distance = distance
        # a distance's own transform (unit length) leaves nothing to scale
        scaled = distance.scale_free and distance.transform is None
        self.scale = _scale(hidden, self.source, shard) if scaled else None
        rows = kernels_for(hidden).empty(self.source.shape, self.dtype, hidden.device)
        for block in self._blocks():
            rows[block] = self._transformed(self.source[block])
        self.rows = kernels_for(rows).Rows(rows)

    def _blocks(self) -> Iterator[slice]:
        for first in range(0, self.source.shape[0], ROW_BLOCK):
            yield slice(first, first + ROW_BLOCK)

    def _transformed(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.wide)
        if self.distance.transform is not None:
            return self.distance.transform(rows)
        return rows if self.scale is None else rows * self.scale

    def _pulled_back(self, source: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the rows before the transform, from the one after it."""
        if self.distance.transform is None:
            return grad if self.scale is None else grad.mul_(self.scale)
        with torch.enable_grad():
            rows = source.to(self.wide).detach().requires_grad_()
            return torch.autograd.grad(self.distance.transform(rows), rows, grad)[0]

    def tokens(self, hidden: Tensor) -> Tensor:
        """(M, D) hidden states, transformed, in the compute dtype."""
        return self._transformed(hidden).to(self.dtype)

    def tokens_back(self, hidden: Tensor, grad: Tensor) -> Tensor:
        return self._pulled_back(hidden, grad)

    def rows_back(self, into: RowsGradient, prototypes: Tensor) -> Tensor:
        """The gradient of all stored prototypes (zero for padding), in their dtype."""
        grad = into.products
        for block in self._blocks():
            self.distance.contraction.finish(into, self.rows, block)
            if self.distance.transform is not None or self.scale is not None:
                grad[block] = self._pulled_back(self.source[block], grad[block])
        padding = prototypes.shape[0] - grad.shape[0]
        return (torch.nn.functional.pad(grad, (0, 0, 0, padding)) if padding else grad).to(prototypes.dtype)


def _scale(hidden: Tensor, rows: Tensor, shard: VocabShard) -> Tensor:
    """The power of two that brings the group's largest entry to about 1.

    HarMax does not change, nor does a digit of it: squares cannot overflow, and log q stays small.
    """
    largest = hidden.new_zeros((), dtype=eager.accumulator(hidden.dtype))
    for side in (hidden.detach(), rows):
        if side.numel():
            low, high = side.aminmax()
            largest = torch.maximum(largest, torch.maximum(-low, high).to(largest.dtype))
    max_across(largest, shard.group)
    return torch.exp2(-largest.log2().ceil().clamp_min(-MOST_SCALING))


class _Chunk:
    """One chunk of the group's tokens, scored: (M,) log-sum-exp, mean score and target score, the same on every
    rank.
    """

    def __init__(self, call: _Call, side: _Prototypes, hidden: Tensor, targets: Tensor, exponent: Tensor) -> None:
        self.call, self.side, self.exponent = call, side, exponent
        group = call.shard.group
        self.hidden = gather_rows(hidden, group)  # (M, D)
        self.targets = gather_rows(targets, group)  # (M,)
        self.local = local_targets(self.targets, call.shard)
        self.x = side.tokens(self.hidden)
        self.stats = self._statistics()
        top = max_across(self.stats.top.clone(), group)
        part = (self.stats.top - top).exp_()  # 0 on a rank without real rows, whose top is -inf
        packed = torch.stack((self.stats.total * part, self.stats.moment * part, self.stats.target))
        total, moment, self.target = sum_across(packed, group)
        self.lse = top + total.log()
        self.mean_score = moment / total

    def _statistics(self) -> Statistics:
        if self.call.shard.real:
            return self.call.distance.contraction.statistics(self.x, self.side.rows, self.local, self.exponent)
        zeros = torch.zeros(self.x.shape[0], dtype=self.side.wide, device=self.x.device)
        return Statistics(zeros - torch.inf, zeros, zeros, zeros, kept=zeros[:, None])

    @property
    def losses(self) -> Tensor:
        """(M,), of ignored tokens too."""
        return self.lse - self.target

    def exponent_gradient(self, weight: Tensor) -> Tensor:
        if not self.call.distance.has_exponent:
            return torch.zeros_like(self.exponent)
        return weight @ ((self.mean_score - self.target) / self.exponent)

    def hidden_gradient(self, weight: Tensor, into: RowsGradient) -> Tensor:
        """Of sum(weight * losses): returns that of this rank's tokens (m, D), adds that of its prototypes to `into`."""
        if self.call.shard.real:
            grad = self.call.distance.contraction.gradients(
                self.stats, self.x, self.side.rows, self.local, self.exponent, self.lse, weight, into
            )
        else:
            grad = torch.zeros(self.x.shape, dtype=self.side.wide, device=self.x.device)
        return scatter_rows(self.side.tokens_back(self.hidden, grad), self.call.shard.group)


class _Reduced(torch.autograd.Function):
    """Mean or sum: the gradient is taken in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, prototypes: Tensor, exponent: Tensor, targets: Tensor, call: _Call) -> Tensor:  # type: ignore[override]
        shard = call.shard
        side = _Prototypes(hidden, prototypes, call.distance, shard)
        total = torch.zeros((), dtype=side.wide, device=hidden.device)
        exponent_grad, share, ranks = torch.zeros_like(total), torch.ones_like(total), 1
        if call.reduction == "mean":
            share = 1 / sum_across((targets != call.ignore_index).sum(), shard.group).clamp_min(1).to(side.wide)
            ranks = shard.ranks
        hidden_grad = torch.empty_like(hidden) if call.differentiate else hidden
        into = RowsGradient(side.rows) if call.differentiate else None
        for part in call.chunks(hidden):
            chunk = _Chunk(call, side, hidden[part], targets[part], exponent)
            weight = (chunk.targets != call.ignore_index).to(side.wide) * share
            total += weight @ chunk.losses
            if into is not None:
                exponent_grad += chunk.exponent_gradient(weight)
                hidden_grad[part] = chunk.hidden_gradient(weight, into).mul_(ranks)
            del chunk  # its scores, before the next chunk's
        if into is not None:
            ctx.grads = (hidden_grad, side.rows_back(into, prototypes), exponent_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("harmonic_loss: second backward through one loss; its gradient was taken and given away")
        if upstream.device.type != "cpu" or upstream != 1:
            grads = tuple(grad.mul_(upstream) for grad in grads)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None


class _PerToken(torch.autograd.Function):
    """reduction="none": no gradient is kept; the backward pass scores again with the upstream weights."""

    @staticmethod
    def forward(ctx, hidden: Tensor, prototypes: Tensor, exponent: Tensor, targets: Tensor, call: _Call) -> Tensor:  # type: ignore[override]
        side = _Prototypes(hidden, prototypes, call.distance, call.shard)
        losses = torch.zeros(hidden.shape[0], dtype=side.wide, device=hidden.device)
        for part in call.chunks(hidden):
            chunk = _Chunk(call, side, hidden[part], targets[part], exponent)
            losses[part] = own_rows(chunk.losses, call.shard)
            del chunk
        ctx.save_for_backward(hidden, prototypes, exponent, targets)
        ctx.call = call
        return losses.masked_fill_(targets == call.ignore_index, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        hidden, prototypes, exponent, targets = ctx.saved_tensors
        call: _Call = ctx.call
        side = _Prototypes(hidden, prototypes, call.distance, call.shard)
        into = RowsGradient(side.rows)
        hidden_grad = torch.empty_like(hidden)
        exponent_grad = torch.zeros((), dtype=side.wide, device=hidden.device)
        upstream = upstream.masked_fill(targets == call.ignore_index, 0).to(side.wide)
        for part in call.chunks(hidden):
            weight = gather_rows(upstream[part], call.shard.group)
            chunk = _Chunk(call, side, hidden[part], targets[part], exponent)
            exponent_grad += chunk.exponent_gradient(weight)
            hidden_grad[part] = chunk.hidden_gradient(weight, into)
            del chunk
        grads = (hidden_grad, side.rows_back(into, prototypes), exponent_grad)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None
