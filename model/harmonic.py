"""Harmonic loss: exact, chunked, differentiable, vocabulary-parallel; nothing of size tokens x vocabulary is ever in
memory.

Tokens are taken in chunks (model/chunks.py) whose working memory follows from a budget. For each chunk: gather the
group's hidden states, score them against this rank's prototypes, combine (max, sum, target score) over the group with
one MAX and one packed SUM, and, for reduced losses, take the gradient at once, while the chunk's scores are at hand.
For `reduction="none"` the backward pass scores again. In a group the next chunk is scored before the gradient of this
one is taken, so that no collective is waited for with nothing to do.

Gradients of "sum" and "none" are those of the group's sum. For "mean" the gradient of the hidden states is multiplied
by the group's size, so that averaging over ranks, as data parallelism does, gives the gradient of the mean; those of
the prototypes, the exponent and the factor are complete within the group, to be averaged only over replicas of the
shard.

The same inputs give the same bits on one machine (with a GPU's kernels too; its libraries may need to be told: see
`train.deterministic` of the recipes). The order of sums over prototypes does not depend on the chunks, that of sums
over tokens does: with the CPU's kernels other chunks change no bit of a token's loss and gradient (but for soft
Hamming's sigmoids and the separable Bray-Curtis, which are PyTorch's), and the prototypes' gradient by the rounding of
float32 sums, below 2^-18 of its largest entry.

Legend: n tokens on this rank, D width; M tokens of a chunk, gathered from the group; V prototypes in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import prepared, validity
from .chunks import Call, Chunk, limits
from .contractions import RowsGradient, Use
from .distance_base import Distance
from .distances import resolve
from .kernels.choose import fused_kernels_for
from .kernels.eager import Given
from .operands import Operands
from .options import LossOptions
from .vocab_parallel import VocabShard, gather_rows, own_rows, sum_across


def _as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """Out of the reach of torch.compile, which cannot see into the head, and of autocast, which would round sums."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return torch.compiler.disable(call)


@_as_given
def harmonic_loss(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    distance: str | Distance = "euclidean",
    exponent: float | Tensor = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    shard: VocabShard | None = None,
    chunk_bytes: int | None = None,
    fused: bool | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    **params: Any,
) -> Tensor:
    """-log p[target] with p_j = d_j^-n / sum_k d_k^-n, exactly (arXiv:2502.01628, eq. 2; softmax for `dot`).

    Args:
        hidden: (n, D) in bfloat16, float32 or float64: the dtype of the products. Scores and sums are float32 (float64
            for float64), and so are the operands of distances that are no product. n is the same on every rank of the
            group.
        prototypes: (at least shard.real, D), usually float32 masters; rows beyond `shard.real` are padding.
        targets: (n,) int64 rows of the whole vocabulary, or `ignore_index`.
        distance: a name in `model.distances.DISTANCES`, or one of those with its parameters.
        exponent: n > 0, a number or a one-element tensor that may require a gradient; unused by `dot`.
        reduction: "mean" over the non-ignored targets of the whole group (0 where there are none), "sum" over the
            group, or "none": (n,), 0 where ignored.
        shard: which rows these prototypes are; None: all of them.
        chunk_bytes: of working memory, at least a token's; None: CHUNK_BYTES, CHUNK_SHARE of a GPU's (model/chunks.py).
        fused: whether scores are made in the product's epilogue and kept rounded (on Hopper, in bfloat16), or in passes
            over float32 products; None: as the device's kernels say. Where a GPU cannot do it the log says so. On CPUs
            True takes its plain form; distances that are no product have no such choice.
        label_smoothing: see `model.options.LossOptions`; as they stand, all three are off.
        z_loss: likewise.
        soft_cap: likewise.
        params: the distance's own, if it is given by name (model/distances.py); a `factor` may require a gradient.

    Gradients, and when bits are the same: the module's docstring.

    Raises:
        ValueError: unknown distance, parameter or reduction, shapes that do not fit, exponent <= 0, an option out of
            range or without sense, a target out of range (on a GPU, which is not waited for, the loss is NaN and a
            later call raises it).
    """
    shard, options = shard or VocabShard(0, prototypes.shape[0]), LossOptions(label_smoothing, z_loss, soft_cap)
    given = resolve(distance, params)
    options.check(given)
    unit = given.log_unit() if z_loss else 0.0
    entry, exponent = prepared(given, {}, hidden, prototypes, targets, exponent, reduction, ignore_index, shard)
    detached, tensors = _detached(entry), entry.tensors.values()
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, prototypes, exponent, *tensors))
    kernels = fused_kernels_for(hidden, fused, options.apart) if entry.by_product else None
    use = Use(kernels, differentiate and reduction != "none", exponent.requires_grad)
    sizes = limits(hidden, shard, chunk_bytes)
    call = Call(detached, shard, reduction, ignore_index, *sizes, use, options=options, log_unit=unit)
    function = _PerToken if reduction == "none" else _Reduced
    return function.apply(hidden, prototypes, exponent, targets, call, *tensors)


def _detached(entry: Distance) -> Distance:
    """The same distance, without gradients."""
    return replace(entry, **{name: tensor.detach() for name, tensor in entry.tensors.items()})


@_as_given
@torch.no_grad()
def harmonic_predictions(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    distance: str | Distance = "euclidean",
    exponent: float | Tensor = 1.0,
    ignore_index: int = -100,
    shard: VocabShard | None = None,
    chunk_bytes: int | None = None,
    soft_cap: float | None = None,
    **params: Any,
) -> tuple[Tensor, Tensor]:
    """The losses (n,) of `harmonic_loss(reduction="none")`, and the most probable prototypes (n,) of the whole
    vocabulary: one pass over the scores, chunk by chunk, without gradient.

    Of prototypes with equal scores it is the first. Scores are those of the loss, so the target's is taken by direct
    difference: a near tie with the target, within the rounding of a score, may fall otherwise than with an ignored one.
    Arguments and errors are those of `harmonic_loss`.
    """
    shard, options = shard or VocabShard(0, prototypes.shape[0]), LossOptions(soft_cap=soft_cap)
    entry, exponent = prepared(distance, params, hidden, prototypes, targets, exponent, "none", ignore_index, shard)
    options.check(entry)
    bytes_, processors = limits(hidden, shard, chunk_bytes)
    third = bytes_ // 3  # a chunk's scores are made a second time, beside what was kept
    call = Call(entry, shard, "none", ignore_index, third, processors, Use(gradient=False), False, options)
    side = Operands(hidden, prototypes, entry, shard)
    losses = torch.zeros(hidden.shape[0], dtype=side.wide, device=hidden.device)
    predictions = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)

    def use(part: slice, chunk: Chunk) -> None:
        chunk.settle()
        losses[part] = own_rows(chunk.losses, shard)
        predictions[part] = own_rows(chunk.predictions(), shard)

    call.each(side, hidden, targets, exponent, use)
    return losses.masked_fill_(targets == ignore_index, 0), predictions


@_as_given
@torch.no_grad()
def harmonic_log_probs(
    hidden: Tensor,
    prototypes: Tensor,
    *,
    distance: str | Distance = "euclidean",
    exponent: float | Tensor = 1.0,
    soft_cap: float | None = None,
    **params: Any,
) -> Tensor:
    """(n, D), all prototypes (V, D) -> (n, V) log-probabilities, without gradient. This one is of size n x V."""
    none = torch.full((hidden.shape[0],), -100, device=hidden.device)
    shard = VocabShard(0, prototypes.shape[0])
    entry, exponent = prepared(distance, params, hidden, prototypes, none, exponent, "none", -100, shard)
    LossOptions(soft_cap=soft_cap).check(entry)
    side = Operands(hidden, prototypes, entry, shard)
    x = side.tokens(hidden, side.positions(hidden, slice(0, hidden.shape[0])), side.token_scales(hidden))
    given = Given(none, exponent, entry.floor_of_scores(x), cap=soft_cap)
    stats = entry.contraction.statistics(x, side.rows, given, Use(gradient=False))
    scores = entry.contraction.scores(stats)
    return scores - (stats.top + stats.total.log())[:, None]


def _like(hidden: Tensor) -> Tensor:
    """(n, D), uninitialised, rows one behind the other, however those of `hidden` lie."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


class _Reduced(torch.autograd.Function):
    """Mean or sum: the gradient is taken in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, prototypes: Tensor, exponent: Tensor, targets: Tensor, call: Call, *tensors: Tensor
    ) -> Tensor:  # type: ignore[override]
        shard = call.shard
        side = Operands(hidden, prototypes, call.distance, shard)
        total = torch.zeros((), dtype=side.wide, device=hidden.device)
        exponent_grad, share, ranks = torch.zeros_like(total), torch.ones_like(total), 1
        if call.reduction == "mean":
            share = 1 / sum_across((targets != call.ignore_index).sum(), shard.group).clamp_min(1).to(side.wide)
            ranks = shard.ranks
        valid = validity(targets, call.ignore_index, shard, side.wide)
        if valid is not None:
            share = share * valid
        hidden_grad = _like(hidden) if call.use.gradient else hidden
        into = RowsGradient(side.rows) if call.use.gradient else None

        def use(part: slice, chunk: Chunk) -> None:
            chunk.settle()
            weight = (chunk.targets != call.ignore_index).to(side.wide) * share
            total.add_(weight @ chunk.losses)
            if into is not None:
                exponent_grad.add_(chunk.exponent_gradient(weight))
                chunk.hidden_gradient(weight, into, hidden_grad[part], ranks)

        call.each(side, hidden, targets, exponent, use)
        if into is not None:
            ctx.grads = (hidden_grad, side.rows_back(into, prototypes), exponent_grad, *side.tensors_back())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("harmonic_loss: second backward through one loss; its gradient was taken and given away")
        if upstream.device.type != "cpu" or upstream != 1:  # to look at it on a GPU would be to wait for it
            grads = tuple(grad.mul_(upstream) for grad in grads)
        return _wanted(ctx, grads)


class _PerToken(torch.autograd.Function):
    """reduction="none": no gradient is kept; the backward pass scores again with the upstream weights."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, prototypes: Tensor, exponent: Tensor, targets: Tensor, call: Call, *tensors: Tensor
    ) -> Tensor:  # type: ignore[override]
        side = Operands(hidden, prototypes, call.distance, call.shard)
        losses = torch.zeros(hidden.shape[0], dtype=side.wide, device=hidden.device)

        def use(part: slice, chunk: Chunk) -> None:
            chunk.settle()
            losses[part] = own_rows(chunk.losses, call.shard)

        call.each(side, hidden, targets, exponent, use)
        ctx.save_for_backward(hidden, prototypes, exponent, targets)
        ctx.call = call
        valid = ctx.valid = validity(targets, call.ignore_index, call.shard, side.wide)
        if valid is not None:
            losses *= valid
        return losses.masked_fill_(targets == call.ignore_index, 0)

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        hidden, prototypes, exponent, targets = ctx.saved_tensors
        call: Call = replace(ctx.call, use=replace(ctx.call.use, gradient=True))
        side = Operands(hidden, prototypes, call.distance, call.shard)
        into = RowsGradient(side.rows)
        hidden_grad = _like(hidden)
        exponent_grad = torch.zeros((), dtype=side.wide, device=hidden.device)
        upstream = upstream.masked_fill(targets == call.ignore_index, 0).to(side.wide)
        if ctx.valid is not None:
            upstream = upstream * ctx.valid

        def use(part: slice, chunk: Chunk) -> None:
            weight = gather_rows(upstream[part], call.shard.group)
            chunk.settle()
            exponent_grad.add_(chunk.exponent_gradient(weight))
            chunk.hidden_gradient(weight, into, hidden_grad[part])

        call.each(side, hidden, targets, exponent, use)
        return _wanted(ctx, (hidden_grad, side.rows_back(into, prototypes), exponent_grad, *side.tensors_back()))


def _wanted(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the arguments of forward; targets and call have none."""
    hidden, prototypes, exponent, *tensors = grads
    every = (hidden, prototypes, exponent, None, None, *tensors)
    return tuple(grad if need else None for grad, need in zip(every, ctx.needs_input_grad, strict=True))
