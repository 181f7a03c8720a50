"""The `deepspeed:` block: what DeepSpeed would not say, or would say when the ranks have started."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from common.errors import ConfigError
from common.settings import members_of
from pretrain.config import OWNED_BY_US
from pretrain.deepspeed_settings import DeepSpeedSettings, Offload, ZeroOptimization
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, tiny_config


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"zero_optimisation": {}}, "deepspeed.zero_optimisation: unknown key; did you mean deepspeed.zero_opt"),
        (
            {"zero_optimization": {"overlapcomm": True}},
            "deepspeed.zero_optimization.overlapcomm: unknown key; did you mean deepspeed.zero_optimization.overlap",
        ),
        ({"zero_optimization": {"overlap_comm": "yes"}}, 'overlap_comm: given "yes"; expected a valid boolean'),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "allgather_bucket_size: given 3; expected a mult"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "offload_optimizer.device: given \"gpu\""),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "did you mean deepspeed.zero_optimization"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param.device=cpu needs parallel.ze"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device=nvme: check"),
        ({"gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op: unknown key; the keys of deepspeed are"),
    ],
)  # fmt: skip
def test_keys_and_types_are_checked_without_deepspeed(block: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(deepspeed=block)
    assert told in str(error.value)


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.default for name, field in model.model_fields.items()}


@pytest.mark.slow
def test_deepspeed_has_the_same_keys_types_and_defaults() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name: field for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for name, field in ZeroOptimization.model_fields.items():
        assert field.default == theirs[name].default, name
        kinds = {kind for kind in members_of(field.annotation) if kind in (int, bool)}
        assert kinds <= set(members_of(theirs[name].annotation)), name
    for key in ("offload_param", "offload_optimizer"):
        (other,) = (kind for kind in get_args(theirs[key].annotation) if kind is not type(None))
        assert defaults(Offload).items() <= defaults(other).items()
    block = DeepSpeedSettings().model_dump(
        mode="json", exclude={"zero_optimization": {"stage3_model_persistence_threshold"}}
    )
    made = DeepSpeedConfig({**block, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    assert made.comms_config.comms_logger_enabled and made.flops_profiler_config.module_depth == -1
    assert not {key.partition(".")[0] for key in OWNED_BY_US} & set(DeepSpeedSettings.model_fields) - {
        "zero_optimization"
    }


def check_extremes(base: Path) -> None:
    """Trains with every number at an end of its range, and every boolean of ZeRO turned."""
    from pretrain.opening import open_run
    from pretrain.runtime import ranks as process

    most, least = 30 * 86400.0, 1.0
    zero = {
        name: not field.default for name, field in ZeroOptimization.model_fields.items() if field.annotation is bool
    }
    sizes = {"reduce_bucket_size": 2**40, "allgather_bucket_size": 2**40, "sub_group_size": 2**40}
    waits = dict.fromkeys(("rendezvous_s", "first_step_s", "collective_s", "save_s", "heartbeat_s"), most)
    optim = {"lr": 1e-30, "eps": 1.0, "weight_decay": 0.0, "clip": 1e-30, "warmup_steps": 10**9, "max_skipped": 10**9}
    high = {
        "train__seed": 2**63 - 1,
        "head__exponent": 1e5,
        "timeouts": waits,
        "optim": optim,
        "checkpoint__grace_s": most,
    }
    low = {"train__seed": 0, "head__exponent": 1e-300, "model__norm_eps": 1e-30, "head__init_std": 1e-15}
    low |= {"timeouts__save_s": least, "optim__eps": 1e-30, "optim__clip": 1e30, "head__chunk_mib": 1}
    high |= {"deepspeed": {"zero_optimization": zero | sizes}, "parallel__zero": 2}
    minkowski = {"head": {"distance": "minkowski", "params": {"p": 1e4}, "exponent": {"first": 1e5, "last": 1}}}
    for number, changes in enumerate((high, low, minkowski)):
        paths = {"run": str(base / str(number)), "data__path": str(base / "data")}
        run = open_run(tiny_config(train__steps=2, logging__every=1, **paths, **changes), process.start())
        assert run.train().code == 0, changes
        run.close()


@pytest.mark.slow
def test_what_the_ranges_allow_can_be_trained(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_extremes, 1, tmp_path, base=tmp_path)
