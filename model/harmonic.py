"""Harmonic loss: exact, chunked, differentiable, vocabulary-parallel; nothing of size tokens x vocabulary is ever in
memory.

Tokens are taken in chunks whose working memory follows from a budget. For each chunk: gather the group's hidden states,
score them against this rank's prototypes, combine (max, sum, target score) over the group with one MAX and one
packed SUM, and, for reduced losses, take the gradient at once, while the chunk's scores are at hand. For
`reduction="none"` the backward pass scores again. In a group the next chunk is scored before the gradient of this one
is taken, so that no collective is waited for with nothing to do.

Legend: k ranks in the vocabulary group, n tokens on this rank, N = k * n; a chunk has m local and M = k * m gathered
tokens; V prototypes in all, R real ones on this rank, D width.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .contractions import RowsGradient, Statistics, Upstream, Use, nothing
from .distances import LARGEST_ROW, Distance, resolve
from .kernels import eager
from .kernels.choose import fused_kernels_for, kernels_for
from .vocab_parallel import (
    VocabShard,
    gather_rows,
    local_targets,
    max_across,
    own_rows,
    rows_of,
    start_gather,
    start_reduce,
    start_scatter,
    sum_across,
)

# 500 tokens of 50,000 prototypes on a CPU; on a GPU of 80 GiB 17,000, as each chunk reads and writes the gradient of w
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # of a GPU, the least
CHUNK_SHARE = 1 / 16  # of a GPU's memory
SPARE = 13  # powers of two between the largest square and the largest number: sums of 2^26 of them


@dataclass(frozen=True)
class _Call:
    """What stays the same over the chunks of one call."""

    distance: Distance
    shard: VocabShard
    reduction: str
    ignore_index: int
    chunk_bytes: int
    processors: int  # multiprocessors of the device
    use: Use
    summed: bool = True  # over tokens: losses, or the prototypes' gradients

    @property
    def overlapped(self) -> bool:
        """Whether two chunks are in flight, the collectives of one behind the work on the other."""
        return self.shard.group is not None

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of the local tokens; every rank of the group makes the same ones."""
        rows = rows_of(self.shard.size, self.shard.ranks)
        wide = eager.accumulator(hidden.dtype).itemsize
        # a gathered token's scores; x, its gradient, its difference to the target
        per_token = self.shard.ranks * (rows * self._pair_bytes(hidden) + hidden.shape[1] * 3 * wide)
        most = max(1, self.chunk_bytes // per_token)
        step = -(-hidden.shape[0] // -(-hidden.shape[0] // most)) if hidden.shape[0] else 1  # equal ones, no small rest
        wave = -(-kernels_for(hidden).tokens_per_wave(hidden.shape[1], self.processors) // self.shard.ranks)
        whole = -(-step // wave) * wave
        step = whole if whole <= most else max(step, most // wave * wave)
        for first in range(0, hidden.shape[0], step):
            yield slice(first, min(first + step, hidden.shape[0]))

    def _pair_bytes(self, hidden: Tensor) -> int:
        """What is kept of a token and a prototype: scores and temporaries of them, and rounded gradients."""
        alive = 2 if self.overlapped else 1
        contraction = self.distance.contraction
        if self.use.fused and not contraction.wide:
            return alive * hidden.element_size()
        wide = eager.accumulator(hidden.dtype).itemsize
        if contraction.wide:
            return (contraction.kept * alive + contraction.temporaries) * wide
        return (contraction.kept * alive + kernels_for(hidden).TEMPORARIES) * wide + hidden.element_size()

    def each(self, hidden: Tensor, make_chunk: Callable[[slice], _Chunk], use: Callable[[slice, _Chunk], None]) -> None:
        """Scores every chunk and uses it, in order."""
        waiting: tuple[slice, _Chunk] | None = None
        for part in self.chunks(hidden):
            chunk = make_chunk(part)
            if waiting:
                use(*waiting)
                waiting = None
            chunk.add_up()
            if self.overlapped:
                waiting = part, chunk
            else:
                use(part, chunk)
            del chunk
        if waiting:
            use(*waiting)


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
        chunk_bytes: budget of the working memory (one token at a time is the least that it can be); None: see
            CHUNK_BYTES, and CHUNK_SHARE of a GPU's memory.
        fused: whether scores are made in the product's epilogue and kept rounded (on Hopper, in bfloat16), or in passes
            over float32 products; None: as the device's kernels say. Where a GPU cannot do it the log says so. On CPUs
            True takes its plain form; distances that are no product have no such choice.
        params: the distance's own, if it is given by name: minkowski `p`; hamming `kind`, `temperature`; braycurtis
            `denominator`; mahalanobis `factor`, which may require a gradient. See model/distances.py.

    Gradients of "sum" and "none" are those of the group's sum. For "mean" the gradient of `hidden` is multiplied by the
    group's size, so that averaging over ranks, as data parallelism does, gives the gradient of the mean; those of the
    prototypes, the exponent and the factor are complete within the group, to be averaged only over replicas of the
    shard.

    The same inputs give the same bits on one machine (with a GPU's kernels too; its libraries may need to be told: see
    `train.deterministic` of the recipes). The order of sums over prototypes does not depend on the chunks, that of sums
    over tokens does: with the CPU's kernels other chunks change no bit of a token's loss and gradient (but for soft
    Hamming's sigmoids and the separable Bray-Curtis, which are PyTorch's), and the prototypes' gradient by the rounding
    of float32 sums, below 2^-18 of its largest entry.

    Raises:
        ValueError: unknown distance, parameter or reduction, shapes that do not fit, exponent <= 0, a target out of
            range (on a GPU, which is not waited for, the loss is NaN and a later call raises it).
    """
    shard = shard or VocabShard(0, prototypes.shape[0])
    entry = resolve(distance, params)
    exponent = _checked(hidden, prototypes, targets, entry, exponent, reduction, ignore_index, shard)
    entry = entry.prepared(hidden.dtype, lambda: _drawn(hidden.device, shard))
    tensors = entry.tensors
    differentiate = torch.is_grad_enabled() and any(
        t.requires_grad for t in (hidden, prototypes, exponent, *tensors.values())
    )
    detached = replace(entry, **{name: tensor.detach() for name, tensor in tensors.items()})
    kernels = None if entry.contraction.wide else fused_kernels_for(hidden, fused)
    use = Use(kernels, differentiate and reduction != "none", exponent.requires_grad)
    call = _Call(detached, shard, reduction, ignore_index, *_limits(hidden, shard, chunk_bytes), use)
    function = _PerToken if reduction == "none" else _Reduced
    return function.apply(hidden, prototypes, exponent, targets, call, *tensors.values())


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
    **params: Any,
) -> tuple[Tensor, Tensor]:
    """The losses (n,) of `harmonic_loss(reduction="none")`, and the most probable prototypes (n,) of the whole
    vocabulary: one pass over the scores, chunk by chunk, without gradient.

    Of prototypes with equal scores it is the first. Scores are those of the loss, so the target's is taken by direct
    difference: a near tie with the target, within the rounding of a score, may fall otherwise than with an ignored one.
    Arguments and errors are those of `harmonic_loss`.
    """
    shard = shard or VocabShard(0, prototypes.shape[0])
    entry = resolve(distance, params)
    exponent = _checked(hidden, prototypes, targets, entry, exponent, "none", ignore_index, shard)
    entry = entry.prepared(hidden.dtype, lambda: _drawn(hidden.device, shard))
    bytes_, processors = _limits(hidden, shard, chunk_bytes)
    third = bytes_ // 3  # a chunk's scores are made a second time, beside what was kept
    call = _Call(entry, shard, "none", ignore_index, third, processors, Use(gradient=False), summed=False)
    side = _Prototypes(hidden, prototypes, entry, shard)
    losses = torch.zeros(hidden.shape[0], dtype=side.wide, device=hidden.device)
    predictions = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)

    def use(part: slice, chunk: _Chunk) -> None:
        chunk.settle()
        losses[part] = own_rows(chunk.losses, shard)
        predictions[part] = own_rows(chunk.predictions(), shard)

    call.each(hidden, lambda part: _Chunk(call, side, hidden, targets, exponent, part), use)
    return losses.masked_fill_(targets == ignore_index, 0), predictions


@_as_given
def harmonic_log_probs(
    hidden: Tensor,
    prototypes: Tensor,
    *,
    distance: str | Distance = "euclidean",
    exponent: float | Tensor = 1.0,
    **params: Any,
) -> Tensor:
    """(n, D), all prototypes (V, D) -> (n, V) log-probabilities, without gradient. This one is of size n x V."""
    none = torch.full((hidden.shape[0],), -100, device=hidden.device)
    shard = VocabShard(0, prototypes.shape[0])
    entry = resolve(distance, params)
    exponent = _checked(hidden, prototypes, none, entry, exponent, "none", -100, shard)
    with torch.no_grad():
        entry = entry.prepared(hidden.dtype, lambda: _drawn(hidden.device, shard))
        side = _Prototypes(hidden, prototypes, entry, shard)
        x = side.tokens(hidden, side.positions(hidden, slice(0, hidden.shape[0])), side.token_scales(hidden))
        stats = entry.contraction.statistics(x, side.rows, entry.floor(x), none, exponent, Use(gradient=False))
        scores = entry.contraction.scores(stats, none, exponent)
        return scores - (stats.top + stats.total.log())[:, None]


def _limits(hidden: Tensor, shard: VocabShard, chunk_bytes: int | None) -> tuple[int, int]:
    """Bytes of working memory and multiprocessors, the same on every rank of the group, which cut the same chunks."""
    most, processors = _device_limits(hidden.device, shard.group)
    return most if chunk_bytes is None else chunk_bytes, processors


@functools.cache
def _device_limits(device: torch.device, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The least of the group's; it is asked once."""
    if device.type != "cuda":
        return CHUNK_BYTES["cpu"], 1
    own = torch.cuda.get_device_properties(device)
    limits = max(CHUNK_BYTES["cuda"], int(own.total_memory * CHUNK_SHARE)), own.multi_processor_count
    if group is None:
        return limits
    most, processors = (-max_across(torch.tensor([-one for one in limits], device=device), group)).tolist()
    return most, processors


def _drawn(device: torch.device, shard: VocabShard) -> Tensor:
    """A random 0-d int64 from torch's CPU generator; in a group, the greatest."""
    drawn = int(torch.randint(2**31, (), device="cpu"))
    return max_across(torch.full((), drawn, device=device), shard.group)  # a copy would wait for a GPU


def _checked(
    hidden: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    distance: Distance,
    exponent: float | Tensor,
    reduction: str,
    ignore_index: int,
    shard: VocabShard,
) -> Tensor:
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
    distance.check(hidden.shape[1], eager.accumulator(hidden.dtype))
    if targets.device.type == "cpu" and targets.numel():
        _check_range(_range_of(targets, ignore_index), shard.size, ignore_index)
    _TARGETS.look()
    wide = eager.accumulator(hidden.dtype)
    if not isinstance(exponent, Tensor):
        if not exponent > 0:
            raise ValueError(f"exponent={exponent}: expected a positive number")
        return torch.full((), float(exponent), dtype=wide, device=hidden.device)
    return exponent.to(hidden.device, wide).reshape(())


def _range_of(targets: Tensor, ignore_index: int) -> Tensor:
    """(n,) -> (2,) the first and the last of those that are not ignored; (0, 0) if all are."""
    counted = targets != ignore_index
    return torch.stack(torch.aminmax(torch.where(counted, targets, targets.new_zeros(()))))


def _check_range(bounds: Tensor, size: int, ignore_index: int) -> None:
    first, last = bounds.tolist()
    if first < 0 or last >= size:
        raise ValueError(f"targets reach from {first} to {last}: expected 0 to {size - 1}, or {ignore_index}")


class _TargetChecks:
    """Ranges of targets on their way from GPUs to the host: nobody waits for them, a later call looks."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.cuda.Event, Tensor, int, int]] = deque()

    def send(self, bounds: Tensor, size: int, ignore_index: int) -> None:
        """Of one call, (2,) on a GPU; not of one that a graph records."""
        with torch.cuda.device_of(bounds):
            if torch.cuda.is_current_stream_capturing():
                return
            host = torch.empty(2, dtype=torch.int64, pin_memory=True)
            host.copy_(bounds, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((arrived, host, size, ignore_index))

    def look(self) -> None:
        """Raises ValueError if the targets of an earlier call are known to have been out of range."""
        if self._waiting and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # which asking an event would end
        while self._waiting and self._waiting[0][0].query():
            _, bounds, size, ignore_index = self._waiting.popleft()
            try:
                _check_range(bounds, size, ignore_index)
            except ValueError as error:
                raise ValueError(f"{error} (in an earlier call on this GPU, whose loss was NaN)") from None


_TARGETS = _TargetChecks()


def _like(hidden: Tensor) -> Tensor:
    """(n, D), uninitialised, rows one behind the other, however those of `hidden` lie."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _valid(targets: Tensor, ignore_index: int, shard: VocabShard, wide: torch.dtype) -> Tensor | None:
    """0-d 1, or NaN if a target of the group is out of range, which is raised as an error once a GPU has told; None
    on a CPU, where `_checked` did so.
    """
    if targets.device.type == "cpu" or not targets.numel():
        return None
    bounds = _range_of(targets, ignore_index)
    if shard.group is not None:  # every rank is to know: one that raised alone would leave the others waiting
        first, last = bounds
        first, last = max_across(torch.stack((-first, last)), shard.group)
        bounds = torch.stack((-first, last))
    if targets.is_cuda:
        _TARGETS.send(bounds, shard.size, ignore_index)
    return torch.where((bounds[0] < 0) | (bounds[1] >= shard.size), torch.nan, 1.0).to(wide)


class _Prototypes:
    """Both sides of one call after scaling, noise and the distance's transform, and the way back for gradients."""

    def __init__(self, hidden: Tensor, prototypes: Tensor, distance: Distance, shard: VocabShard) -> None:
        self.distance, self.shard = distance, shard
        self.wide = eager.accumulator(hidden.dtype)
        self.dtype = self.wide if distance.contraction.wide else hidden.dtype
        self.source = prototypes.detach()[: shard.real]
        kind = type(distance)
        self.as_they_are = kind.perturb is Distance.perturb and (kind.transform is Distance.transform or distance.unit)
        self.power = _power(self.source, shard) if distance.scaled else None
        self.scale = None if self.power is None else torch.exp2(self.power.to(self.wide))
        self.tensors = {name: torch.zeros_like(t, dtype=self.wide) for name, t in distance.tensors.items()}
        self.kernels = kernels_for(self.source.new_empty(0, dtype=self.dtype))
        rows = self.kernels.empty(self.source.shape, self.dtype, hidden.device)
        squares = [self._fill(rows[block], self.source[block], index, self.scale) for block, index in self._blocks()]
        known = squares[0] if len(squares) == 1 else None
        self.rows = self.kernels.Rows(rows, 1 if shard.group is None else 2, known)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of this rank's prototypes, and which ones of all they are."""
        step = self.kernels.rows_at_a_time(self.source.shape[1], self.as_they_are)
        for first in range(0, self.source.shape[0], step):
            last = min(first + step, self.source.shape[0])
            start = self.shard.start
            yield slice(first, last), torch.arange(start + first, start + last, device=self.source.device)

    def positions(self, hidden: Tensor, part: slice) -> Tensor:
        """(M,) index of a gathered chunk's tokens for `Distance.perturb`: -1 - token of the group."""
        ranks = torch.arange(self.shard.ranks, device=hidden.device) * hidden.shape[0]
        return -1 - (ranks[:, None] + torch.arange(part.start, part.stop, device=hidden.device)).reshape(-1)

    def token_scales(self, hidden: Tensor) -> Tensor | None:
        """(M, 1) power of two of each token: that of the prototypes, less where its squares would overflow. A token so
        long is as far from every prototype, to the last digit, as one farther out.
        """
        if self.power is None:
            return None
        power = torch.minimum(self.power, _largest_power(self.wide) // 2 - SPARE - _exponents(_sizes(hidden)))
        return torch.exp2(power.to(self.wide))[:, None]

    def _scaled(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        rows = rows.to(self.wide)
        return rows if scale is None else rows * scale

    def _fill(self, out: Tensor, rows: Tensor, index: Tensor, scale: Tensor | None) -> Tensor | None:
        """`out` (N, D) becomes rows (N, D), transformed, in the dtype that the contraction reads; their squared norms
        where they come along.
        """
        if self.as_they_are:
            return self.kernels.prepare(rows, scale, self.distance.unit, out)
        out.copy_(self.distance.transform(self.distance.perturb(self._scaled(rows, scale), index)))
        return None

    def _back(
        self,
        total: Tensor,
        rows: Tensor,
        sums: Tensor | None,
        source: Tensor,
        index: Tensor,
        scale: Tensor | None,
        out: Tensor,
        unscale: bool = True,
    ) -> None:
        """The way back of `_fill`: `out` (N, D), which may be `total`, becomes the gradient of the source; those of the
        distance's tensors are added up on the way. Consumes `total`. `unscale` is False where the scale waits until the
        group's parts are added up.
        """
        late = scale if unscale else None
        if self.as_they_are:
            self.kernels.finish(total, rows, sums, source, late, self.distance.unit, out)
            return
        self.kernels.finish(total, rows, sums, rows, None, False, total)
        back, others = self.distance.pull_back(self._scaled(source, scale), index, total)
        for tensor, more in zip(self.tensors.values(), others, strict=True):
            tensor += more
        out.copy_(back if late is None else eager.unscaled(back, late, out.dtype))

    def tokens(self, hidden: Tensor, index: Tensor, scale: Tensor | None) -> eager.Tokens:
        """Hidden states (M, D) as the contraction reads them."""
        out = torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device)
        return self.kernels.Tokens(out, self._fill(out, hidden, index, scale))

    def tokens_back(
        self,
        x: eager.Tokens,
        hidden: Tensor,
        index: Tensor,
        scale: Tensor | None,
        total: Tensor,
        sums: Tensor | None,
        out: Tensor,
    ) -> None:
        """`out` (M, D) becomes the gradient of hidden states; if it is `total`, up to the scale."""
        self._back(total, x.rows, sums, hidden, index, scale, out, unscale=out is not total)

    def rows_back(self, into: RowsGradient, prototypes: Tensor) -> Tensor:
        """The gradient of all stored prototypes (zero for padding), in their dtype."""
        contraction = self.distance.contraction
        contraction.complete(into, self.rows)
        grad, sums = into.products, contraction.sums(into)
        for block, index in self._blocks():
            part, own = grad[block], None if sums is None else sums[block]
            self._back(part, self.rows.rows[block], own, self.source[block], index, self.scale, part)
        if prototypes.dtype != grad.dtype:  # the gradient of the tiniest of rows passes its largest number
            most = torch.finfo(prototypes.dtype).max
            grad = grad.clamp_(-most, most)
        padding = prototypes.shape[0] - grad.shape[0]
        return (torch.nn.functional.pad(grad, (0, 0, 0, padding)) if padding else grad).to(prototypes.dtype)

    def tensors_back(self) -> list[Tensor]:
        """The gradients of the distance's tensors, complete within the group; after all tokens and rows."""
        return [
            sum_across(total, self.shard.group).to(tensor.dtype)
            for total, tensor in zip(self.tensors.values(), self.distance.tensors.values(), strict=True)
        ]


def _power(rows: Tensor, shard: VocabShard) -> Tensor:
    """0-d int64: the power of two that brings the group's prototypes to entries of about 1, by the mean over rows of
    the exponent of the largest entry; less where one prototype would be too long then.

    HarMax does not change, nor does a digit of it: squares cannot overflow, and log q stays small. Tokens have no say,
    so that none can reach another.
    """
    sizes = _sizes(rows)
    counts = (sizes > 0) & sizes.isfinite()
    found, none = _exponents(sizes), -(2**31)
    total = torch.stack((torch.where(counts, found, 0).sum(), counts.sum()))
    highest = torch.cat((found.new_full((1,), none), torch.where(counts, found, none))).max()
    total, highest = sum_across(total, shard.group), max_across(highest, shard.group)
    typical = torch.round(total[0].double() / total[1].clamp_min(1)).long()
    least = 1 - _largest_power(sizes.dtype)  # beyond, the scale itself would be no normal number
    return torch.minimum(-typical, LARGEST_ROW - highest).clamp(least, -least)


def _sizes(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) largest entries, in the accumulator's dtype."""
    return torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1).to(eager.accumulator(rows.dtype))


def _exponents(sizes: Tensor) -> Tensor:
    """The least powers of two above, int64; 0 for 0."""
    return sizes.frexp().exponent.long()


def _largest_power(dtype: torch.dtype) -> int:
    """Of two, that `dtype` holds."""
    return math.frexp(torch.finfo(dtype).max)[1] - 1


class _Chunk:
    """One chunk of the group's tokens, scored against this rank's rows; then (M,) log-sum-exp, mean score and target
    score, the same on every rank, each of them a collective behind the last.
    """

    def __init__(
        self, call: _Call, side: _Prototypes, hidden: Tensor, targets: Tensor, exponent: Tensor, part: slice
    ) -> None:
        self.call, self.side, self.exponent = call, side, exponent
        group = call.shard.group
        own = hidden[part]
        if call.summed:  # what an ignored token holds must not get into sums over tokens, be it no number
            own = own.masked_fill((targets[part] == call.ignore_index)[:, None], 0)
        gathered, chosen = start_gather(own, group), start_gather(targets[part], group)
        self.index = side.positions(hidden, part)
        self.hidden, self.targets = gathered.wait(), chosen.wait()  # (M, D), (M,)
        self.local = local_targets(self.targets, call.shard)
        self.scale = side.token_scales(self.hidden)
        self.x = side.tokens(self.hidden, self.index, self.scale)
        self.stats = self._statistics()
        self._top = start_reduce(self.stats.top.clone(), group, dist.ReduceOp.MAX)

    def _statistics(self) -> Statistics:
        if self.call.shard.real:
            distance, use = self.call.distance, self.call.use
            floor = distance.floor(self.x)
            return distance.contraction.statistics(self.x, self.side.rows, floor, self.local, self.exponent, use)
        zeros = torch.zeros(self.targets.shape, dtype=self.side.wide, device=self.targets.device)
        return Statistics(zeros - torch.inf, zeros, zeros, zeros)

    def add_up(self) -> None:
        """The second collective, once the first is there."""
        self.top = self._top.wait()
        part = (self.stats.top - self.top).exp_()  # 0 on a rank without real rows, whose top is -inf
        packed = torch.stack((self.stats.total * part, self.stats.moment * part, self.stats.target))
        self._sums = start_reduce(packed, self.call.shard.group)

    def settle(self) -> None:
        """Waits for the sums."""
        total, moment, self.target = self._sums.wait()
        self.lse = self.top + total.log()
        self.mean_score = moment / total

    @property
    def losses(self) -> Tensor:
        """(M,), of ignored tokens too."""
        return self.lse - self.target

    def predictions(self) -> Tensor:
        """(M,) row of the whole vocabulary with the highest score; of equal ones, the first. Collective."""
        shard = self.call.shard
        top, row = self.stats.top, torch.zeros_like(self.local)
        if shard.real:
            top, row = self.call.distance.contraction.scores(self.stats, self.local, self.exponent).max(1)
        highest = max_across(top.clone(), shard.group)
        row = torch.where(top == highest, shard.start + row, shard.size)
        return start_reduce(row, shard.group, dist.ReduceOp.MIN).wait()

    def exponent_gradient(self, weight: Tensor) -> Tensor:
        if not self.call.distance.has_exponent:
            return torch.zeros_like(self.exponent)
        return weight @ ((self.mean_score - self.target) / self.exponent)

    def hidden_gradient(self, weight: Tensor, into: RowsGradient, out: Tensor, factor: int = 1) -> None:
        """Of sum(weight * losses): that of this rank's tokens, times `factor`, fills `out` (m, D); that of its
        prototypes is added to `into` while the first is under way.
        """
        shard, side = self.call.shard, self.side
        if shard.real:
            given = Upstream(self.local, self.lse, self.stats.target, weight, self.exponent)
            total, sums, add_rows = self.call.distance.contraction.gradients(self.stats, self.x, side.rows, given, into)
        else:
            total, sums, add_rows = torch.zeros(self.x.rows.shape, dtype=side.wide, device=weight.device), None, nothing
        if shard.group is None:
            side.tokens_back(self.x, self.hidden, self.index, self.scale, total, sums, out)
            add_rows()
            return
        side.tokens_back(self.x, self.hidden, self.index, self.scale, total, sums, total)
        scattered = start_scatter(total, shard.group)
        add_rows()
        found = scattered.wait().mul_(factor)
        out.copy_(found if self.scale is None else eager.unscaled(found, own_rows(self.scale, shard), out.dtype))


class _Reduced(torch.autograd.Function):
    """Mean or sum: the gradient is taken in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, prototypes: Tensor, exponent: Tensor, targets: Tensor, call: _Call, *tensors: Tensor
    ) -> Tensor:  # type: ignore[override]
        shard = call.shard
        side = _Prototypes(hidden, prototypes, call.distance, shard)
        total = torch.zeros((), dtype=side.wide, device=hidden.device)
        exponent_grad, share, ranks = torch.zeros_like(total), torch.ones_like(total), 1
        if call.reduction == "mean":
            share = 1 / sum_across((targets != call.ignore_index).sum(), shard.group).clamp_min(1).to(side.wide)
            ranks = shard.ranks
        valid = _valid(targets, call.ignore_index, shard, side.wide)
        if valid is not None:
            share = share * valid
        hidden_grad = _like(hidden) if call.use.gradient else hidden
        into = RowsGradient(side.rows) if call.use.gradient else None

        def use(part: slice, chunk: _Chunk) -> None:
            chunk.settle()
            weight = (chunk.targets != call.ignore_index).to(side.wide) * share
            total.add_(weight @ chunk.losses)
            if into is not None:
                exponent_grad.add_(chunk.exponent_gradient(weight))
                chunk.hidden_gradient(weight, into, hidden_grad[part], ranks)

        call.each(hidden, lambda part: _Chunk(call, side, hidden, targets, exponent, part), use)
        if into is not None:
            ctx.grads = (hidden_grad, side.rows_back(into, prototypes), exponent_grad, *side.tensors_back())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("harmonic_loss: second backward through one loss; its gradient was taken and given away")
        if upstream.device.type != "cpu" or upstream != 1:
            grads = tuple(grad.mul_(upstream) for grad in grads)
        return _wanted(ctx, grads)


class _PerToken(torch.autograd.Function):
    """reduction="none": no gradient is kept; the backward pass scores again with the upstream weights."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, prototypes: Tensor, exponent: Tensor, targets: Tensor, call: _Call, *tensors: Tensor
    ) -> Tensor:  # type: ignore[override]
        side = _Prototypes(hidden, prototypes, call.distance, call.shard)
        losses = torch.zeros(hidden.shape[0], dtype=side.wide, device=hidden.device)

        def use(part: slice, chunk: _Chunk) -> None:
            chunk.settle()
            losses[part] = own_rows(chunk.losses, call.shard)

        call.each(hidden, lambda part: _Chunk(call, side, hidden, targets, exponent, part), use)
        ctx.save_for_backward(hidden, prototypes, exponent, targets)
        ctx.call = call
        valid = ctx.valid = _valid(targets, call.ignore_index, call.shard, side.wide)
        if valid is not None:
            losses *= valid
        return losses.masked_fill_(targets == call.ignore_index, 0)

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        hidden, prototypes, exponent, targets = ctx.saved_tensors
        call: _Call = replace(ctx.call, use=replace(ctx.call.use, gradient=True))
        side = _Prototypes(hidden, prototypes, call.distance, call.shard)
        into = RowsGradient(side.rows)
        hidden_grad = _like(hidden)
        exponent_grad = torch.zeros((), dtype=side.wide, device=hidden.device)
        upstream = upstream.masked_fill(targets == call.ignore_index, 0).to(side.wide)
        if ctx.valid is not None:
            upstream = upstream * ctx.valid

        def use(part: slice, chunk: _Chunk) -> None:
            weight = gather_rows(upstream[part], call.shard.group)
            chunk.settle()
            exponent_grad.add_(chunk.exponent_gradient(weight))
            chunk.hidden_gradient(weight, into, hidden_grad[part])

        call.each(hidden, lambda part: _Chunk(call, side, hidden, targets, exponent, part), use)
        return _wanted(ctx, (hidden_grad, side.rows_back(into, prototypes), exponent_grad, *side.tensors_back()))


def _wanted(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the arguments of forward; targets and call have none."""
    hidden, prototypes, exponent, *tensors = grads
    every = (hidden, prototypes, exponent, None, None, *tensors)
    return tuple(grad if need else None for grad, need in zip(every, ctx.needs_input_grad, strict=True))
