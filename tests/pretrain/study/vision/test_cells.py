"""Networks and cells of a vision study: shapes, starts, what is measured against references, cells that repeat."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from common.errors import ConfigError
from model.config import HeadConfig
from pretrain.study.vision import cell as cells
from pretrain.study.vision.cell import Asked, Attack, calibration_error, macro_f1, packed, train_cell, unpacked
from pretrain.study.vision.config import NetworkConfig
from pretrain.study.vision.examples import Examples, Part
from pretrain.study.vision.networks import Learner, check, network_of
from tests.pretrain.study.vision.support import cell, examples

SIGNALS = {"kind": "mnist1d", "train": 300, "test": 60}
NETWORKS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "mlp", "hidden": [7, 5]},
    {"kind": "cnn", "channels": [3, 4]},
    {"kind": "resnet", "name": "resnet18"},
    {"kind": "resnet", "name": "resnet34", "stem": "imagenet"},
    {"kind": "vit", "patch": 4, "layers": 1, "heads": 2, "width": 8, "mlp": 8},
]


def network(tree: dict[str, Any]) -> Any:
    if tree["kind"] in ("resnet", "vit") and importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision: the extra `vision` brings it")
    return TypeAdapter(NetworkConfig).validate_python(tree)


def some(shape: tuple[int, ...], count: int = 6, classes: int = 3) -> Examples:
    draws = torch.Generator().manual_seed(0)
    part = Part(torch.rand(count, *shape, generator=draws), torch.arange(count) % classes)
    return Examples(part, part, part, tuple("abcdefgh"[:classes]))


# ---- networks


@pytest.mark.parametrize("tree", NETWORKS, ids=lambda tree: tree.get("name", tree["kind"]))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (1, 13)], ids=str)
def test_a_network_gives_features_of_the_width_or_says_why_not(tree: dict[str, Any], shape: tuple[int, ...]) -> None:
    settings, found = network(tree), some(shape)
    if tree["kind"] in ("resnet", "vit") and len(shape) == 2:
        with pytest.raises(ConfigError, match="networks.net with data.some.*takes images, and these are signals"):
            check("net", settings, "some", found, 5)
        return
    check("net", settings, "some", found, 5)
    made, width = network_of(settings, shape, 5)
    assert width == (int(np.prod(shape)) if tree["kind"] == "linear" else 5)
    assert made.eval()(found.train.inputs).shape == (6, width)


@pytest.mark.parametrize(
    ("tree", "shape", "told"),
    [
        ({"kind": "cnn", "channels": [2, 2, 2, 2]}, (1, 8, 8), "4 maxima over 2 leave nothing"),
        ({"kind": "vit", "patch": 3}, (3, 8, 8), "patch=3 must divide the 8 pixels"),
        ({"kind": "vit", "patch": 4}, (3, 8, 12), "takes square images"),
        ({"kind": "resnet"}, (2, 8, 8), r"inputs \[2, 8, 8\]: "),
    ],
)
def test_networks_that_do_not_fit_are_refused(tree: dict[str, Any], shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check("net", network(tree), "some", some(shape), 5)


def test_torchvisions_networks_train_with_a_head_from_features_that_differ(tmp_path: Path) -> None:
    name = some((3, 8, 8), count=12).save(tmp_path)
    for tree in (NETWORKS[3], NETWORKS[5]):
        network(tree)
        found = train_cell(tmp_path, cell(name, network=tree, epochs=1, batch=4, noise=[], fgsm=[]))
        assert found["diverged"] is None and found["features_effective_rank"] > 1


@pytest.mark.parametrize("kind", ["linear", "mlp", "cnn"])
def test_heads_of_one_seed_start_from_the_same_network_and_draw_and_at_their_own_lengths(kind: str) -> None:
    found = examples(SIGNALS)
    learners = [
        Learner(network({"kind": kind}), HeadConfig(distance=distance), found, 16, seed=3, init=init)
        for distance, init in (("dot", 1.0), ("euclidean", 1.0), ("manhattan", 4.0))
    ]
    first = learners[0]
    for learner, init in zip(learners, (1.0, 1.0, 4.0), strict=True):
        assert all(torch.equal(first.trunk.state_dict()[n], value) for n, value in learner.trunk.state_dict().items())
        draw = learner.head.prototypes / learner.head.init_std
        torch.testing.assert_close(draw, init * first.head.prototypes / first.head.init_std)
        inputs = learner.normalise(found.train.inputs)
        torch.testing.assert_close(inputs.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(inputs.var(), torch.tensor(1.0), atol=1e-3, rtol=0)
        learner.measure(inputs)
        lengths = learner.features(inputs).norm(dim=1)
        assert lengths.square().mean().sqrt().item() == pytest.approx(learner.head.feature_length, rel=1e-5)


def test_every_parameter_is_in_one_group_and_what_is_not_a_weight_does_not_decay() -> None:
    head = HeadConfig(distance="mahalanobis", exponent="learned")
    learner = Learner(network({"kind": "mlp"}), head, some((1, 8, 8)), 5, seed=1)
    decayed, kept = learner.groups(1.0)
    names = {id(p) for group in (decayed, kept) for p in group["params"]}
    assert names == {id(p) for p in learner.parameters()} and kept["weight_decay"] == 0.0 and len(kept["params"]) == 2


# ---- what is measured


def test_macro_f1_is_scikit_learns() -> None:
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    draws = torch.Generator().manual_seed(2)
    for classes in (2, 7):
        labels, predicted = (torch.randint(classes, (50,), generator=draws) for _ in range(2))
        assert macro_f1(predicted, labels, classes) == pytest.approx(f1_score(labels, predicted, average="macro"))
    predicted, labels = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])  # of a class 3 there is nothing
    assert macro_f1(predicted, labels, 4) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_calibration_error_is_the_gap_by_bins() -> None:
    confidence = torch.tensor([0.95, 0.97, 0.5, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, True])
    # bins of 1/15: 0.95, 0.97 and 1 share the last one, 0.5 is alone
    expected = (abs((0.95 + 0.97 + 1.0) - 2) + abs(0.5 - 1)) / 4
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([False, True])) == 0


def test_an_attack_moves_every_entry_to_where_the_loss_grows() -> None:
    found = some((1, 4, 4), count=9)
    learner = Learner(network({"kind": "linear"}), HeadConfig(distance="dot"), found, 5, seed=1).eval()
    inputs, labels = learner.normalise(found.test.inputs), found.test.labels
    weights = learner.head.prototypes.detach().double()
    x = inputs.flatten(1).double().requires_grad_()
    torch.nn.functional.cross_entropy(x @ weights.T, labels).backward()
    attack = Attack(learner, 0.25)
    moved = attack(inputs, labels)
    torch.testing.assert_close(moved, inputs + 0.25 * x.grad.sign().view_as(inputs).float())
    assert attack.unmoved == 0
    clean = Asked(learner, found.test)
    attacked = Asked(learner, found.test, attack)
    assert attacked.loss() > clean.loss()
    expected = torch.nn.functional.cross_entropy(x @ weights.T, labels, reduction="none")
    torch.testing.assert_close(clean.losses, expected.detach(), rtol=1e-5, atol=1e-6)


def test_inputs_that_an_attack_cannot_move_are_counted() -> None:
    found = some((1, 4, 4), count=6)
    learner = Learner(network({"kind": "linear"}), HeadConfig(distance="dot"), found, 5, seed=1).eval()
    with torch.no_grad():
        learner.head.prototypes.zero_()  # no input matters
    attack = Attack(learner, 0.25)
    inputs = learner.normalise(found.test.inputs)
    assert torch.equal(attack(inputs, found.test.labels), inputs) and attack.unmoved == 6


def test_right_answers_are_packed_and_come_back() -> None:
    for count in (1, 8, 13):
        right = torch.arange(count) % 3 == 0
        assert unpacked(packed(right), count).tolist() == right.tolist()


def test_the_rate_rises_then_falls_to_nothing() -> None:
    shares = [cells._share(step, 10, 0.2) for step in range(10)]
    assert shares[:2] == [0.5, 1.0] and shares[2:] == pytest.approx([1 - k / 8 for k in range(8)])
    assert [cells._share(step, 3, 0.0) for step in range(3)] == pytest.approx([1.0, 1.0, 0.5])


def test_batches_have_every_example_but_the_rest_once_an_epoch() -> None:
    rows = list(cells._batches(10, 3, 2, torch.Generator().manual_seed(0)))
    assert [len(some) for some in rows] == [3] * 6
    for epoch in (rows[:3], rows[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 9


# ---- cells


def test_a_cell_learns_the_digits_is_the_same_again_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    found = examples({"kind": "digits"})
    one = cell(found.save(tmp_path), network={"kind": "linear"}, head={"distance": "cosine"}, epochs=4)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = train_cell(tmp_path, one)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = train_cell(tmp_path, one)
    timed = ("seconds", "images_per_s")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in first.items() if k not in timed}
    assert first["accuracy"] > 0.85 and first["diverged"] is None
    assert first["accuracy"] == unpacked(first["right"], found.sizes()["test"]).mean()
    assert first["accuracy_fgsm_0.1"] < first["accuracy"] and first["accuracy_noise_0.5"] > 0.5
    assert first["steps"] == 4 * (found.sizes()["train"] // 64)
    assert first["j_per_image"] is None and "share" in first["not_measured"]["energy"]
    pixels = np.frombuffer(base64.b64decode(first["pictures"]["pixels"]), np.uint8)
    assert pixels.shape == (640,) and {int(pixels.min()), int(pixels.max())} & {1, 255}


def test_a_cell_that_leaves_the_finite_numbers_says_when(tmp_path: Path) -> None:
    name = examples({"kind": "digits"}).save(tmp_path)
    setting = {"lr": 1e30, "weight_decay": 0.0, "init": 1.0}
    found = train_cell(tmp_path, cell(name, head={"distance": "dot"}, setting=setting))
    assert 0 < found["diverged"] < found["steps"]
    assert all(found[measure] is None for measure in ("accuracy", "loss", "images_per_s", "prototypes_first_2"))


def test_a_cell_that_its_last_step_breaks_has_diverged_too(tmp_path: Path) -> None:
    name = examples({"kind": "digits"}).save(tmp_path)
    setting = {"lr": 1e30, "weight_decay": 0.0, "init": 1.0}
    found = train_cell(tmp_path, cell(name, head={"distance": "dot"}, setting=setting, epochs=1, batch=5000))
    assert found["diverged"] == found["steps"] == 1 and found["accuracy"] is None and found["images_per_s"] is None


def test_energy_is_measured_where_a_counter_is_and_else_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counter:
        missing = {"gpu": "no GPU", "dram": "no counter"}
        joules = 0.0

        def read(self) -> dict[str, list[float]]:
            self.joules += 12.0
            return {"cpu": [self.joules]}

    name = some((1, 4, 4), count=12).save(tmp_path)
    one = cell(name, epochs=2, batch=4, measured=True, noise=[], fgsm=[])
    monkeypatch.setattr(cells, "zeus_counter", lambda ranks: Counter())
    cells._meter.cache_clear()
    try:
        found = train_cell(tmp_path, one)
    finally:
        cells._meter.cache_clear()
    assert found["j_per_image"] == pytest.approx(12.0 / 24)
    assert found["not_measured"] == {"gpu": "no GPU", "dram": "no counter"}


def test_a_cell_is_named_by_all_of_its_settings() -> None:
    one = cell("data")
    setting = {"lr": 0.01, "weight_decay": 0.0, "init": 1.0}
    others = [
        *(cell("other"), cell("data", network={"kind": "linear"}), cell("data", head={"distance": "cosine"})),
        *(cell("data", seed=2), cell("data", epochs=3), cell("data", batch=65), cell("data", dim=9)),
        *(cell("data", betas=[0.9, 0.99]), cell("data", warmup=0.1), cell("data", noise=[]), cell("data", fgsm=[])),
        *(cell("data", device="cuda"), cell("data", measured=True)),
        cell("data", setting={**setting, "lr": 0.02}),
    ]
    assert len(others) == len(type(one).model_fields)
    assert len({each.key() for each in [one, *others]}) == len(others) + 1
