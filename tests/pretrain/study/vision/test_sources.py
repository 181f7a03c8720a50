"""Where examples come from: every source, what it says when something is missing, and how parts are made."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from pretrain.study.vision import signals, zoo
from pretrain.study.vision.examples import PARTS, Examples, Part, Read, split
from tests.pretrain.study.vision.support import examples, picture, write_mnist

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def everything(found: Examples) -> list[tuple[bytes, int]]:
    """All examples of all parts, in an order of their own."""
    parts = [getattr(found, name) for name in PARTS]
    return sorted(
        (inputs.numpy().tobytes(), int(label))
        for part in parts
        for inputs, label in zip(part.inputs, part.labels, strict=True)
    )


# ---- parts


def test_an_example_goes_where_the_hash_of_its_key_says() -> None:
    labels = torch.arange(200) % 2
    read = Read(Part(torch.arange(200.0)[:, None, None], labels), [f"key {k}" for k in range(200)], ["a", "b"])
    places = [int(hashlib.sha256(f"key {k}".encode()).hexdigest()[:12], 16) / 2**48 for k in range(200)]
    found = split(read, 0.25, 0.2, "data.some")
    rows = {name: getattr(found, name).inputs.flatten().tolist() for name in PARTS}
    assert rows["test"] == [k for k in range(200) if places[k] < 0.2]
    assert rows["tuning"] == [k for k in range(200) if 0.2 <= places[k] < 0.2 + 0.8 * 0.25]
    assert rows["train"] == [k for k in range(200) if places[k] >= 0.4]
    own = split(
        Read(read.train, read.keys, read.classes, test=Part(torch.zeros(3, 1, 1), torch.zeros(3))), 0.25, 0.2, ""
    )
    assert own.sizes()["test"] == 3
    assert own.tuning.inputs.flatten().tolist() == [k for k in range(200) if places[k] < 0.25]


def test_parts_that_are_empty_and_classes_without_examples_are_refused() -> None:
    read = Read(Part(torch.zeros(3, 1, 1), torch.tensor([0, 0, 0])), ["a", "b", "c"], ["one", "two"])
    with pytest.raises(ConfigError, match="data.some: the train part of 3 examples is empty; give more"):
        split(read, 1e-9, 0.9999999, "data.some")
    many = Read(
        Part(torch.zeros(90, 1, 1), torch.zeros(90, dtype=torch.int64)), list(map(str, range(90))), ["one", "two"]
    )
    with pytest.raises(ConfigError, match="data.some: no example to train on of the class two"):
        split(many, 0.2, 0.2, "data.some")


def test_moments_are_those_of_the_training_part_in_pixels_from_0_to_1() -> None:
    draws = np.random.default_rng(0)
    inputs = draws.integers(0, 256, (5000, 3, 2, 2), dtype=np.uint8)
    inputs[:, 2] = 51  # a channel that does not vary
    part = Part(torch.from_numpy(inputs), torch.zeros(5000, dtype=torch.int64))
    mean, deviation = Examples(part, part, part, ("a",)).moments()
    expected = (inputs / 255).transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(mean, expected.mean(1), rtol=1e-6)
    np.testing.assert_allclose(deviation, [*expected.std(1)[:2], 1.0], rtol=1e-6)


def test_examples_come_back_from_their_file_and_a_changed_pixel_changes_the_fingerprint(tmp_path: Path) -> None:
    found = examples({"kind": "digits"})
    name = found.save(tmp_path)
    back = Examples.load(tmp_path, name)
    assert everything(back) == everything(found) and back.classes == found.classes and back.fingerprint() == name
    found.test.inputs[0, 0, 0, 0] += 1
    assert found.fingerprint() != name


# ---- digits and signals


def test_digits_are_all_of_scikit_learns() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    found, theirs = examples({"kind": "digits"}), load_digits()
    expected = sorted(
        ((image / 16).astype(np.float32).tobytes(), int(label))
        for image, label in zip(theirs.images, theirs.target, strict=True)
    )
    assert everything(found) == expected and found.shape == (1, 8, 8) and len(found.classes) == 10


def test_signals_are_the_same_for_a_seed_and_others_for_another() -> None:
    source = {"kind": "mnist1d", "train": 200, "test": 50}
    found = examples(source)
    assert found.shape == (1, 40) and found.sizes()["test"] == 50 and sum(found.sizes().values()) == 250
    assert found.fingerprint() == examples(source).fingerprint() != examples({**source, "seed": 1}).fingerprint()
    assert torch.equal(found.test.labels, torch.arange(50) % 10)


def test_a_signal_is_its_shape_moved_scaled_and_sloped_under_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(5)
    drawn = np.stack([signals.signal(np.zeros(12), draws) for _ in range(4000)])
    ends = np.linspace(-0.5, 0.5, 40)
    slope = 0.75**2 / 3 * ends**2  # the variance of the slope at each place
    # straight lines between points lie a little below the noise's own deviation
    assert drawn.var(0)[20] == pytest.approx(0.25**2 + 0.02**2, rel=0.2)
    np.testing.assert_allclose(drawn.var(0) - drawn.var(0)[20], slope, atol=0.02)
    for name in ("SMOOTH_DEVIATION", "DEVIATION", "SLOPE", "FACTOR"):
        monkeypatch.setattr(signals, name, 0.0)
    monkeypatch.setattr(signals, "MOVES", 0)
    monkeypatch.setattr(signals, "PADDED", (48, 48))
    shape = signals.SHAPES[3]
    clean = signals.signal(shape, np.random.default_rng(0))
    at = np.linspace(0, 47, 40)
    np.testing.assert_allclose(clean, np.interp(at, np.arange(48), [*shape, *[0.0] * 36]))


def test_the_middle_of_the_points_is_for_distances_and_not_for_products(tmp_path: Path) -> None:
    """As exact optima have it: the prototypes that a head would have are put there, not trained."""
    found = examples({"kind": "points", "train": 100, "test": 500})
    assert found.shape == (1, 2) and found.classes[0] == "middle"
    x, y = found.test.inputs[:, 0].double(), found.test.labels
    places = torch.tensor([[0, 0], [1, 1], [1, -1], [-1, -1], [-1, 1]], dtype=torch.float64)
    assert (torch.cdist(x, places).argmin(1) == y).double().mean() > 0.99
    for turn in torch.randn(50, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        scores = x @ torch.cat([turn[:1], 9 * places[1:] + turn[1:]]).T
        assert (scores.argmax(1) == y)[y == 0].double().mean() < 0.2


# ---- folders


def test_a_folder_of_classes_is_split_by_the_hash_of_paths(tmp_path: Path) -> None:
    colours = {"a": RED, "b": GREEN, "c": BLUE}
    for name, colour in colours.items():
        for k in range(30):
            picture(tmp_path / name / f"deep {k % 2}" / f"{k}.png", colour)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = {"kind": "folder", "path": str(tmp_path), "image_size": 4}
    found = examples(source)
    assert found.classes == ("a", "b", "c") and found.shape == (3, 4, 4) and len(everything(found)) == 90
    for part in (found.train, found.tuning, found.test):
        for inputs, label in zip(part.inputs, part.labels, strict=True):
            assert inputs[:, 1, 1].tolist() == list(colours[found.classes[label]])
    (tmp_path / "b" / "deep 0" / "0.png").unlink()  # no other example changes its part
    less = examples(source)
    assert sum(abs(a - b) for a, b in zip(found.sizes().values(), less.sizes().values(), strict=True)) == 1
    grey = examples({**source, "channels": 1})
    assert grey.shape == (1, 4, 4) and {int(x[0, 0, 0]) for x in grey.train.inputs} == {76, 150, 29}


def test_tiny_imagenets_layout_has_val_as_its_test_part(tmp_path: Path) -> None:
    for name, colour in {"n01": RED, "n02": BLUE}.items():
        for k in range(20):
            picture(tmp_path / "train" / name / "images" / f"{name}_{k}.JPEG", colour, (5, 5))
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1")
    picture(tmp_path / "val" / "images" / "val_0.JPEG", BLUE)
    picture(tmp_path / "val" / "images" / "val_1.JPEG", RED)
    picture(tmp_path / "test" / "images" / "test_0.JPEG", RED)  # without a label
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    source = {"kind": "folder", "path": str(tmp_path), "image_size": 8}
    found = examples(source)
    assert found.test.labels.tolist() == [1, 0] and sum(found.sizes().values()) == 42
    assert found.test.inputs[0, 2].float().mean() > 240 > found.test.inputs[1, 2].float().mean()
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(ConfigError, match="data.some: .*val_0.JPEG: its class n99 has no folder to train on"):
        examples(source)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG n02\n")
    with pytest.raises(ConfigError, match="val_annotations.txt, line 1: expected a file's name, a tab"):
        examples(source)


def test_a_test_folder_with_labels_tests_and_val_tunes(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        for name, colour in {"a": RED, "b": BLUE}.items():
            for k in range(count):
                picture(tmp_path / part / name / f"{k}.png", colour)
    found = examples({"kind": "folder", "path": str(tmp_path), "image_size": 4})
    assert found.sizes() == {"train": 12, "tuning": 6, "test": 4}


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    source = {"kind": "folder", "path": str(tmp_path / "none"), "image_size": 4}
    with pytest.raises(ConfigError, match="data.some: path=.*none: there is no such folder; give one with a subfolder"):
        examples(source)
    source["path"] = str(tmp_path)
    with pytest.raises(ConfigError, match="0 subfolders; expected one for each of two or more classes"):
        examples(source)
    picture(tmp_path / "a" / "1.png", RED)
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="b: no image beneath the folder of this class; looked for .jpeg"):
        examples(source)
    (tmp_path / "b" / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ConfigError, match="broken.png: cannot be read as an image: .*; remove or replace it"):
        examples(source)


# ---- the Hub's layouts


def test_a_saved_dataset_and_a_folder_in_the_hubs_layout_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (5, 7), (RED, BLUE)[k % 2]) for k in range(40)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["red", "blue"])})
    rows = {"img": pictures, "kind": [k % 2 for k in range(40)]}
    one = datasets.Dataset.from_dict(rows, features=features)
    whole = datasets.DatasetDict({"train": one, "valid": one.select(range(6))})
    whole.save_to_disk(str(tmp_path / "saved"))
    source = {"kind": "hub", "name": str(tmp_path / "saved"), "image": "img", "label": "kind", "image_size": 4}
    found = examples({**source, "test": "valid"})
    assert found.classes == ("red", "blue") and found.shape == (3, 4, 4) and found.sizes()["test"] == 6
    assert found.test.inputs[1, :, 0, 0].tolist() == list(BLUE) and found.test.labels.tolist() == [0, 1] * 3
    with pytest.raises(ConfigError, match="saved, split test: cannot be read"):
        examples(source)
    with pytest.raises(ConfigError, match="no column 'image' in train; set image and label to two of img, kind"):
        examples({**source, "test": None, "image": "image"})
    one.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ConfigError, match="has one split; with test: null"):
        examples({**source, "name": str(tmp_path / "one")})
    with pytest.raises(ConfigError, match="'kind' holds int; expected a column of images"):
        examples({**source, "test": None, "image": "kind"})


# ---- torchvision


class Fake:
    """A data set as torchvision has them, of which `data` is given."""

    def __init__(self, data: Any, targets: Any) -> None:
        self.data, self.targets, self.classes = data, targets, ["a", "b"]


@pytest.mark.parametrize("kind", ["grey", "coloured"])
def test_a_torchvision_set_is_taken_with_its_own_test_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(1)
    asked = []

    def made(root: Path, train: bool, download: bool) -> Fake:
        asked.append((str(root), train, download))
        count = 40 if train else 6
        shape = (count, 6, 6) if kind == "grey" else (count, 6, 6, 3)
        data: Any = draws.integers(0, 256, shape, dtype=np.uint8)
        targets: Any = [k % 2 for k in range(count)]
        return Fake(torch.from_numpy(data), torch.tensor(targets)) if kind == "grey" else Fake(data, targets)

    package = SimpleNamespace(datasets=SimpleNamespace(MNIST=made, CIFAR10=made))
    monkeypatch.setattr(zoo, "opened", lambda why: package)
    source = {"kind": "torchvision", "name": "mnist" if kind == "grey" else "cifar10", "root": "somewhere"}
    found = examples(source)
    assert found.shape == ((1, 6, 6) if kind == "grey" else (3, 6, 6))
    assert found.sizes()["test"] == 6 and sum(found.sizes().values()) == 46
    assert asked == [("somewhere", True, False), ("somewhere", False, False)]
    other = examples({**source, "image_size": 3, "channels": 3 if kind == "grey" else 1})
    assert other.shape == ((3, 3, 3) if kind == "grey" else (1, 3, 3))


def test_mnist_is_read_from_its_own_files(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision: the extra `vision` brings it")
    source = {"kind": "torchvision", "name": "mnist", "root": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"data.some: mnist: not read: .*Looked for .*MNIST/raw/train-images"):
        examples(source)
    written = write_mnist(tmp_path, 60, 20)
    found = examples(source)
    assert np.array_equal(found.test.inputs[:, 0].numpy(), written["t10k"][0])
    assert found.test.labels.tolist() == written["t10k"][1].tolist() and len(everything(found)) == 80


def test_without_torchvision_it_is_said_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match=r"networks.deep: torchvision is needed and cannot be imported .*\[vision\]"):
        zoo.opened("networks.deep")
