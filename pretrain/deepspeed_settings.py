"""What may stand in the `deepspeed:` block: settings of DeepSpeed that Overtone leaves to the user, with their types.

DeepSpeed takes a key that it does not know without a word, or dies of it when the ranks have started; and to ask it
takes its import, which is seconds. Here is what trains Overtone's models on every device; a test compares it with
DeepSpeed's own models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from common.errors import ConfigError
from common.fields import FilePath
from common.settings import validate

Elements = Annotated[int, Field(gt=0, le=2**40)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]


class OffloadParam(BaseModel, extra="forbid", frozen=True):
    """Parameters outside of the GPU, at stage 3."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: FilePath | None = None
    buffer_count: Count = 5
    buffer_size: Elements = 10**8
    max_in_cpu: Elements = 10**9
    pin_memory: bool = True


class OffloadOptimizer(BaseModel, extra="forbid", frozen=True):
    """Masters and moments outside of the GPU, and their update on the CPU."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: FilePath | None = None
    buffer_count: Count = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Share = 1.0
    super_offload: bool = False
    cpuadam_cores_perc: Share = 0.8


class ZeroOptimization(BaseModel, extra="forbid", frozen=True):
    """The trunk's ZeRO. Its `stage` is parallel.zero."""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Elements = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Annotated[Elements, Field(multiple_of=2)] = 500_000_000
    overlap_comm: bool | None = None
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    sub_group_size: Elements = 10**9
    stage3_prefetch_bucket_size: Elements = 50_000_000
    stage3_param_persistence_threshold: Elements = 100_000
    stage3_model_persistence_threshold: Annotated[int, Field(gt=0, lt=2**63)] = 2**63 - 1
    stage3_max_live_parameters: Elements = 10**9
    stage3_max_reuse_distance: Elements = 10**9
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    parameter_alignment: bool = False
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class FlopsProfiler(BaseModel, extra="forbid", frozen=True):
    """DeepSpeed's count of operations, printed once."""

    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0, le=10)] = 0.0
    profile_step: Annotated[int, Field(gt=0, lt=2**31)] = 1
    module_depth: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    top_modules: Annotated[int, Field(gt=0, lt=2**31)] = 1
    detailed: bool = True
    output_file: FilePath | None = None


class CommsLogger(BaseModel, extra="forbid", frozen=True):
    """DeepSpeed's record of its collectives."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    debug: bool = False


class Aio(BaseModel, extra="forbid", frozen=True):
    """Reading and writing for offload to NVMe."""

    block_size: Annotated[int, Field(gt=0, lt=2**40)] = 2**20
    queue_depth: Annotated[int, Field(gt=0, lt=2**20)] = 8
    intra_op_parallelism: Annotated[int, Field(gt=0, lt=2**10)] = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DeepSpeedSettings(BaseModel, extra="forbid", frozen=True):
    """The block as a whole. What Overtone sets itself is not here: pretrain.config.OWNED_BY_US."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    zero_force_ds_cpu_optimizer: bool = True
    aio: Aio = Aio()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    steps_per_print: Annotated[int, Field(gt=0, lt=2**63)] = 2**31


def check_block(block: Mapping[str, Any], stage: int) -> None:
    """Raises ConfigError unless DeepSpeed takes the block at this ZeRO stage."""
    zero = validate(DeepSpeedSettings, block, "deepspeed").zero_optimization
    where, off = "deepspeed.zero_optimization", zero.offload_optimizer or OffloadOptimizer()
    if zero.offload_param is not None and zero.offload_param.device != "none" and stage != 3:
        raise ConfigError(f"{where}.offload_param: only at stage 3, but parallel.zero={stage}; set parallel.zero=3")
    if (off.ratio < 1 or off.super_offload) and stage != 3:
        raise ConfigError(
            f"{where}.offload_optimizer: ratio below 1 and super_offload are for stage 3, but parallel.zero={stage}"
        )
    for name, given in (("offload_param", zero.offload_param), ("offload_optimizer", zero.offload_optimizer)):
        if given is not None and given.device == "nvme" and given.nvme_path is None:
            raise ConfigError(f"{where}.{name}: device=nvme needs nvme_path, a folder on that disk")
