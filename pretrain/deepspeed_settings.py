"""What may stand in the `deepspeed:` block: settings of DeepSpeed that Overtone leaves to the user, with their types.

DeepSpeed takes a key that it does not know without a word, or dies of it when the ranks have started; and to ask it
takes its import, which is seconds. Here is what trains Overtone's models on every device; a test compares it with
DeepSpeed's own models.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from common.fields import FilePath

Elements = Annotated[int, Field(gt=0, le=2**40)]


class Offload(BaseModel, extra="forbid", frozen=True):
    """What rests in the host's memory; pretrain.config.RunConfig knows at which stages."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


class ZeroOptimization(BaseModel, extra="forbid", frozen=True):
    """The trunk's ZeRO. Its `stage` is parallel.zero."""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Elements = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Annotated[Elements, Field(multiple_of=2)] = 500_000_000
    overlap_comm: bool | None = None
    offload_param: Offload | None = None
    offload_optimizer: Offload | None = None
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


class DeepSpeedSettings(BaseModel, extra="forbid", frozen=True):
    """The block as a whole. What Overtone sets itself is not here: pretrain.config.OWNED_BY_US."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    steps_per_print: Annotated[int, Field(gt=0, lt=2**63)] = 2**31
