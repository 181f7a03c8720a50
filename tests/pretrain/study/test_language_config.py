"""The settings of a study of language models: what is tuned, what each run is, and what cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import qmc

from common.errors import ConfigError
from common.settings import read_tree, validate
from common.yaml_tree import to_yaml
from model.head import HarmonicHead
from pretrain.config import RunConfig
from pretrain.study import language_config
from pretrain.study.language_config import Cell, LanguageConfig, check_configs
from pretrain.study.tuning import TUNABLE, Range, Space, Tuning, Values, edges, points, ranks, ratios, settings_of
from tests.support.language_study import study, tree

SPACE = {
    "lr": {"low": 0.001, "high": 0.1},
    "warmup": {"low": 0.1, "high": 0.4},
    "init": {"low": 0.25, "high": 4},
    "feature_length": {"low": 0.5, "high": 2},
    "head_lr": {"low": 0.25, "high": 4},
    "prototype_decay": [0, 0.05, 0.1],
    "exponent": {"low": 0.25, "high": 4},
}


def tuning(**changes: Any) -> dict[str, Any]:
    return {"trials": 3, "rungs": [0.5, 1], "seed": 1, "space": SPACE, **changes}


def config_of(made: LanguageConfig, head: str, size: str = "d32", share: float = 1.0, **setting: float) -> RunConfig:
    return made.config(Cell(head, size, 7, setting, None, 0, share))


def test_data_are_those_of_a_corpus_with_the_studys_own_words(tmp_path: Path) -> None:
    recipe = tmp_path / "corpus.yaml"
    usual = tree(tmp_path)
    recipe.write_text(to_yaml({"data": usual["base"]["data"]}))
    base = {**usual["base"], "data": {"path": str(tmp_path / "other"), "val_fraction": 0.25}}
    made = language_config.from_tree({**usual, "corpus": str(recipe), "base": base})
    data = made.config(made.trial("softmax", 0, 0, made.settings("softmax")[0])).data
    without = study(tmp_path)
    of_corpus = without.config(without.trial("softmax", 0, 0, without.settings("softmax")[0])).data
    assert data == of_corpus.model_copy(update={"path": tmp_path / "other", "val_fraction": 0.25})
    for given, told in (
        (str(tmp_path / "missing.yaml"), "missing.yaml: there is no such file"),
        (str(recipe), "expected a recipe with a `data` section"),
    ):
        recipe.write_text("run: x\n")
        with pytest.raises(ConfigError, match=told):
            language_config.from_tree({**usual, "corpus": given})


def test_a_setting_becomes_a_runs_own(tmp_path: Path) -> None:
    heads = {"softmax": {"distance": "dot"}, "cosine": {"distance": "cosine", "exponent": {"first": 2, "last": 8}}}
    sizes = {"d32": {"train": {"steps": 40}}, "d48": {"model": {"dim": 48}, "train": {"steps": 80}}}
    made = study(tmp_path, heads=heads, sizes=sizes, tuning=tuning(), lr_floor=0.1)
    setting = {"lr": 0.02, "warmup": 0.25, "init": 2.0, "feature_length": 0.5, "head_lr": 3.0, "prototype_decay": 0.05}
    for size, dim, steps in (("d32", 32, 40), ("d48", 48, 80)):
        cfg = config_of(made, "softmax", size, **setting)
        own = HarmonicHead(1, dim, distance="dot")
        assert (cfg.model.dim, cfg.train.steps, cfg.train.seed) == (dim, steps, 7)
        assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.warmup_steps) == (0.02, pytest.approx(0.002), steps // 4)
        assert (cfg.optim.head_lr_scale, cfg.optim.prototype_decay) == (3.0, 0.05)
        assert cfg.head.init_std == pytest.approx(2 * own.init_std)
        assert cfg.head.feature_length == pytest.approx(own.feature_length / 2)
    half = config_of(made, "softmax", share=0.5, **setting)
    assert (half.train.steps, half.optim.warmup_steps) == (20, 5), "a rung has its own whole schedule"
    ramp = config_of(made, "cosine", **setting, exponent=1.5).head.exponent
    assert (ramp.first, ramp.last, ramp.steps) == (3, 12, None)
    made = study(tmp_path, tuning=tuning())
    assert config_of(made, "cosine", **setting, exponent=0.5).head.exponent == pytest.approx(0.5 * 32**0.5)


def test_a_multiple_of_one_is_the_default_itself(tmp_path: Path) -> None:
    made = study(tmp_path, tuning=tuning())
    for head in ("softmax", "cosine"):
        cfg = config_of(made, head, **made.settings(head)[0])
        assert cfg.head.model_dump() == made.heads[head].model_dump(exclude={"space"})


def test_the_first_trial_is_a_heads_default(tmp_path: Path) -> None:
    known = {"softmax": {"source": "a paper", "settings": {"lr": 0.003, "warmup": 0.01, "init": 0.3}}}
    made = study(tmp_path, tuning=tuning(), known=known)
    ones = {"init": 1.0, "feature_length": 1.0, "head_lr": 1.0}
    assert made.settings("softmax")[0] == {"lr": 0.003, "warmup": 0.2, "prototype_decay": 0, **ones}, (
        "0.01 is not tried"
    )
    assert made.settings("cosine")[0] == {"lr": 0.01, "warmup": 0.2, "prototype_decay": 0, **ones, "exponent": 1}
    listed = validate(Tuning, tuning())
    for values, first in (((0.0, 0.05, 0.1), 0.0), ((0.05, 0.1), 0.05), ((0.1, 0.2), 0.1)):
        made_of = settings_of(listed, {"prototype_decay": Values(values)}, {"prototype_decay": 0.05})
        assert made_of[0] == {"prototype_decay": first}, "no decay is every head's default, where it is tried"


def test_trials_of_all_heads_are_the_same_points_of_the_space(tmp_path: Path) -> None:
    made = study(tmp_path, tuning=tuning(trials=9))
    softmax, cosine = (made.settings(head) for head in ("softmax", "cosine"))
    assert [{**one, "exponent": other["exponent"]} for one, other in zip(softmax, cosine, strict=True)] == cosine
    # against scipy itself, and the definition of a range
    sobol = qmc.Sobol(7, scramble=True, rng=np.random.default_rng(1)).random(8)
    names = list(TUNABLE)
    for point, setting in zip(sobol, cosine[1:], strict=True):
        for name, entry in SPACE.items():
            share = point[names.index(name)]
            if isinstance(entry, dict):
                value = np.exp((1 - share) * np.log(entry["low"]) + share * np.log(entry["high"]))
                assert setting[name] == pytest.approx(value, rel=1e-3)
            else:
                assert setting[name] == entry[int(share * 3)]
    fewer = study(tmp_path, tuning=tuning(trials=4)).settings("cosine")
    assert fewer == cosine[:4], "more trials begin with the same ones"
    assert study(tmp_path, tuning=tuning(trials=9, seed=2)).settings("cosine")[1] != cosine[1]
    assert points(0, 1).shape == (0, 7) and points(1, 1).shape == (1, 7) and points(5, 1).shape == (5, 7)


def test_a_head_may_have_a_range_of_its_own(tmp_path: Path) -> None:
    heads = {
        "softmax": {"distance": "dot", "space": {"lr": {"low": 0.1, "high": 1}}},
        "cosine": {"distance": "cosine", "exponent": "learned"},
    }
    made = study(tmp_path, heads=heads, tuning=tuning(trials=5))
    assert all(0.1 <= setting["lr"] <= 1 for setting in made.settings("softmax"))
    assert "exponent" not in made.space("softmax") and "exponent" in made.space("cosine")
    learned = config_of(made, "cosine", lr=0.1, exponent=2.0).head
    assert (learned.exponent, learned.exponent_start) == ("learned", pytest.approx(2 * 32**0.5))
    head = HarmonicHead(3, 32, **learned.arguments())
    assert float(head.exponent.detach()) == pytest.approx(2 * 32**0.5) and head.log_exponent is not None
    softmax, cosine = made.settings("softmax")[2], made.settings("cosine")[2]
    assert softmax["lr"] / 0.1 == pytest.approx((cosine["lr"] / 0.001) ** 0.5, rel=1e-3), "the same place in its range"
    assert "space" not in config_of(made, "softmax", lr=0.1).head.model_dump()


def test_counts_of_the_rungs() -> None:
    assert validate(Tuning, tuning(trials=16, rungs=[0.25, 0.5, 1], keep=0.34)).counts() == [16, 5, 2]
    assert validate(Tuning, tuning(trials=3, rungs=[0.1, 0.2, 0.5, 1], keep=0.1)).counts() == [3, 1, 1, 1]
    assert validate(Tuning, tuning(trials=7, rungs=[1])).counts() == [7]


def test_what_lies_at_an_edge() -> None:
    space = validate(Space, SPACE).entries()
    inside = {"lr": 0.01, "warmup": 0.2, "init": 1, "feature_length": 1, "head_lr": 1, "exponent": 1}
    assert edges(space, {**inside, "prototype_decay": 0.05}) == {}
    assert edges(space, {**inside, "prototype_decay": 0}) == {}, "nothing is below 0"
    assert edges(space, {**inside, "prototype_decay": 0.1}) == {"prototype_decay": "high"}
    rate = Range(low=0.001, high=0.1)  # two tenfolds: its outer tenths are a fifth of a tenfold each
    assert [rate.edge(value) for value in (0.0009, 0.00158, 0.00159, 0.063, 0.0632, 5)] == [
        *("low", "low", None, None, "high", "high"),
    ]
    assert Values((0.1, 0.2, 0.4)).edge(0.1) == "low" and Values((0.1, 0.2, 0.4)).edge(0.2) is None
    assert rate.beyond("low") == "0.0001 to 0.1" and rate.beyond("high") == "0.001 to 1"
    assert Values((0.0, 0.1)).beyond("high") == "values above 0.1 too"
    assert Values((0.0, 0.05, 0.1)).edges_by_chance() == pytest.approx(1 / 3)


def test_how_far_a_setting_is_from_a_known_one() -> None:
    found = ratios({"lr": 0.003, "prototype_decay": 0.1, "init": 1.0}, {"lr": 0.006, "prototype_decay": 0, "warmup": 1})
    assert found == {"lr": 0.5, "prototype_decay": None}
    assert ratios({"prototype_decay": 0}, {"prototype_decay": 0}) == {"prototype_decay": 1.0}
    assert ranks([2.0, None, 1.0, 2.0]) == [2, 0, 3, 1]


def test_settings_that_cannot_be_meant(tmp_path: Path) -> None:
    base = tree(tmp_path)["base"]

    def space(**entries: Any) -> dict[str, Any]:
        return {"tuning": tuning(space=entries)}

    rate = {"low": 0.001, "high": 0.1}
    for changes, why in (
        ({"baseline": "dot"}, "baseline=dot is none of the heads: softmax, cosine"),
        ({"heads": {"softmax": {"distance": "euclid"}}}, "euclid"),
        ({"heads": {"a/b": {}}, "baseline": "a/b"}, "heads.a/b: a name names folders: letters, digits"),
        ({"sizes": {"a.b": {}}}, "sizes.a.b: a name names folders"),
        ({"sizes": {}}, "sizes"),
        ({"seeds": [11, 11]}, "a value twice"),
        ({"seeds": [11]}, "fewer than two seeds"),
        ({"seeds": [1, 2]}, "1 is tuning.seed, which chose"),
        ({"seeds": [*range(2, 900)], "sizes": {f"d{k}": {} for k in range(50)}}, "a study has at most"),
        ({"base": {**base, "run": "x"}}, "base.run is set by the study: use out"),
        ({"base": {**base, "head": {}}}, "base.head is set by the study: use heads"),
        ({"base": {**base, "optim": {"lr": 1.0}}}, "base.optim.lr is set by the study: use tuning.space.lr"),
        ({"base": {**base, "optim": {"min_lr": 1.0}}}, "base.optim.min_lr is set by the study: use lr_floor"),
        ({"base": {**base, "evaluation": {"every": 2, "patience": 3}}}, "patience would end runs of some heads sooner"),
        ({"base": {**base, "energy": {"stop_at_joules": 3.0}}}, "stop_at_joules would end runs of some heads sooner"),
        (
            {"heads": {"softmax": {"distance": "cosine", "exponent": {"first": 1, "last": 2, "steps": 9}}}},
            "heads.softmax.exponent.steps: rungs are shorter than runs",
        ),
        ({"base": {**base, "train": [1]}}, "base.train must be a mapping"),
        ({"base": {**base, "model": 3}}, "base.model must be a mapping"),
        ({"base": {**base, "modell": {}}}, "modell"),
        ({"base": {**base, "data": {**base["data"], "test_fraction": 0.0}}}, "base.data.test_fraction must be above 0"),
        ({"sizes": {"d32": {"train": {"seed": 3}}}}, "sizes.d32.train.seed is set by the study"),
        ({"sizes": {"d32": {"optim": {}}}}, "sizes.d32.optim: unknown key"),
        ({"sizes": {"d32": {"model": {"dim": 33}}}}, "softmax.*dim=33 must be a multiple"),
        ({"seed": 1}, "seed"),
        ({"tuning": tuning(trials=0)}, "trials"),
        ({"tuning": tuning(rungs=[0.5])}, r"rungs=\[0.5\] must rise to 1"),
        ({"tuning": tuning(rungs=[0.5, 0.5, 1])}, "must rise"),
        ({"tuning": tuning(rungs=[0, 1])}, "rungs.0: given 0"),
        ({"tuning": tuning(keep=1)}, "keep"),
        (space(lr={"low": 0.1, "high": 0.1}), "low=0.1 must be below high=0.1"),
        (space(lr=rate, rate=rate), "tuning.space.rate: unknown key"),
        (space(lr={"lo": 0.1, "high": 1}), "tuning.space.lr.lo: unknown key; did you mean tuning.space.lr.low"),
        (space(lr=[0.1]), "a list of 1: give 2 to 256 values"),
        (space(lr=[0.2, 0.1]), "must rise"),
        (space(lr=[0, 0.1]), "lr=0, 0.1: it must be positive"),
        (space(lr=rate, warmup={"low": 0.1, "high": 2}), "it is a share of the steps"),
        (space(lr=rate, init=[-1, 1]), "init"),
        (space(warmup={"low": 0.1, "high": 0.2}), "optim.lr: missing"),
        ({"known": {"x": {"source": "a", "settings": {"lr": 1}}}}, "known.x is none of the heads"),
        ({"known": {"softmax": {"source": "a", "settings": {"exponent": 1}}}}, "exponent of that head is not tuned"),
        ({"known": {"softmax": {"source": "a", "settings": {}}}}, "known.softmax.settings"),
        ({"heads": {"softmax": {"distance": "dot", "space": {"lr": 3}}}}, "heads.softmax.space.lr"),
        ({"keep": "some"}, "keep: given"),
        ({"heads": {"softmax": {"exponent_start": 3.0}}}, "exponent_start=3 is that of a learned exponent"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_configs(study(tmp_path, **changes))


def test_names_of_runs_differ(tmp_path: Path) -> None:
    """Even where names of heads and sizes run into each other."""
    heads = {"a": {"distance": "dot"}, "a-d32": {}, "a-trial000": {}}
    made = study(tmp_path, heads=heads, baseline="a", sizes={"d32": {}, "d32-rung0": {}, "trial000": {}})
    names = [cell.name for head in heads for cell in made.fresh(head, made.settings(head)[0])]
    names += [made.trial(head, k, rung, {}).name for head in heads for k in range(3) for rung in range(2)]
    assert len(names) == len(set(names)) == 3 * (3 * 2 + 3 * 2)


def test_heads_of_a_seed_start_from_one_trunk(tmp_path: Path) -> None:
    """But for the gain of the last norm, which sets the length of hidden states that a head is made for."""
    from pretrain.modules import build_modules
    from pretrain.runtime.ranks import Ranks

    made = study(tmp_path)
    one = Ranks(0, 1, 0, 1, torch.device("cpu"))
    first = {head: made.settings(head)[1] for head in made.heads}
    trunks = [build_modules(made.config(Cell(head, "d32", 1, first[head])), one)[0].state_dict() for head in made.heads]
    other = build_modules(made.config(Cell("softmax", "d32", 2, first["softmax"])), one)[0].state_dict()
    assert {name for name in trunks[0] if not torch.equal(trunks[0][name], trunks[1][name])} <= {"norm.weight"}
    assert not torch.equal(trunks[0]["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_the_recipe_tunes_twelve_heads_alike() -> None:
    recipe = Path("configs/study-small.yaml")
    made = language_config.from_tree(read_tree(recipe))
    check_configs(made)
    distances = {name: head.distance for name, head in made.heads.items()}
    names = "euclidean cosine manhattan chebyshev minkowski canberra braycurtis hamming mahalanobis"
    names += " cosine_softmax squared_euclidean_softmax"
    assert distances == {"softmax": "dot", **{name: name for name in names.split()}}
    assert made.heads["minkowski"].params == {"p": 3} and made.baseline == "softmax"
    assert len(made.seeds) >= 5 and len(made.sizes) == 3 and set(made.tuning.space.entries()) == set(TUNABLE)
    assert not any(head.space.entries() for head in made.heads.values()), "no head has a range of its own"
    assert f"overtone study {recipe}" in recipe.read_text()
