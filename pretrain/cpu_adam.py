"""AdamW in host memory, for ZeRO's offload: DeepSpeed's CPU Adam, with updates that depend on their number alone."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch.utils import cpp_extension

from common.errors import ConfigError
from common.machine import cores, cpu_name
from model.kernels.cpu import building
from pretrain.checkpoints.fragments import make_adam_state


class HostAdamW(DeepSpeedCPUAdam):
    """DeepSpeed's, but for the bias corrections. Those are multiplied up in float32 from update to update, and taken
    anew where a run goes on, which would not be the uninterrupted one. Here rate, epsilon and decay hold them.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        # not DeepSpeed's own, which starts programs that describe the processor, for seconds
        torch.optim.Optimizer.__init__(self, groups, {"lr": lr, "betas": betas, "eps": eps, "amsgrad": False})
        self.opt_id = DeepSpeedCPUAdam.optimizer_id
        DeepSpeedCPUAdam.optimizer_id += 1
        self.ds_opt_adam = CPUAdamBuilder().load(verbose=False)
        self.ds_opt_adam.create_adam(self.opt_id, lr, *betas, eps, 0.0, True, False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient; both lie in host memory."""
        assert closure is None, "ZeRO gives none"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                make_adam_state(self, [parameter])
                state = self.state[parameter]
                state["step"] += 1
                step = int(state["step"])
                # lr / c1 * m / (sqrt(v) / c2 + eps) = lr * c2 / c1 * m / (sqrt(v) + eps * c2)
                c1, c2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
                self.ds_opt_adam.adam_update(
                    self.opt_id, step, group["lr"] * c2 / c1, beta1, beta2, group["eps"] * c2,
                    group["weight_decay"] * c1 / c2, False, parameter.data, parameter.grad.data, state["exp_avg"],
                    state["exp_avg_sq"],
                )  # fmt: skip


ZERO_SUPPORTED_OPTIMIZERS.append(HostAdamW)  # else DeepSpeed warns of an untested one


def host_adamw(groups: list[dict[str, Any]], local_world: int, **settings: Any) -> HostAdamW:
    """A HostAdamW; its C++ is compiled at first use, by one rank of a host while the others wait.

    Args:
        local_world: ranks on this host, which share its cores.
    Raises:
        ConfigError: it cannot be compiled here.
    """
    # its OpenMP reads this when it is loaded; the launcher sets it on CPUs alone
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // local_world)))
    try:
        with _own_extensions() as folder, building(folder / "cpu_adam"):
            return HostAdamW(groups, **settings)
    except (RuntimeError, OSError) as error:
        lines = str(error.__cause__ or error).splitlines() or ["no reason given"]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0]).strip()
        raise ConfigError(
            f"deepspeed.zero_optimization.offload_optimizer: DeepSpeed's CPU Adam cannot be compiled here ({reason}); "
            "install g++ and ninja, let TORCH_EXTENSIONS_DIR name a folder that can be written, or do without it"
        ) from error


@contextmanager
def _own_extensions() -> Iterator[Path]:
    """DeepSpeed compiles for the very CPU, into a folder of one name: machines that differ and share a home each need
    one of their own.
    """
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    facts = f"{cpu_name()} {torch.__version__} {deepspeed.__version__}"
    root = Path(before or cpp_extension.get_default_build_root())
    folder = root / f"overtone_adam_{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR")
        if before is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = before
