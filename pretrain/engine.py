"""The trunk under DeepSpeed ZeRO, the prototypes beside it, and one update of both.

`h = engine(tokens); loss = head(h, targets); engine.backward(loss); engine.step()`. The head's rows are sharded by
construction at every ZeRO stage; its gradient is complete within the vocabulary group and averaged over the replicas
of the shard. One global norm clips trunk and prototypes together, and decides for both whether the step is taken.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from model.decoder import documents_in
from model.vocab_parallel import sum_across
from pretrain.batches import inputs_and_targets
from pretrain.checkpoints.fragments import Fragment, finish_load, head_fragments, trunk_fragments
from pretrain.config import RunConfig
from pretrain.modules import build_modules, hidden_states, score_positions
from pretrain.optim import FUSED, adamw
from pretrain.runtime.environment import OPEN_MPI
from pretrain.runtime.ranks import Ranks

log = logging.getLogger(__name__)

# Of use to inference alone, on CPUs; it compiles for half a minute, and every rank leaves 66 MiB in /dev/shm for ever.
# (The attribute deepspeed.comm.torch is torch itself.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

# At ZeRO 1 and above DeepSpeed imports its Muon, which is not used here: it compiles functions at import, and so loads
# all of Inductor, some seconds of every rank.
_compile, torch.compile = torch.compile, lambda function=None, **_: function or (lambda inner: inner)  # type: ignore
try:
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
finally:
    torch.compile = _compile

NEVER_CLIP = 1e30  # DeepSpeed takes no norm without a limit, and the norm is what guards the step


def deepspeed_config(cfg: RunConfig, world: int) -> dict[str, Any]:
    """The configuration that DeepSpeed is given: ours, with the user's `deepspeed:` block merged in."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch,
        "gradient_accumulation_steps": cfg.accumulation(world),
        "gradient_clipping": cfg.optim.clip or NEVER_CLIP,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": cfg.zero_stage(),
            "memory_efficient_linear": False,  # would replace F.linear everywhere at stage 3, and change bf16 rounding
            "round_robin_gradients": False,
        },
    }
    if cfg.train.precision == "bf16":
        ours["bf16"] = {"enabled": True}
    return _merged(ours, cfg.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


@dataclass(frozen=True)
class Step:
    """What one update did. Tensors stay on the device until somebody logs them."""

    loss: Tensor  # mean over this rank's passes
    norm: Tensor  # global gradient norm before clipping; infinite if the step was skipped
    applied: bool


def _name_device(ranks: Ranks) -> None:
    """DeepSpeed takes LOCAL_RANK for the number of this rank's GPU, now and at stage 3 later; where ranks see their own
    GPU alone, or share one, it is not.
    """
    if ranks.device.type == "cuda" and ranks.device.index != ranks.local_rank:
        for name in {"LOCAL_RANK", OPEN_MPI["LOCAL_RANK"]} & os.environ.keys():  # it wants both alike
            os.environ[name] = str(ranks.device.index)


def _in_host_memory(ranks: Ranks) -> Callable[..., Any]:
    """For `adamw`: masters and moments are stepped where ZeRO's offload keeps them."""
    from pretrain.cpu_adam import host_adamw  # compiles C++: only where it is asked for

    return partial(host_adamw, local_world=ranks.local_world)


class Trainer:
    """Decoder, head and both optimisers of one rank."""

    def __init__(self, cfg: RunConfig, ranks: Ranks, eos_id: int | None = None) -> None:
        self.cfg, self.ranks, self.eos_id = cfg, ranks, eos_id
        if cfg.zero_stage() != cfg.parallel.zero:
            log.info("bf16 at ZeRO stage 0 runs as stage 1: DeepSpeed's own bf16 stage 0 is not exact")
        decoder, self.head = build_modules(cfg, ranks)
        self.head_optimizer = adamw(self.head, cfg.optim)
        optimizer = adamw(decoder, cfg.optim, _in_host_memory(ranks) if cfg.offloads("optimizer") else FUSED)
        _name_device(ranks)
        deepspeed_logger.setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()) as chatter:  # DeepSpeed prints memory tables
            self.engine, *_ = deepspeed.initialize(
                model=decoder, optimizer=optimizer, config=deepspeed_config(cfg, ranks.world)
            )
        log.debug("%s", chatter.getvalue())
        _join_norms(self.engine, self._head_norm_squared)

    def fragments(self, own_part: bool = False) -> dict[str, Fragment]:
        """All float32 masters and moments that this rank holds. Collective at ZeRO stage 3.

        Args:
            own_part: to write them: what several ranks hold, each of them writes a part of.
        """
        writes = self.ranks.replicas is None or torch.distributed.get_rank(self.ranks.replicas) == 0
        head = head_fragments(self.head, self.head_optimizer, writes)
        return {**trunk_fragments(self.engine, (self.ranks.rank, self.ranks.world) if own_part else None), **head}

    def finish_load(self, updates: int) -> None:
        """After the fragments were filled: `updates` were taken before."""
        finish_load(self.engine, self.head_optimizer, updates)

    def hidden(self, inputs: Tensor, documents: int | None = None) -> Tensor:
        """Tokens (B, T) -> hidden states (B, T, D); `documents` as `pretrain.modules.hidden_states` takes it."""
        return hidden_states(self.engine, self.head, inputs, self.cfg, self.eos_id, documents)

    def train_step(self, batches: Iterable[Tensor], lr: float) -> Step:
        """One update over this rank's passes, each as `inputs_and_targets` takes it, in host memory: what of a pass
        decides about sizes is counted there, so that the host never waits for the device.
        """
        for group in (*self.engine.optimizer.param_groups, *self.head_optimizer.param_groups):
            group["lr"] = lr * group["lr_scale"]
        self.engine.train()
        self.head.train()
        losses = []
        for batch in batches:
            documents = self._documents(batch)
            on_device = batch.to(self.ranks.device, non_blocking=True)
            inputs, targets = inputs_and_targets(on_device, masked=not self.cfg.model.causal)
            loss = self.head(self.hidden(inputs, documents), targets)
            self.engine.backward(loss)
            losses.append(loss.detach())
            if self.engine.is_gradient_accumulation_boundary():
                self._average_over_replicas()
            self.engine.step()
        applied = bool(self.engine.was_step_applied())
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.ranks.device)
        if applied:
            self._step_head(norm)
        self.head_optimizer.zero_grad(set_to_none=True)
        return Step(torch.stack(losses).mean(), norm, applied)

    def _documents(self, batch: Tensor) -> int | None:
        """How many documents the inputs of a pass hold, where they are kept apart."""
        if not self.cfg.model.document_mask:
            return None
        assert self.eos_id is not None, "a document mask needs the end of text"
        inputs, _ = inputs_and_targets(batch, masked=False)
        return documents_in(inputs, self.eos_id)

    @torch.no_grad()
    def score(self, inputs: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, T), positions and targets (B, S) -> nats and most probable tokens, (B * S,) each, as
        `pretrain.modules.score_positions` gives them. Collective.
        """
        return score_positions(self.head, self.states(inputs), at, targets)

    @torch.no_grad()
    def states(self, inputs: Tensor) -> Tensor:
        """Tokens (B, T) -> final hidden states (B, T, D), as evaluation has them: without dropout. Collective."""
        self.engine.eval()
        self.head.eval()
        return self.hidden(inputs)

    def _average_over_replicas(self) -> None:
        for parameter in self.head.parameters():
            if parameter.grad is not None and self.ranks.replicas is not None:
                sum_across(parameter.grad, self.ranks.replicas).div_(self.ranks.replica_count)

    def _head_norm_squared(self) -> Tensor:
        """Squared norm of the whole head's gradient: own rows summed over the group, what is replicated once."""
        rows = self.head.prototypes.grad
        assert rows is not None, "the head's gradient is taken before the norm"
        total = sum_across(torch.linalg.vector_norm(rows).square(), self.ranks.vocab)
        for parameter in self.head.parameters():
            if parameter is not self.head.prototypes and parameter.grad is not None:
                total = total + torch.linalg.vector_norm(parameter.grad).square()
        return total

    def _step_head(self, norm: Tensor) -> None:
        coefficient = ((self.cfg.optim.clip or NEVER_CLIP) / (norm + 1e-6)).clamp_max(1)
        for parameter in self.head.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(coefficient)
        self.head_optimizer.step()


def _join_norms(engine: Any, head_squared: Callable[[], Tensor]) -> None:
    """Joins the head's norm to the engine's: one clip, and one decision whether the step is taken.

    DeepSpeed skips a step whose norm is not finite. Each class takes its norm in another place; an unknown class is
    an error, so that a new DeepSpeed fails loudly instead of clipping trunk and head apart.
    """
    optimizer = engine.optimizer
    name = type(optimizer).__name__

    def joined(trunk: Tensor) -> Tensor:
        head = head_squared()
        norm = (torch.as_tensor(trunk, dtype=torch.float32, device=head.device).square() + head).sqrt()
        return norm.to(trunk.device)  # the host with offload: gradients are scaled there

    if name == "DeepSpeedZeroOptimizer":
        optimizer.check_grad_overflow = True
        inner_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: joined(inner_norm(norm_type))
    elif name == "DeepSpeedZeroOptimizer_Stage3":
        inner_groups = optimizer._get_norm_groups

        def norm_groups() -> list[Tensor]:
            groups: list[Tensor] = inner_groups()
            return [*groups, head_squared().sqrt().to(groups[0].device)]

        optimizer._get_norm_groups = norm_groups
    elif name == "BF16_Optimizer":
        inner_grads = optimizer.get_grads_for_norm

        def grads_for_norm(for_clipping: bool = False) -> Any:
            found = inner_grads(for_clipping=for_clipping)
            if for_clipping:
                return found
            trunk, experts = found
            return [*trunk, head_squared().sqrt().view(1)], experts

        optimizer.get_grads_for_norm = grads_for_norm
    elif optimizer is engine.basic_optimizer:
        _clip_together(engine, head_squared)
    else:
        raise AssertionError(f"DeepSpeed {deepspeed.__version__} made a {name}: where does it take its norm?")


def _clip_together(engine: Any, head_squared: Callable[[], Tensor]) -> None:
    """Stage 0 in float32: a plain torch optimiser that DeepSpeed neither guards nor skips."""
    finite = True

    def clip() -> None:
        nonlocal finite
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        trunk = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = (trunk.square() + head_squared()).sqrt()
        finite = bool(norm.isfinite())
        engine._global_grad_norm = norm.item() if finite else float("inf")
        if finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
        else:
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves a parameter without gradient alone, moments and all

    engine.clip_fp32_gradients, engine.was_step_applied = clip, lambda: finite
