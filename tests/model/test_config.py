"""What DecoderConfig and HeadConfig count is what is built and kept."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from model.config import DecoderConfig, HeadConfig
from model.decoder import Decoder, document_positions
from model.distance_settings import SETTINGS
from model.distances import DISTANCES
from model.head import HarmonicHead
from pretrain.optim import kind_of
from tests.support.decoders import decoder_settings

HEADS: list[dict[str, Any]] = [
    {"distance": distance, "exponent": exponent, "params": params}
    for exponent in ("sqrt_dim", "learned", 3.0, None)
    for distance, params in (
        ("euclidean", {}), ("dot", {}), ("minkowski", {"p": 3.0}), ("mahalanobis", {}),
        ("mahalanobis", {"factor": "full"}), ("cosine_softmax", {}),
    )
]  # fmt: skip


def test_a_start_is_the_distances_own_or_what_is_asked() -> None:
    own = HarmonicHead(2048, 64, distance="dot", seed=1)
    assert own.init_std == own.score_function.start(64).entry_std
    assert own.prototypes.std().item() == pytest.approx(own.init_std, rel=0.01)
    named = HarmonicHead(
        2048, 64, seed=1, **HeadConfig(distance="dot", init_std="gpt2", feature_length=3.0).arguments()
    )
    assert named.prototypes.std().item() == pytest.approx(0.02, rel=0.01)
    assert named.feature_length == 3.0
    assert HeadConfig(distance="dot", feature_length=3.0).hidden_length(64) == 3.0
    assert HeadConfig(distance="dot").hidden_length(64) == own.feature_length
    for wrong in ("gpt3", 0.0, -1.0):
        with pytest.raises(ValueError, match="init_std"):
            HeadConfig(init_std=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"init_std={wrong!r}: expected a positive number, or gpt2"):
            HarmonicHead(4, 4, init_std=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="feature_length"):
        HeadConfig(feature_length=0.0)


@settings(max_examples=100, deadline=None)
@given(decoder_settings())
def test_weights_are_those_of_the_built_decoder_in_its_order(tree: dict[str, Any]) -> None:
    config = DecoderConfig(**tree)
    with torch.device("meta"):
        decoder = Decoder(config)
    built = [(name, tuple(parameter.shape)) for name, parameter in decoder.named_parameters()]
    assert [(weight.name, weight.shape) for weight in config.weights()] == built
    assert config.parameters() == sum(parameter.numel() for parameter in decoder.parameters())
    for weight in config.weights():
        owner, short = decoder.get_submodule(weight.module), weight.name.rpartition(".")[2]
        assert weight.kind == kind_of(owner, short, decoder.get_parameter(weight.name))


@settings(max_examples=50, deadline=None)
@given(decoder_settings())
def test_modules_run_in_the_order_that_is_told(tree: dict[str, Any]) -> None:
    config = DecoderConfig(**tree | {"activation_checkpointing": False})
    decoder, ran = Decoder(config), []
    for name in config.modules():
        decoder.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    tokens = torch.zeros(1, config.seq_len, dtype=torch.int64)
    inputs = torch.zeros(1, config.seq_len, config.dim) if config.tied else tokens
    decoder(inputs, document_positions(tokens, 3) if config.document_mask else None)
    reads_table = not config.document_mask  # the decoder takes its rows without asking the module
    assert ran == [name for name in config.modules() if not (reads_table and name == "positions")]
    assert set(config.modules()) == {weight.module for weight in config.weights()}


@settings(max_examples=50, deadline=None)
@given(decoder_settings())
@pytest.mark.slow
def test_operations_are_those_that_are_counted(tree: dict[str, Any]) -> None:
    config = DecoderConfig(**tree | {"window": None, "document_mask": False, "activation_checkpointing": False})
    with torch.device("meta"):
        decoder, head = Decoder(config), torch.nn.Linear(config.dim, config.vocab_size, bias=False)
        shape = (2, config.seq_len)
        inputs = torch.zeros(*shape, config.dim, requires_grad=True) if config.tied else torch.zeros(shape).long()
        hidden = decoder(inputs)
    with FlopCounterMode(display=False) as trunk:
        hidden = decoder(inputs)
        hidden.sum().backward()
    with FlopCounterMode(display=False) as own:
        head(hidden.detach().requires_grad_()).sum().backward()
    tokens = 2 * config.seq_len
    assert own.get_total_flops() == config.head_flops_per_token() * tokens
    assert trunk.get_total_flops() + own.get_total_flops() == config.flops_per_token() * tokens


@pytest.mark.parametrize("tree", HEADS, ids=str)
def test_parameters_of_a_head_are_those_of_the_built_one(tree: dict[str, Any]) -> None:
    config = HeadConfig(**tree)
    head = HarmonicHead(67, 12, device="meta", seed=0, **config.arguments())
    assert config.parameters(67, 12) == {name: parameter.numel() for name, parameter in head.named_parameters()}


TORCHLESS = """
import sys
from model.config import HeadConfig
assert HeadConfig(distance="mahalanobis", params={"factor": "full"}).parameters(67, 12)["factor"] == 144
try:
    HeadConfig(distance=sys.argv[1], params={sys.argv[2]: -1.0} if sys.argv[2:] else {})
except ValueError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["euclidian", ""], "distance='euclidian': expected one of euclidean, manhattan, chebyshev, minkowski, cosine"),
        (["euclidean", "p"], "p=-1.0: euclidean takes no parameter"),
        (["minkowski", "p"], "p=-1.0: expected a positive number"),
        (["mahalanobis", "factor"], "factor=-1.0: expected diagonal or full"),
    ],
    ids=str,
)
def test_a_head_is_checked_without_torch(words: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-c", TORCHLESS, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and message in done.stdout, done.stdout + done.stderr


def test_every_distance_has_settings() -> None:
    assert list(SETTINGS) == list(DISTANCES)
    for name, kind in DISTANCES.items():
        for told in ("has_exponent", "exponent", "scaled", "degree", "first_exponent"):
            assert getattr(kind, told) == getattr(SETTINGS[name], told), (name, told)


def test_an_exponent_that_is_left_out_is_the_distances_own() -> None:
    """In the settings too, where it has a word: who names it has the same run, and so has a run of before."""
    words = {name: HeadConfig(distance=name).exponent for name in SETTINGS}
    assert words.pop("cosine_softmax") == "learned" and words.pop("squared_euclidean_softmax") is None
    assert set(words.values()) == {"sqrt_dim"}
    assert HeadConfig() == HeadConfig(exponent="sqrt_dim") == HeadConfig(exponent=None)
    for name, first in (("cosine_softmax", 4.0), ("squared_euclidean_softmax", 1.0)):
        for exponent, learned in (
            (None, name == "cosine_softmax"),
            ("learned", True),
            ("sqrt_dim", False),
            (3.0, False),
        ):
            config = HeadConfig(distance=name, exponent=exponent)
            head = HarmonicHead(5, 16, seed=0, **config.arguments())
            assert (head.log_exponent is not None) == learned == ("log_exponent" in config.parameters(5, 16))
            expected = {"sqrt_dim": 4.0, 3.0: 3.0}.get(exponent, first)
            assert torch.as_tensor(head.exponent).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="distance='x': expected one of"):
        HeadConfig(distance="x")
