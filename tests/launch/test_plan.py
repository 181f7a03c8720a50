"""`python -m launch plan`: counted against what the code allocates and sends, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scaling
from benchmarks.footprint import compare, config
from common.errors import ConfigError
from common.gpus import GPUS
from launch import footprint, host
from launch.__main__ import main
from launch.cluster import Cluster
from launch.estimate import plan, step_time
from launch.fit import altered, cheapest_changes
from launch.footprint import (
    ZERO_DEFAULTS,
    head_chunks,
    memory,
    optimizer_groups,
    parameters,
    replicated_head,
    stage3_gathers,
)
from launch.traffic import Collective, collectives
from tests.support.decoders import decoder_settings
from tests.support.tiny import tiny_config

RECIPE = "configs/gpt2-1.5b.yaml"
HEADS: list[dict[str, Any]] = [
    {"distance": name} for name in ("euclidean", "manhattan", "chebyshev", "cosine", "canberra", "braycurtis", "dot")
] + [
    {"distance": "hamming", "params": {"kind": kind}} for kind in ("soft", "hard", "gumbel")
] + [
    {"distance": "minkowski", "params": {"p": 2.0}},
    {"distance": "minkowski", "params": {"p": 3.0}},
    {"distance": "mahalanobis"},
    {"distance": "mahalanobis", "params": {"factor": "full"}, "exponent": "learned"},
]  # fmt: skip


@pytest.mark.slow
def test_what_two_ranks_allocate_and_send_is_as_planned(tmp_path: Path) -> None:
    configs = [config(2, zero, vocab) for zero, vocab in ((1, 1), (2, 2), (3, 2))]
    family: dict[str, Any] = {"mlp": "swiglu", "mlp_dim": 344, "kv_heads": 2, "qk_norm": True, "qkv_bias": True}
    configs += [config(2, zero, 2, micro=4, positions={"theta": 1e4}, **family) for zero in (2, 3)]
    compared = compare(2, configs, tmp_path)
    assert {"peak", "trunk gradients", "activations", "all-gather of 2"} <= {one.kind for one in compared}
    assert not [one for one in compared if not one.agrees]


@settings(max_examples=60, deadline=None)
@given(
    model=decoder_settings(vocab_size=67),
    head=st.sampled_from([*HEADS, {"distance": "dot", "exponent": "learned"}]),
    also_decay=st.sets(st.sampled_from(["norms", "biases", "embeddings"])),
)
def test_parameters_are_those_of_decoder_and_head(
    model: dict[str, Any], head: dict[str, Any], also_decay: set[str]
) -> None:
    from model.decoder import Decoder
    from model.head import HarmonicHead
    from pretrain.optim import parameter_groups

    cfg = tiny_config(model=model, head=head, optim__also_decay=sorted(also_decay))
    with torch.device("meta"):
        decoder = Decoder(cfg.model)
        own = HarmonicHead(cfg.model.vocab_size, cfg.model.dim, seed=0, **cfg.head.arguments())
    planned = parameters(cfg)
    assert planned.trunk == sum(p.numel() for p in decoder.parameters())
    assert planned.head == sum(p.numel() for p in own.parameters())
    assert planned.total == planned.trunk + planned.head
    assert replicated_head(cfg) == planned.head - own.prototypes.numel()
    assert planned.token_embedding == (0 if decoder.tokens is None else decoder.tokens.weight.numel())
    assert planned.positions == (0 if decoder.positions is None else decoder.positions.weight.numel())
    made = [[p.numel() for p in group["params"]] for group in parameter_groups([decoder], cfg.optim)]  # type: ignore
    assert optimizer_groups(cfg) == made


@settings(max_examples=60, deadline=None)
@given(model=decoder_settings(vocab_size=67), threshold=st.sampled_from([1, 100, 1000]))
def test_stage_3_gathers_the_built_modules_and_keeps_their_small_parameters(
    model: dict[str, Any], threshold: int
) -> None:
    from model.decoder import Decoder

    zero = {"stage3_param_persistence_threshold": threshold, "stage3_prefetch_bucket_size": 1,
            "stage3_max_reuse_distance": 1}  # fmt: skip
    cfg = tiny_config(model=model, deepspeed={"zero_optimization": zero})
    with torch.device("meta"):
        named = {name: p.numel() for name, p in Decoder(cfg.model).named_parameters()}
    small = {name for name, size in named.items() if size <= threshold}
    if not cfg.model.document_mask:
        small |= {"positions.weight"} & set(named)
    gathered, most, staying = stage3_gathers(cfg)
    assert staying == sum(named[name] for name in small)
    blocks = sum(size for name, size in named.items() if name.startswith("blocks.") and name not in small)
    others = sum(named.values()) - staying - blocks
    assert blocks + others <= gathered <= (3 if cfg.model.activation_checkpointing else 2) * (blocks + others)
    assert staying <= most <= sum(named.values())


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_chunks_are_those_of_the_head(head: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from model import chunks
    from model.contractions import Use
    from model.head import HarmonicHead
    from model.kernels import choose

    kernels = SimpleNamespace(TEMPORARIES=0, tokens_per_wave=lambda width, processors: 1)  # as model/kernels/gpu.py
    monkeypatch.setattr(choose, "kernels_for", lambda x: kernels)
    cfg = tiny_config(head=head, train__micro_batch=2, train__precision="bf16")
    contraction = HarmonicHead(1, 32, seed=0, **cfg.head.arguments()).score_function.contraction
    assert cfg.head.settings.by_product == (not contraction.wide)
    assert chunks.CHUNK_BYTES["cuda"] == footprint.CHUNK_BYTES and chunks.CHUNK_SHARE == footprint.CHUNK_SHARE
    shard = SimpleNamespace(size=cfg.model.vocab_size, ranks=ranks, group=None if ranks == 1 else "one")
    for budget in (1, 2, 4):
        small = altered(cfg, head={"chunk_mib": budget}, model={"seq_len": 8192})
        for fused in (False, True):
            use = Use(kernels if fused else None)
            call = chunks.Call(SimpleNamespace(contraction=contraction), shard, "mean", -100, budget * 2**20, 1, use)
            hidden = torch.empty(2 * 8192, 32, dtype=torch.bfloat16, device="meta")
            planned, size = head_chunks(altered(small, head={"fused": fused}), ranks, 80 * 2**30)
            made = len(list(call.chunks(hidden)))
            assert planned == made if cfg.head.settings.by_product else planned >= made
            assert size <= budget * 2**20


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_deepspeed_is_as_the_plan_takes_it(precision: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pretrain import engine

    for zero in range(4):
        cfg = tiny_config(parallel__zero=zero, train__precision=precision)
        assert cfg.zero_stage() == engine.deepspeed_config(cfg, 1)["zero_optimization"]["stage"]
    fields = DeepSpeedZeroConfig.model_fields
    theirs = {field.alias or name: field.default for name, field in fields.items()}
    assert {name: theirs[name] for name in ZERO_DEFAULTS} == ZERO_DEFAULTS


def test_a_ring_sends_what_a_ring_sends() -> None:
    sums = Collective("x", "all-reduce", 16, 8, 1600, 1, "nothing")
    assert (sums.wire, sums.between_nodes) == (2 * 1500, 2 * 1500 / 8)
    assert Collective("x", "all-gather", 8, 8, 800, 1, "nothing").between_nodes == 0
    gpu = GPUS["h100-80gb"]
    assert sums.seconds(gpu) < Collective("x", "all-reduce", 16, 1, 1600, 1, "nothing").seconds(gpu)


def test_one_gpu_sends_nothing() -> None:
    assert collectives(tiny_config(), Cluster(gpus=1)) == []


@settings(max_examples=40, deadline=None)
@given(
    zero=st.integers(0, 3),
    gpus=st.sampled_from([1, 2, 4, 8]),
    vocab=st.sampled_from([1, "node", "world"]),
    again=st.booleans(),
    tied=st.booleans(),
    precision=st.sampled_from(["bf16", "float32"]),
)
def test_more_of_what_saves_memory_never_costs_memory(
    zero: int, gpus: int, vocab: Any, again: bool, tied: bool, precision: str
) -> None:
    cfg = tiny_config(
        parallel__zero=zero, parallel__vocab=vocab, model__activation_checkpointing=again, model__tied=tied,
        train__precision=precision, train__micro_batch=1, train__tokens_per_step=64 * 8 * 8,
    )  # fmt: skip
    found = memory(cfg, Cluster(gpus=gpus))
    assert found.peak >= sum(found.standing.values()) > 0
    assert memory(altered(cfg, train={"micro_batch": 2}), Cluster(gpus=gpus)).peak >= found.peak
    higher = memory(altered(cfg, parallel={"zero": min(3, zero + 1)}), Cluster(gpus=gpus))
    assert higher.standing["trunk weights"] <= found.standing["trunk weights"]
    whole = memory(altered(cfg, parallel={"vocab": 1}), Cluster(gpus=gpus))
    assert found.standing["head masters"] <= whole.standing["head masters"]
    made = plan(cfg, Cluster(gpus=gpus))
    assert made.tokens_per_s > 0 and made.gpu_j > 0
    assert json.loads(json.dumps(made.as_dict()))["memory"]["peak"] == found.peak


@pytest.mark.parametrize(
    "changes",
    [["train.micro_batch=32"], ["parallel.zero=1", "train.micro_batch=64"], ["model.dim=12800", "model.heads=100"]],
    ids=str,
)
@pytest.mark.parametrize("gpu", ["h100-80gb", "v100-32gb"])
def test_the_cheapest_changes_make_it_fit(changes: list[str], gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", RECIPE, *changes, "model.activation_checkpointing=false", "--json", "--gpu", gpu, "--gpus", "16"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    if found["changes"] is None:
        assert "model.dim=12800" in changes
        return
    assert found["changes"], "a run that does not fit is told what to change"
    assert main([*words, *shlex.split(" ".join(found["changes"]))]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    cfg = scaling.SHAPES["GPT-2 1.5B, untied: 48 layers, D 1600, V 51,200, T 1,024"]
    cluster = Cluster(gpus=8)
    largest = plan(cfg, cluster).largest_micro_batch
    assert largest is not None and memory(altered(cfg, train={"micro_batch": largest}), cluster).peak <= (
        cluster.usable_bytes
    )
    assert memory(altered(cfg, train={"micro_batch": 2 * largest}), cluster).peak > cluster.usable_bytes


def test_tables_say_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", RECIPE, "--gpus", "64", "--gpu", "a100-40gb", "--link", "12.5", "--budget-tokens", "3e11"]) == 0
    )
    told = capsys.readouterr().out
    for words in ("Planned, not measured", "assumed:", "12.5 GB/s between nodes", "300,000,000,000 tokens", "fits"):
        assert words in told


@pytest.mark.parametrize(
    "config, words, expected",
    [
        ("quickstart", ["--gpus", "2"], ["5,310,720 parameters", "takes 397 us", "tokens take 119 ms and 167 J"]),
        ("gpt2-124m", ["--gpus", "8"], ["125,061,888 parameters", "tied: the prototypes embed", "minutes and", " kWh"]),
        ("gpt2-124m-untied", ["--gpus", "1"], ["164,383,488 parameters", "hours and", " kWh"]),
        ("gpt2-124m-untied", ["train.steps=100"], ["49,152,000 tokens take", " s and", " Wh"]),
        ("llama3-8b", ["--gpus", "64", "--budget-tokens", "1.5e13"], ["embedding 536,870,912)", "days and", " MWh"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_times_and_energies_are_told_in_units_that_fit(
    config: str, words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"configs/{config}.yaml", *words]) == 0
    told = capsys.readouterr().out
    assert [words for words in expected if words not in told] == []
    found = [
        float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) (?:us|ms|s|minutes|hours|days)\b", told)
    ]
    assert found and all(number == 0 or 1 <= number < 10_000 for number in found), "no 0.02 days, no 201,909 ms"
    assert all(number >= 1 for number in map(float, re.findall(r"([\d.]+) (?:J|Wh|kWh|MWh|GWh)\b", told)))


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--gpu", "h1000"], "--gpu h1000: expected one of h100-80gb, h200-141gb, b200-180gb, mi300x-192gb"),
        (["--gpus", "24"], "1024 sequences, which 24 GPUs cannot share. Possible: 1, 2, 4, 8, 16, 32, 64, 128"),
        (["--gpus", "12"], "whole nodes of 8, such as 8 or 16"),
        (["--gpus", "8", "parallel.vocab=3"], "a vocabulary group of 3 ranks does not divide the world of 8"),
        (["--gpus", "0"], "expected 1 or more"),
        (["--gpus", "1024"], "micro_batch can be 1"),
        (["--gpus", "2048"], "1024; or another batch, such as train.tokens_per_step=2097152 train.micro_batch=1"),
        (["--mfu", "40"], "--mfu 40.0: expected a fraction of the peak"),
        (["--link", "nan"], "--link: expected a number above 0"),
        (["--budget-tokens", "inf"], "--budget-tokens inf: expected 1 or more"),
        (["deepspeed.zero_optimization={reduce_bucket_size: 0}"], "reduce_bucket_size: given 0"),
        (["model.dmi=3"], "did you mean model.dim?"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_a_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, *words]) == 2
    told = capsys.readouterr()
    assert expected in told.err and told.out == ""


def test_what_a_plan_does_not_count_is_told() -> None:
    cfg = tiny_config(
        head__distance="manhattan", train__precision="bf16", deepspeed={"zero_optimization": {"sub_group_size": 10}}
    )
    told = " ".join(plan(cfg, Cluster(gpu="v100-32gb", gpus=1)).notes)
    for words in ("runs as stage 1", "lower bound", "no bf16 units", "deepspeed.zero_optimization.sub_group_size"):
        assert words in told


def test_overlapped_reduction_hides_at_stage_2() -> None:
    cfg = scaling.SHAPES["GPT-2 1.5B, untied: 48 layers, D 1600, V 51,200, T 1,024"]
    cluster = Cluster(gpus=64)

    def exposed(**zero: Any) -> float:
        return step_time(
            cfg.model_copy(update={"deepspeed": {"zero_optimization": zero}, "parallel": stage_2}), cluster
        ).exposed_s

    stage_2 = altered(cfg, parallel={"zero": 2}).parallel
    assert exposed(overlap_comm=True) < exposed()


def test_an_unknown_cluster_is_an_error_of_the_api_too() -> None:
    with pytest.raises(ConfigError, match="h100-80gb"):
        Cluster(gpu="tpu")


def test_planning_needs_no_torch() -> None:
    script = "import sys, launch.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.slow
def test_the_page_on_scaling_is_what_its_command_prints() -> None:
    made = "\n".join(scaling.document()) + "\n"
    assert Path("docs/scaling.md").read_text() == made, "python -m benchmarks.scaling > docs/scaling.md"


def test_a_faster_layout_is_told_with_its_gain(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "configs/gpt2-1.5b-untied.yaml", "--gpus", "1024", "train.micro_batch=1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "parallel.zero=1" in found["faster"] and found["faster_s"] < found["time"]["total_s"] / 3
    assert main([*words, *found["faster"], "--json"]) == 0
    fastest = json.loads(capsys.readouterr().out)
    assert fastest["fits"] and fastest["faster"] == [] and fastest["time"]["total_s"] == found["faster_s"]


def test_offload_is_proposed_where_nothing_else_fits_and_is_counted() -> None:
    cfg = tiny_config(parallel__zero=3, train__precision="bf16", model__dim=1024, model__heads=16, model__layers=24)
    whole = Cluster(gpu="v100-32gb", gpus=1)
    own = memory(cfg, whole)
    sections = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    moved = cfg.model_copy(update={"deepspeed": {"zero_optimization": sections}})
    trunk = parameters(cfg).trunk
    assert own.standing["trunk masters"] + own.standing["trunk moments"] == 12 * trunk
    assert memory(moved, whole).peak < own.peak - 12 * trunk
    on_host = host.memory(moved, whole)
    assert on_host["offloaded masters and moments"] == 12 * trunk and on_host["offloaded weights"] == 2 * trunk
    assert on_host["copies that a save writes from"] == host.checkpoint_bytes(cfg)
    assert step_time(moved, whole).total_s > step_time(cfg, whole).total_s
    deep = altered(cfg, model={"layers": 31, "dim": 8192}, train={"micro_batch": 1})  # 25 G parameters, 8 sequences
    changes = cheapest_changes(deep, Cluster(gpu="a100-40gb", gpus=8))
    assert changes and changes[-1].startswith("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    assert cheapest_changes(deep, Cluster(gpu="a100-40gb", gpus=8, host_bytes=2**30)) is None


def test_a_site_s_energy_emissions_and_cost_and_its_disks_are_told() -> None:
    cfg = tiny_config(energy__pue=1.5, energy__grid=100.0, energy__price_per_kwh=0.5, checkpoint__keep=3)
    found = plan(cfg, Cluster(gpus=1))
    assert found.site_kwh == pytest.approx(1.5 * found.gpu_j / 3.6e6)
    assert found.gco2e == pytest.approx(100 * found.site_kwh) and found.cost == pytest.approx(0.5 * found.site_kwh)
    assert found.checkpoint_bytes == 12 * found.parameters.total and found.disk_bytes == 4 * found.checkpoint_bytes
    assert plan(tiny_config(), Cluster(gpus=1)).gco2e is None


def test_links_inside_nodes_are_the_gpu_s_or_given() -> None:
    cfg = tiny_config(train__precision="bf16")
    for gpu in ("b200-180gb", "mi300x-192gb", "h100-80gb"):
        slow = Cluster(gpu=gpu, gpus=2, node_bytes_s=1e6)
        assert step_time(cfg, slow).exposed_s > step_time(cfg, Cluster(gpu=gpu, gpus=2)).exposed_s
    with pytest.raises(ConfigError, match="--node-link: expected a number above 0"):
        Cluster(node_bytes_s=0)


@pytest.mark.slow
def test_a_recipe_s_real_steps_over_a_fake_process_group_are_as_planned() -> None:
    """SwiGLU, RMSNorm, grouped queries, RoPE, documents, recomputed, at ZeRO 3; a smoothed loss, which adds up
    more between ranks; `python -m benchmarks.recipes`: all.
    """
    words = [sys.executable, "-m", "benchmarks.recipes", "llama3-8b", "published-2603-gpt2-124m"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and re.search(r"^(\d+) of \1 within 10%", done.stdout, re.M), done.stdout + done.stderr
