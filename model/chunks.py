"""Tokens are taken in chunks: how many at a time, and what is made of one.

Legend: k ranks in the vocabulary group; n tokens on this rank, in chunks of m; M = k * m gathered ones of a chunk; D
width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .contractions import RowsGradient, Statistics, Use, nothing
from .distance_base import Distance
from .kernels import choose, eager
from .kernels.eager import Given, Upstream
from .operands import Operands
from .options import LossOptions
from .vocab_parallel import (
    VocabShard,
    local_targets,
    max_across,
    own_rows,
    rows_of,
    start_gather,
    start_reduce,
    start_scatter,
)

# 500 tokens of 50,000 prototypes on a CPU; on a GPU of 80 GiB 17,000, as each chunk reads and writes the gradient of w
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # of a GPU, the least
CHUNK_SHARE = 1 / 16  # of a GPU's memory


@dataclass(frozen=True)
class Call:
    """What stays the same over the chunks of one call of the loss."""

    distance: Distance
    shard: VocabShard
    reduction: str
    ignore_index: int
    chunk_bytes: int  # budget of the working memory
    processors: int  # multiprocessors of the device
    use: Use
    summed: bool = True  # over tokens: losses, or the prototypes' gradients
    options: LossOptions = LossOptions()
    log_unit: Tensor | float = 0.0  # see Distance.log_unit; a z-loss alone reads it

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
        wave = -(-choose.kernels_for(hidden).tokens_per_wave(hidden.shape[1], self.processors) // self.shard.ranks)
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
        wide, kernels = eager.accumulator(hidden.dtype).itemsize, choose.kernels_for(hidden)
        # with options the plain form has scores, 1 / c and the slope of a cap beside what is kept
        more = 3 if kernels is eager and self.options != LossOptions() else 0
        if contraction.wide:
            return (contraction.kept * alive + contraction.temporaries + more) * wide
        return (contraction.kept * alive + kernels.TEMPORARIES + more) * wide + hidden.element_size()

    def each(
        self, side: Operands, hidden: Tensor, targets: Tensor, exponent: Tensor, use: Callable[[slice, Chunk], None]
    ) -> None:
        """Scores every chunk of hidden (n, D) and uses it, in order; `use` is given the tokens' slice and the chunk.

        (Were this a generator, its caller's variable would keep a chunk while the next one is made.)
        """
        waiting: tuple[slice, Chunk] | None = None
        for part in self.chunks(hidden):
            chunk = Chunk(self, side, hidden, targets, exponent, part)
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


class Chunk:
    """One chunk of the group's tokens, scored against this rank's rows; then (M,) log-sum-exp, mean score and target
    score, the same on every rank, each of them a collective behind the last.

    With e of label smoothing and z of a z-loss the loss is lse - (1 - e) target - e mean over classes + z lse^2, and
    its gradient by a score is (1 + 2 z lse) p - (1 - e) onehot - e / V.
    """

    def __init__(
        self, call: Call, side: Operands, hidden: Tensor, targets: Tensor, exponent: Tensor, part: slice
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
        options = self.call.options
        floor, smooth = self.call.distance.floor_of_scores(self.x), options.label_smoothing > 0
        given = Given(self.local, self.exponent, floor, cap=options.soft_cap, smooth=smooth)
        if self.call.shard.real:
            return self.call.distance.contraction.statistics(self.x, self.side.rows, given, self.call.use)
        zeros = torch.zeros(self.targets.shape, dtype=self.side.wide, device=self.targets.device)
        return Statistics(given, zeros - torch.inf, zeros, zeros, zeros, (zeros, zeros, zeros) if given.more else ())

    def add_up(self) -> None:
        """The second collective, once the first is there."""
        self.top = self._top.wait()
        part = (self.stats.top - self.top).exp_()  # 0 on a rank without real rows, whose top is -inf
        packed = torch.stack((self.stats.total * part, self.stats.moment * part, self.stats.target, *self.stats.more))
        self._sums = start_reduce(packed, self.call.shard.group)

    def settle(self) -> None:
        """Waits for the sums."""
        total, moment, self.target, *more = self._sums.wait()
        self.lse = self.top + total.log()
        self.mean_score = moment / total
        self._own_share = self.target  # n ds/dn, which is the score but for a cap
        if more:
            every, self._own_share, shares = more
            self._mean, self._mean_share = every / self.call.shard.size, shares / self.call.shard.size
        if self.call.options.z_loss:
            self._shift = self._from_common_units()
            self._pull = 2 * self.call.options.z_loss * (self.lse + self._shift)  # of the z-loss on lse

    def _from_common_units(self) -> Tensor | float:
        """(M,) what turns scores of the units that are computed in (model/operands.py) into those of the units given:
        n log of the unit of a distance.
        """
        distance = self.call.distance
        if self.call.options.soft_cap is not None or not distance.has_exponent:
            return 0.0  # scores are computed as they are given
        scale = 0.0 if self.scale is None else distance.degree * self.scale[:, 0].log()
        return self.exponent * (scale - self.call.log_unit - math.log(distance.contraction.factor))

    @property
    def losses(self) -> Tensor:
        """(M,), of ignored tokens too."""
        losses, options = self.lse - self.target, self.call.options
        if options.label_smoothing:
            losses = losses + options.label_smoothing * (self.target - self._mean)
        if options.z_loss:
            losses = losses + options.z_loss * (self.lse + self._shift).square()
        return losses

    def predictions(self) -> Tensor:
        """(M,) row of the whole vocabulary with the highest score; of equal ones, the first. Collective."""
        shard = self.call.shard
        top, row = self.stats.top, torch.zeros_like(self.local)
        if shard.real:
            top, row = self.call.distance.contraction.scores(self.stats).max(1)
        highest = max_across(top.clone(), shard.group)
        row = torch.where(top == highest, shard.start + row, shard.size)
        return start_reduce(row, shard.group, dist.ReduceOp.MIN).wait()

    def exponent_gradient(self, weight: Tensor) -> Tensor:
        """0-d, of sum(weight * losses) for weight (M,): ds/dn = s / n, so it is weight (E_p[s] - s_target) / n."""
        if not self.call.distance.has_exponent:
            return torch.zeros_like(self.exponent)
        slopes, options = self.mean_score - self._own_share, self.call.options
        if options.label_smoothing:
            slopes = slopes + options.label_smoothing * (self._own_share - self._mean_share)
        if options.z_loss:
            slopes = slopes + self._pull * (self.mean_score + self._shift)
        return weight @ (slopes / self.exponent)

    def _upstream(self, weight: Tensor) -> Upstream:
        """Of the kernels, from the weights (M,) of the tokens' losses."""
        options = self.call.options
        probabilities, own, uniform = weight, None, None
        if options.z_loss:
            probabilities, own = weight + weight * self._pull, weight
        if options.label_smoothing:
            own = weight * (1 - options.label_smoothing)
            uniform = weight * (options.label_smoothing / self.call.shard.size)
        return Upstream(self.lse, probabilities, self.stats.target, own, uniform)

    def hidden_gradient(self, weight: Tensor, into: RowsGradient, out: Tensor, factor: int = 1) -> None:
        """Of sum(weight * losses): that of this rank's tokens, times `factor`, fills `out` (m, D); that of its
        prototypes is added to `into` while the first is under way.
        """
        shard, side = self.call.shard, self.side
        if shard.real:
            contraction = self.call.distance.contraction
            total, sums, add_rows = contraction.gradients(self.stats, self.x, side.rows, self._upstream(weight), into)
        else:
            total, sums, add_rows = torch.zeros(self.x.rows.shape, dtype=side.wide, device=weight.device), None, nothing
        if shard.group is None:
            side.back(total, self.x.rows, sums, self.hidden, self.index, self.scale, out)
            add_rows()
            return
        side.back(total, self.x.rows, sums, self.hidden, self.index, self.scale, total, unscale=False)
        scattered = start_scatter(total, shard.group)
        add_rows()
        own = scattered.wait().mul_(factor)
        out.copy_(own if self.scale is None else eager.unscaled(own, own_rows(self.scale, shard), out.dtype))


def limits(hidden: Tensor, shard: VocabShard, chunk_bytes: int | None) -> tuple[int, int]:
    """Bytes of working memory and multiprocessors, the same on every rank of the group, which cut the same chunks."""
    most, processors = device_limits(hidden.device, shard.group)
    return most if chunk_bytes is None else chunk_bytes, processors


@functools.cache
def device_limits(device: torch.device, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The least of the group's; it is asked once."""
    if device.type != "cuda":
        return CHUNK_BYTES["cpu"], 1
    own = torch.cuda.get_device_properties(device)
    least = max(CHUNK_BYTES["cuda"], int(own.total_memory * CHUNK_SHARE)), own.multi_processor_count
    if group is None:
        return least
    most, processors = (-max_across(-torch.tensor(least, device=device), group)).tolist()
    return most, processors
