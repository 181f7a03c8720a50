"""What the transformers library makes of an exported folder equals the model: every distance, option and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.tokenizer import Tokenizer
from model.decoder import Decoder, document_positions
from model.head import HarmonicHead
from model.hf import folder as export
from model.reference import scores_reference
from model.sample import generate
from tests.support.checks import assert_no_worse
from tests.support.exports import (
    BACKBONES,
    EOS,
    MASKED,
    PAD,
    T,
    exported,
    make,
    tokens_of,
)
from tests.support.variants import VARIANTS, distance_of

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_modules")
from model.hf.modeling_overtone import OvertoneConfig, OvertoneHead  # noqa: E402

TOLERANCE = 1e-5
EXPONENTS: dict[str, Any] = {"learned": "learned", "a number": 9.0, "a ramp": {"first": 1.0, "last": 4.0}}


@torch.no_grad()
def log_probs(decoder: Decoder, head: HarmonicHead, tokens: Tensor) -> Tensor:
    positions = document_positions(tokens, EOS) if decoder.config.document_mask else None
    return head.log_probs(decoder(head.embed(tokens) if decoder.config.tied else tokens, positions))


@torch.no_grad()
def check(decoder: Decoder, head: HarmonicHead, folder: Path) -> Any:
    loaded, tokens = exported(decoder, head, folder), tokens_of()
    expected, found = log_probs(decoder, head, tokens), loaded(tokens).logits.log_softmax(-1)
    assert expected.std() > 0.05, "a test that could not fail"
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    return loaded


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_of_every_distance(variant: str, tmp_path: Path) -> None:
    params = {name: value for name, value in VARIANTS[variant].items() if name != "seed"}
    check(*make({}, {"distance": distance_of(variant), "params": params}), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_wide_heads_are_no_further_from_float64(variant: str) -> None:
    """Near a match, at one, far out and at the origin too."""
    params = {name: value for name, value in VARIANTS[variant].items() if name != "seed"}
    head = HarmonicHead(40, 512, distance=distance_of(variant), seed=1, **params).eval()
    torch.manual_seed(1)
    for name, weight in head.named_parameters():
        weight.add_(0.2 * torch.randn_like(weight) * (name != "prototypes"))
    x = torch.randn(8, 512) / 512**0.5
    x[:4] = torch.stack([head.prototypes[3], 1.0001 * head.prototypes[4], 30 * x[2], 0 * x[3]])
    theirs = OvertoneHead(OvertoneConfig(vocab_size=40, dim=512, **export.head_settings(head)))
    theirs.load_state_dict(head.state_dict())
    scores = scores_reference(x, head.prototypes, head.score_function, head.exponent)
    for found in (theirs(x), theirs(1e-20 * x) if head.score_function.scaled else theirs(x)):
        assert found.isfinite().all() and found.dtype == torch.float32
    assert_no_worse(theirs(x).log_softmax(-1), head.log_probs(x), scores.log_softmax(-1))


@pytest.mark.parametrize("kind", EXPONENTS)
def test_log_probabilities_of_every_exponent(kind: str, tmp_path: Path) -> None:
    decoder, head = make({}, {"exponent": EXPONENTS[kind]})
    head.progress = 0.5
    loaded = check(decoder, head, tmp_path)
    assert loaded.config.exponent == {"learned": None, "a number": 9.0, "a ramp": 2.5}[kind]


@pytest.mark.parametrize("distance", ["dot", "cosine", "cosine_softmax"])
def test_a_cap_is_a_part_of_the_model(distance: str, tmp_path: Path) -> None:
    """The other options are of training, and leave no trace."""
    options = {"soft_cap": 1.5, "label_smoothing": 0.1, "z_loss": 0.01}
    loaded = check(*make({}, {"distance": distance, "exponent": 6.0, **options}), tmp_path)
    assert loaded.config.soft_cap == 1.5
    assert loaded(tokens_of()).logits.abs().max() <= 1.5


@pytest.mark.parametrize("name", BACKBONES)
def test_log_probabilities_and_continuations_of_every_backbone(name: str, tmp_path: Path) -> None:
    decoder, head = make(BACKBONES[name])
    loaded, tokens = check(decoder, head, tmp_path), tokens_of()
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    cached = loaded.generate(tokens, **asked, output_logits=True)
    whole = loaded.generate(tokens, **asked, output_logits=True, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=TOLERANCE, rtol=1e-5)
    expected = log_probs(decoder, head, cached.sequences)[:, T - 1 : -1]
    found = torch.stack(cached.logits, 1).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    if not decoder.config.document_mask:  # whose own sampler takes rows of one document
        ours = generate(decoder, head, tokens, max_tokens=6, temperature=0)
        assert torch.equal(torch.stack(list(ours), 1), cached.sequences[:, T:])


@pytest.mark.parametrize("name", ["gpt2", "llama", "window", "rotary documents, tied"])
def test_padding_on_the_left_changes_nothing(name: str, tmp_path: Path) -> None:
    decoder, head = make(BACKBONES[name])
    loaded, tokens = exported(decoder, head, tmp_path), tokens_of(1)
    short = tokens[:, T - 5 :]
    padded = torch.cat([torch.cat([torch.full((1, T - 5), PAD), short], 1), tokens])
    mask = (padded != PAD).long()
    found = loaded.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    alone = loaded.generate(short, max_new_tokens=5, do_sample=False, eos_token_id=None)
    other = loaded.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(found[0, T:], alone[0, 5:]) and torch.equal(found[1], other[0])
    with torch.no_grad():
        logits = loaded(padded, attention_mask=mask).logits[0, T - 5 :]
        torch.testing.assert_close(logits, loaded(short).logits[0], atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "documents"])
def test_beams_and_samples(name: str, cache: str, tmp_path: Path) -> None:
    loaded = exported(*make(BACKBONES[name]), tmp_path)
    asked = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    beams = loaded.generate(tokens_of(), **asked, cache_implementation=cache)
    assert torch.equal(beams, loaded.generate(tokens_of(), **asked, use_cache=False))
    torch.manual_seed(1)
    begun = loaded.generate(do_sample=True, max_new_tokens=4)
    assert begun[0, 0] == EOS, "a new document"


@pytest.mark.parametrize("name", MASKED)
def test_masked_models(name: str, tmp_path: Path) -> None:
    decoder, head = make(MASKED[name], {"distance": "mahalanobis"})
    loaded, tokens = check(decoder, head, tmp_path), tokens_of()
    labels = torch.where(torch.arange(T) % 3 == 0, tokens, -100)
    with torch.no_grad():
        hidden = decoder(tokens)
        torch.testing.assert_close(loaded(tokens, labels=labels).loss, head(hidden, labels), atol=1e-5, rtol=0)
        padded = torch.nn.functional.pad(tokens, (0, 3), value=PAD)
        found = loaded(padded, attention_mask=(padded != PAD).long()).logits[:, :T]
        torch.testing.assert_close(found, loaded(tokens).logits, atol=TOLERANCE, rtol=1e-5)
        told = loaded(tokens, output_hidden_states=True).hidden_states
        assert len(told) == 3
        torch.testing.assert_close(told[-1], hidden, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "hamming gumbel"])
def test_losses_and_gradients(variant: str, tmp_path: Path) -> None:
    """It can be trained on: the gradient is the model's own."""
    params = {name: value for name, value in VARIANTS[variant].items() if name != "seed"}
    decoder, head = make({}, {"distance": distance_of(variant), "params": params, "exponent": "learned"})
    loaded, tokens = exported(decoder, head, tmp_path), tokens_of()
    loss = head(decoder(tokens)[:, :-1], tokens[:, 1:])
    loss.backward()
    theirs = loaded(tokens, labels=tokens)
    theirs.loss.backward()
    torch.testing.assert_close(theirs.loss, loss, atol=1e-5, rtol=0)
    found = dict(loaded.named_parameters())
    for part, module in (("decoder", decoder), ("head", head)):
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[f"{part}.{name}"].grad, p.grad, atol=2e-5, rtol=1e-3)


def test_saved_again_and_in_bfloat16(tmp_path: Path) -> None:
    loaded = exported(*make(BACKBONES["tied"]), tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    auto = transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True)
    half = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(tokens_of()).logits, loaded(tokens_of()).logits)
        assert half.head.prototypes.dtype == half(tokens_of()).logits.dtype == torch.float32
        assert half.decoder.blocks[0].mlp.up.weight.dtype == torch.bfloat16
        assert (half(tokens_of()).logits - loaded(tokens_of()).logits).abs().max() < 0.2


def test_a_distance_that_this_code_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="distance='lorentz': this code knows dot, euclidean, .*; export anew"):
        OvertoneHead(OvertoneConfig(distance="lorentz"))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    loaded = exported(*make(BACKBONES["documents"]), tmp_path)
    with pytest.raises(ValueError, match="33 positions given, the decoder has 32"):
        loaded(torch.zeros(1, 33, dtype=torch.long))
    cache = transformers.DynamicCache(config=loaded.config)
    loaded(tokens_of(), past_key_values=cache)
    with pytest.raises(ValueError, match="needs position_ids with a cache"):
        loaded(tokens_of()[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask is"):
        loaded(tokens_of(), attention_mask=torch.zeros(2, 3))


@pytest.fixture(scope="module")
def tokenizers(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = vocabulary.parent
    export.write(folder, *make({}), EOS, PAD, card="")
    return Tokenizer(vocabulary), transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


ODD = [
    "",
    " ",
    "a\u2581b",
    "\u2581",
    "<mask></s><s><pad><unk>",
    "<0x41>",
    "\0\r\n",
    "  two  blanks ",
    "\u2585 ﬁ🙂\ufffd",
    "aaaaaaa",
]


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.sampled_from(ODD), st.text(), st.text("a ▁é🙂1\0", max_size=12)))
def test_any_text_has_the_same_ids_and_comes_back(tokenizers, text: str) -> None:
    ours, theirs = tokenizers
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.convert_tokens_to_ids(theirs.tokenize(text)) == ids
    assert theirs.convert_tokens_to_string(theirs.tokenize(text)) == text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 309), max_size=12))
def test_any_ids_have_the_same_text(tokenizers, ids: list[int]) -> None:
    ours, theirs = tokenizers
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens(tokenizers, tmp_path: Path) -> None:
    ours, theirs = tokenizers
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert (theirs.unk_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (0, 2, 3, 4)
    assert theirs.bos_token_id == theirs.eos_token_id, "what opens a document"
    assert set(theirs.all_special_ids) == {0, 1, 2, 3, 4}
    assert [theirs.convert_ids_to_tokens(i) for i in range(310)] == [ours.piece(i) for i in range(310)]
    assert theirs.decode([2, *ours.encode("a b"), 4]) == "</s>a b<mask>"
    batch = theirs(["a", "a harmonic loss"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0 and batch["input_ids"][0, 0] == PAD
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True, add_bos_token=True)
    assert (tmp_path / "tokenizer.model").read_bytes() == (Path(theirs.name_or_path) / "tokenizer.model").read_bytes()
    assert again("a <mask>")["input_ids"] == [2, *ours.encode("a <mask>")]
    assert again("<mask>", split_special_tokens=False)["input_ids"] == [2, 4]
