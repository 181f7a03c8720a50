"""Checkpoints: resume is exact on the same layout, equal to rounding on another; damage and mismatch stop the run,
loudly.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.errors import ConfigError
from pretrain.checkpoints import contents, loading, resume
from pretrain.checkpoints import folder as checkpoint
from pretrain.config import RunConfig
from tests.support.checks import flip
from tests.support.ranks import run_ranks
from tests.support.tiny import (
    T,
    make_data,
    opened,
    run_to_end,
    tiny_config,
)

STEPS, CUT = 6, 3


def config(base: Path, run: str, **changes: Any) -> RunConfig:
    usual = {"checkpoint__every": CUT, "checkpoint__keep": 5, "train__micro_batch": 2, "model__dropout": 0.1}
    paths = {"run": str(base / run), "data__path": str(base / "data")}
    return tiny_config(train__steps=STEPS, logging__every=1, **{**paths, **usual, **changes})


def cut_back(base: Path, run: str, to: str) -> None:
    """A copy of a finished run as it was when it was killed some time after the checkpoint at step CUT."""
    shutil.copytree(base / run, base / to)
    shutil.rmtree(base / to / "checkpoints" / f"step-{STEPS:08d}")


def check_exact(base: Path, variants: list[dict[str, Any]]) -> None:
    from torch.distributed import barrier, get_rank

    for number, changes in enumerate(variants):
        whole, again = f"whole-{number}", f"again-{number}"
        expected = run_to_end(config(base, whole, **changes))
        if get_rank() == 0:
            cut_back(base, whole, again)
        barrier()
        found = run_to_end(config(base, again, **changes))
        assert len(expected) == STEPS and found == expected, (changes, found, expected)
        barrier()


def tensors(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every file's tensors, bit by bit; the order of a safetensors header's metadata is not fixed."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: {name: values.tobytes() for name, values in load_file(file).items()} for file in files}


VARIANTS: list[dict[str, Any]] = [
    *({"parallel__zero": zero, "train__precision": p} for zero in (0, 1, 2, 3) for p in ("float32", "bf16")),
    {"parallel__zero": 1, "model__tied": True, "head__exponent": "learned"},
    {"parallel__zero": 2, "head__distance": "cosine", "model__activation_checkpointing": True},
    {"parallel__zero": 3, "head__distance": "dot", "train__precision": "bf16"},
    {"parallel__zero": 2, "head__distance": "mahalanobis", "head__params": {"factor": "full"},
     "train__precision": "bf16", "head__exponent": {"first": 2.0, "last": 6.0}},
    {"parallel__zero": 1, "head__distance": "hamming", "head__params": {"kind": "gumbel", "temperature": 0.5}},
    *({"head__distance": name} for name in ("manhattan", "chebyshev", "minkowski", "canberra", "braycurtis")),
]  # fmt: skip


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(world: int, tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    variants = VARIANTS if world == 2 else VARIANTS[::3]
    run_ranks(check_exact, world, tmp_path, base=tmp_path, variants=variants)
    for number in range(len(variants)):
        whole, again = (
            tensors(tmp_path / f"{name}-{number}/checkpoints/step-{STEPS:08d}") for name in ("whole", "again")
        )
        assert whole and whole == again, variants[number]


def check_run(base: Path, run: str, changes: dict[str, Any]) -> list[float]:
    return run_to_end(config(base, run, **changes))


HOPS: list[tuple[int, dict[str, Any]]] = [
    (1, {"parallel__zero": 0, "parallel__vocab": 1, "train__micro_batch": 12}),
    (2, {"parallel__zero": 3, "parallel__vocab": 2, "train__micro_batch": 3}),
    (1, {"parallel__zero": 1, "parallel__vocab": 1, "train__micro_batch": 2}),
    (4, {"parallel__zero": 2, "parallel__vocab": 4, "train__micro_batch": 1}),
    (2, {"parallel__zero": 0, "parallel__vocab": 1, "train__micro_batch": 6}),
    (3, {"parallel__zero": 3, "parallel__vocab": 3, "train__micro_batch": 4}),
]
STEPS_A_HOP = 2
ELASTIC: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"train__precision": "bf16"},
    "factor": {"head__distance": "mahalanobis", "model__tied": True, "head__exponent": "learned"},
}


def check_hop(base: Path, changes: dict[str, Any], run: str, first: int, count: int) -> dict[str, list[Any]]:
    """Steps first .. first+count-1 of every elastic run, resumed if they are not the first; losses and batches."""
    found = {}
    for name, kind in ELASTIC.items():
        steps = STEPS_A_HOP * len(HOPS)
        plain = {"train__steps": steps, "train__tokens_per_step": 12 * T, "model__dropout": 0.0}  # its draws go by rank
        paths = {"run": str(base / f"{run}-{name}"), "data__path": str(base / "data")}
        cfg = tiny_config(**{**plain, **paths, **kind, **changes})
        with opened(cfg) as trained:
            assert trained.progress.step == first
            told = []
            for step in range(first, first + count):
                taken = trained.step(step)
                trained._advance(taken)
                loss = trained.ranks.sum(taken.loss.double()).item() / trained.ranks.world
                told.append((loss, trained.batches.fingerprint()))
            trained.save()
            trained.finish_save()
            found[name] = told
    return found


@pytest.mark.slow
def test_a_run_that_changes_its_layout_again_and_again_follows_the_same_curve(tmp_path: Path) -> None:
    """Ranks 1, 2, 1, 4, 2, 3 with other stages, groups and micro-batches: the same batches; the same losses to
    float32 rounding, or to 0.02 nats in bf16.
    """
    make_data(tmp_path / "data")
    world, changes = HOPS[0]
    whole = {"changes": changes, "run": "whole", "first": 0, "count": STEPS_A_HOP * len(HOPS)}
    expected = run_ranks(check_hop, world, tmp_path, base=tmp_path, **whole)[0]
    for number, (world, changes) in enumerate(HOPS):
        hop = {"changes": changes, "run": "hops", "first": number * STEPS_A_HOP, "count": STEPS_A_HOP}
        found = run_ranks(check_hop, world, tmp_path, base=tmp_path, **hop)[0]
        for name, told in found.items():
            curve = expected[name][hop["first"] :][:STEPS_A_HOP]
            assert [batch for _, batch in told] == [batch for _, batch in curve], (name, world)
            bound = 2e-2 if name == "bf16" else 2e-5
            losses, same = ([loss for loss, _ in steps] for steps in (told, curve))
            assert np.allclose(losses, same, atol=bound, rtol=0), (name, world, losses, same)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("finished")
    make_data(base / "data")
    run_ranks(check_run, 1, base, base=base, run="run", changes={})
    return base


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found_and_the_last_whole_checkpoint_is_used(
    finished: Path, tmp_path: Path, harm: str, caplog
) -> None:
    folder = shutil.copytree(finished / "run" / "checkpoints", tmp_path / "checkpoints")
    newest, before = checkpoint.checkpoints(folder)[::-1]
    victim = next(newest.glob("*.safetensors"))
    if harm == "flip":
        flip(victim)
    elif harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with caplog.at_level("WARNING"):
        assert resume.find(folder, "auto") == before
    assert newest.name in caplog.text
    if harm != "manifest":
        assert victim.name in caplog.text
    flip(next(before.glob("*.safetensors")))
    with pytest.raises(ConfigError, match="none of the 2 checkpoints can be used"):
        resume.find(folder, "auto")
    assert len(checkpoint.checkpoints(folder)) == 2, "nothing was deleted"


def test_what_resume_names_is_found_or_refused(finished: Path) -> None:
    folder = finished / "run" / "checkpoints"
    newest = folder / f"step-{STEPS:08d}"
    assert resume.find(folder, "auto") == resume.find(folder, str(newest)) == newest
    assert resume.find(finished / "new" / "checkpoints", str(finished / "run")) == newest
    assert resume.find(finished / "new" / "checkpoints", "auto") is None
    for trace in (checkpoint.LATEST, f"{checkpoint.ABANDONED}step-00000008"):
        gone = finished / f"gone-{trace}"
        gone.mkdir()
        (gone / trace).touch()
        with pytest.raises(ConfigError, match=f"there is no checkpoint, but there were some, as .*{trace} tells"):
            resume.find(gone, "auto")
        assert resume.find(gone, "never") is None
    with pytest.raises(ConfigError, match="resume=never, but .* holds 2 checkpoints"):
        resume.find(folder, "never")
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run folder"):
        resume.find(folder, str(finished / "nowhere"))


def test_another_configuration_is_refused_and_a_layout_is_not(finished: Path) -> None:
    path = finished / "run" / "checkpoints" / f"step-{STEPS:08d}"
    saved = contents.read_state(path)["identity"]
    fingerprint, tokenizer = saved["the data's fingerprint"], saved["the tokenizer's hash"]

    def who(**changes: Any) -> dict[str, Any]:
        return resume.identity(config(finished, "run", **changes), fingerprint, tokenizer)

    def check(identity: dict[str, Any], *allow: str) -> list[resume.Difference]:
        found = resume.audit(contents.read_state(path), {"identity": identity}, allow)
        resume.check_audit(path, found)
        return found

    def now(**changes: Any) -> dict[str, Any]:
        return {"identity": who(**changes), "config": config(finished, "run", **changes).model_dump(mode="json")}

    def without_newer_settings(state: dict[str, Any]) -> dict[str, Any]:
        for key in ("positions", "norm", "mlp", "kv_heads", "objective", "document_mask"):
            del state["identity"][f"model.{key}"], state["config"]["model"][key]
        return {part: state[part] for part in ("identity", "config")}

    check(who())
    check(who(parallel__zero=3, train__micro_batch=1, checkpoint__keep=9))
    for changes, told in (
        ({"optim__lr": 0.5}, "optim.lr was 0.01 and is 0.5"),
        ({"head__distance": "cosine"}, "head.distance was 'euclidean' and is 'cosine'"),
        ({"model__layers": 3}, "model.layers was 2 and is 3"),
    ):
        with pytest.raises(ConfigError, match=told):
            check(who(**changes))
    with pytest.raises(ConfigError, match="the data's fingerprint was"):
        check(resume.identity(config(finished, "run"), "other", tokenizer))
    younger = resume.audit(without_newer_settings(contents.read_state(path)), now(), [])
    assert younger == [], "settings that came after the checkpoint are at their defaults"
    state = contents.read_state(path)
    del state["config"]["train"]["deterministic"], state["config"]["parallel"]["backend"]
    assert resume.audit({part: state[part] for part in ("identity", "config")}, now(), []) == []
    changed = resume.audit(contents.read_state(path), now(train__deterministic=True, parallel__backend="gloo"), [])
    verdicts = {one.key: one.verdict for one in changed}
    assert verdicts["train.deterministic"] == verdicts["parallel.backend"] == "harmless"
    assert "refused" not in verdicts.values()
    with pytest.raises(ConfigError, match="model.norm was 'layernorm' and is 'rmsnorm'"):
        state = without_newer_settings(contents.read_state(path))
        resume.check_audit(path, resume.audit(state, now(model__norm="rmsnorm"), []))
    allowed = check(who(optim__lr=0.5, optim__clip=None), "optim")
    assert {(one.key, one.verdict) for one in allowed} >= {("optim.lr", "allowed"), ("optim.clip", "allowed")}
    for setting in ("head", "head.feature_length"):  # a factor of every pass, which the weights were trained with
        with pytest.raises(ConfigError, match=r"what changed \(head.feature_length=None: .*\), or start") as refusal:
            check(who(head__feature_length=3.0), setting)
        assert "resume_allow" not in str(refusal.value)


def test_where_packages_lie_is_not_what_a_run_is() -> None:
    debian = {"kind": "debian", "packages": [{"name": "bash-doc"}]}
    sources = {"a": {"weight": 1, "source": debian}, "b": {"weight": 1, "source": {"kind": "embedded"}}}
    for source, where in (
        (debian, ("folder",)),
        ({"kind": "mixture", "sources": sources}, ("sources", "a", "source", "folder")),
    ):
        found = []
        for place in ("here", "there"):
            tree = copy.deepcopy(source)
            node = tree
            for key in where[:-1]:
                node = node[key]  # type: ignore[assignment]
            node[where[-1]] = place
            found.append(resume.identity(tiny_config(data__source=tree), "x", None))
        assert found[0] == found[1]
        assert any(key.endswith("name") or "packages" in key for key in found[0]), "what they are counts"


def test_a_checkpoint_holds_no_pickle_and_only_fragments(finished: Path) -> None:
    path = finished / "run" / "checkpoints" / f"step-{STEPS:08d}"
    names = {file.name for file in path.iterdir()}
    assert {"manifest.json", "state.json"} < names
    assert all(name.endswith((".json", ".safetensors")) for name in names)
    assert json.loads((path / "state.json").read_text())["updates"] == STEPS


def test_drafts_are_removed_and_never_taken_for_checkpoints(finished: Path) -> None:
    folder = finished / "run" / "checkpoints"
    shutil.copytree(folder / f"step-{STEPS:08d}", folder / f"draft-step-{STEPS + 1:08d}")
    assert [path.name for path in checkpoint.checkpoints(folder)] == [f"step-{CUT:08d}", f"step-{STEPS:08d}"]
    checkpoint.remove_drafts(folder)
    assert not list(folder.glob("draft-*"))


def test_retention_keeps_the_newest(finished: Path) -> None:
    changes = {"run": str(finished / "short"), "checkpoint__every": 1, "checkpoint__keep": 2}
    tree = {"data__path": str(finished / "data"), "train__steps": 5, **changes}
    run_ranks(run_to_end, 1, finished, cfg=tiny_config(**tree))
    kept = [path.name for path in checkpoint.checkpoints(finished / "short" / "checkpoints")]
    assert kept == ["step-00000004", "step-00000005"]


def test_weights_load_without_deepspeed_whole_and_sharded(finished: Path) -> None:
    from model.decoder import Decoder
    from model.head import HarmonicHead
    from model.vocab_parallel import VocabShard

    cfg = config(finished, "run")
    path = finished / "run" / "checkpoints" / f"step-{STEPS:08d}"
    decoder, head = Decoder(cfg.model), HarmonicHead(67, cfg.model.dim)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    loading.load_weights(path, decoder, head)
    assert all(not torch.equal(p, before[name]) for name, p in decoder.named_parameters() if p.dim() > 1)
    part = HarmonicHead(67, cfg.model.dim, shard=VocabShard(20, 50, total=67))
    loading.load_weights(path, Decoder(cfg.model), part)
    assert torch.equal(part.prototypes[:30], head.prototypes[20:50])
