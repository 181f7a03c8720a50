"""The door to a checkpoint: what is not one is refused in words that name a file, whatever its manifest says; and what
passes holds the right values.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.chaos import mutations
from common.errors import ConfigError
from pretrain.checkpoints import contents, resume
from pretrain.checkpoints.contents import METADATA, SUFFIX, damage, read_state, sizes_of
from pretrain.checkpoints.folder import MANIFEST, MOMENTS, STATE
from pretrain.checkpoints.weights import read_weights, shapes, stored_name, without_weights
from pretrain.config import RunConfig
from tests.support.checkpoints import as_json, read_parts, seal, write_checkpoint, write_parts
from tests.support.tiny import tiny_config

CFG = tiny_config(model__layers=1, model__dim=16, head__exponent="learned", train__steps=9)
WEIGHTS = shapes(*without_weights(CFG))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `checkpoints/` folder with the steps 2 and 4, as two ranks write them."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (2, 4):
        write_checkpoint(folder, CFG, step, ranks=2)
    return folder


@pytest.fixture
def newest(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "run" / "checkpoints") / "step-00000004"


@pytest.fixture(scope="module")
def values(original: Path) -> dict[str, torch.Tensor]:
    return read_weights(original / "step-00000004", WEIGHTS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__tied": True, "head__distance": "mahalanobis", "head__params": {"factor": "full"}},
        {"head__distance": "dot", "head__exponent": "learned", "model__bias": True, "model__qk_norm": True},
        {"model__norm": "rmsnorm", "model__mlp": "swiglu", "model__positions": "none", "model__kv_heads": 1},
    ],
)
def test_what_must_be_there_is_what_the_model_has(changes: dict) -> None:
    cfg: RunConfig = tiny_config(**changes)
    built = shapes(*without_weights(cfg))
    names = {f"{name}.fp32": size for name, size in sizes_of(cfg.model, cfg.head).items()}
    assert names == {stored_name(name): shape.numel() for name, shape in built.items()}


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_checkpoint_is_refused_in_words_or_right(
    original: Path, values: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory, rng: random.Random
) -> None:
    folder = shutil.copytree(original, tmp_path_factory.mktemp("mutated") / "checkpoints")
    newest = folder / "step-00000004"
    done = mutations.mutate_checkpoint(newest, rng)
    began = time.monotonic()
    wrong = damage(newest, moments=False)
    if wrong is None:
        found = read_weights(newest, WEIGHTS)
        assert all(torch.equal(found[name], values[name]) for name in values), done
        assert read_state(newest)["step"] == 4, done
    else:
        assert str(newest) in wrong and "Error" not in wrong and wrong.isprintable(), (done, wrong)
    before = resume.find(folder, "auto")
    assert before is not None and before.name == ("step-00000002" if damage(newest) else newest.name), done
    assert time.monotonic() - began < 10, done
    shutil.rmtree(folder.parent)


def without(name: str, checkpoint: Path, keep: int = 0) -> None:
    """Takes a tensor out of the first file, or leaves `keep` values of it."""
    file = sorted(checkpoint.glob(f"*{SUFFIX}"))[0]
    header, data = read_parts(file)
    first, last = header[name]["data_offsets"]
    cut = last - first - 4 * keep
    if keep:
        header[name] = {"dtype": "F32", "shape": [keep], "data_offsets": [first, first + 4 * keep]}
    else:
        del header[name]
    for other in header.keys() - {METADATA, name}:
        if header[other]["data_offsets"][0] >= last:
            header[other]["data_offsets"] = [at - cut for at in header[other]["data_offsets"]]
    write_parts(file, as_json(header), data[: last - cut] + data[last:])
    seal(checkpoint)


FIRST = f"shard-00001-model-00001-of-00001{SUFFIX}"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one host's part alone": (
        lambda path: (path / FIRST).unlink(),
        "step-00000004: the values 0 to 536 of trunk.tokens.weight.fp32 are in no file",
    ),
    "a part twice": (
        lambda path: shutil.copy(path / FIRST, path / f"x{SUFFIX}"),
        f"x{SUFFIX} holds the values 0 to 536 of trunk.tokens.weight.fp32, which another file holds too",
    ),
    "a part that is short": (
        lambda path: without("head.prototypes.exp_avg", path, keep=530),
        "the values 530 to 536 of head.prototypes.exp_avg are in no file",
    ),
    "a header of absurd length": (
        lambda path: write_parts(path / FIRST, b"{}", b"", 2**63),
        f"{FIRST}: its header would take 9,223,372,036,854,775,808 bytes, of 2 in the file",
    ),
    "an empty state": (lambda path: (path / STATE).write_bytes(b""), f"{STATE}: not valid JSON"),
    "a deep state": (lambda path: (path / STATE).write_bytes(b"[" * 10**5), f"{STATE}: nested more than 64 deep"),
    "a step of a billion": (
        lambda path: (path / STATE).write_text((path / STATE).read_text().replace('"step": 4', '"step": 1000000000')),
        f"{STATE}: updates=4, step=1000000000 and config.train.steps=9 do not follow each other",
    ),
    "another step than its folder": (
        lambda path: (path / STATE).write_text((path / STATE).read_text().replace('"step": 4', '"step": 5')),
        f"{STATE}: it is of step 5, its folder of step 4",
    ),
    "an identity that is not the config's": (
        lambda path: (path / STATE).write_text((path / STATE).read_text().replace('"optim.lr": 0.01', '"optim.lr": 1')),
        f"{STATE}: identity: 'optim.lr' is not what its config says",
    ),
    "more layers than there are tensors": (
        lambda path: (path / STATE).write_text((path / STATE).read_text().replace('layers": 1', 'layers": 1000')),
        "33 tensors are not those of 1000 layers",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_that_is_consistent_is_named(newest: Path, name: str) -> None:
    harm, told = CASES[name]
    harm(newest)
    seal(newest)
    wrong = damage(newest)
    assert wrong is not None and told in wrong and str(newest) in wrong
    assert damage(newest, "size") == wrong, "without hashes too"
    assert damage(newest, share=(1, 2)) in (None, wrong), "the first rank says it"
    assert resume.find(newest.parent, "auto") == newest.parent / "step-00000002"
    with pytest.raises(ConfigError, match="can be used"):
        resume.find(newest.parent, str(newest))


@pytest.mark.parametrize("name", [MANIFEST, STATE, FIRST])
def test_only_regular_files_are_opened(newest: Path, name: str) -> None:
    (newest / name).unlink()
    os.mkfifo(newest / name)
    assert damage(newest) == f"{newest / name}: not a regular file"
    (newest / name).unlink()
    (newest / name).symlink_to("/dev/zero")
    assert damage(newest) == f"{newest / name}: not a regular file"


@pytest.mark.parametrize("name", ["../../config.yaml", "/etc/hostname", f"../x{SUFFIX}", f"a\0b{SUFFIX}", "notes.txt"])
def test_a_manifest_lists_files_of_the_checkpoint_alone(newest: Path, name: str) -> None:
    seal(newest)
    text = (newest / MANIFEST).read_text()
    (newest / MANIFEST).write_text(text.replace(f'"{STATE}"', as_json(name).decode()))
    wrong = damage(newest)
    assert wrong is not None and wrong.startswith(f"{newest / MANIFEST}: ")


def test_weights_can_be_read_without_moments_and_nothing_goes_on_from_them(newest: Path) -> None:
    without("head.prototypes.exp_avg_sq", newest)
    assert damage(newest, moments=False) is None
    assert "head.prototypes.exp_avg_sq" in str(damage(newest))


def test_what_is_larger_than_it_may_be_is_not_read(newest: Path) -> None:
    os.truncate(newest / STATE, contents.MOST + 1)
    seal(newest)
    assert f"{newest / STATE}: more than the 16,777,216 bytes" in str(damage(newest))


def test_a_checkpoint_may_be_copied_under_another_name(newest: Path) -> None:
    assert damage(shutil.copytree(newest, newest.parent / "best")) is None
    wrong = damage(shutil.copytree(newest, newest.parent / "step-00000005"))
    assert wrong is not None and "it is of step 4, its folder of step 5" in wrong


def test_parts_are_counted_whatever_a_manifest_says(newest: Path) -> None:
    def uncovered(files: list[Path], sizes: dict[str, int]) -> str | None:
        return contents._gap(contents._parts(files), sizes)

    whats = ("fp32", *MOMENTS)
    sizes = {f"{name}.{what}": size for name, size in sizes_of(CFG.model, CFG.head).items() for what in whats}
    files = sorted(newest.glob(f"*{SUFFIX}"))
    assert uncovered(files, sizes) is None
    assert "the values 0 to" in str(uncovered(files[1:], sizes))
    assert "which is no tensor of this model" in str(uncovered(files, {"w.fp32": 5}))
