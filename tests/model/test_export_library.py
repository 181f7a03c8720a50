"""Exported folders with every version of the library: names of the cache, arguments that nobody knows, saving again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from model.hf import folder as export
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

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_modules")
NAMES = ("past_key_values", "cache")
INSTALLED = "cache" if hasattr(transformers.modeling_outputs.CausalLMOutputWithPast, "cache") else "past_key_values"
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1}
FILES = {"tokenization_overtone.py", "tokenizer.model", "tokenizer_config.json"}
TEXT = "a <tool> b <mask></s><s> x"
OPTIONS: dict[str, dict[str, Any]] = {
    "add_bos_token": {"add_bos_token": True},
    "split_special_tokens": {"split_special_tokens": False},
    "both": {"split_special_tokens": False, "add_bos_token": True},
    "extra": {"extra_special_tokens": ["<tool>"], "split_special_tokens": False},
    "extra ones with names": {"extra_special_tokens": {"tool_token": "<tool>"}, "split_special_tokens": False},
    "a token of its own": {"tool_token": "<tool>", "split_special_tokens": False},
    "the early name": {"additional_special_tokens": ["<tool>"], "split_special_tokens": False},
    "cls_token": {"cls_token": "<tool>", "split_special_tokens": False},
    "eos_token": {"eos_token": "<s>", "add_bos_token": True},
    "sides": {"padding_side": "right", "truncation_side": "left", "model_max_length": 7},
    "inputs": {"model_input_names": ["input_ids"]},
    "types": {"token_type_ids_pattern": "all_zeros", "token_type_ids_include_special_tokens": False},
    "chat": {"chat_template": "{{ messages[0]['content'] }}"},
}


@pytest.fixture
def tokenizer_folder(vocabulary: Path) -> Path:
    export.write(vocabulary.parent, *make({}), EOS, PAD, card="")
    return vocabulary.parent


def load_tokenizer(folder: Path, **options: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_goes_by_either_name(name: str, tmp_path: Path) -> None:
    loaded, tokens = exported(*make(BACKBONES["llama"]), tmp_path), tokens_of()
    first = loaded(tokens[:, :-1])
    assert [name for name, _ in first.items() if name in NAMES] == [INSTALLED]
    rest = loaded(tokens[:, -1:], **{name: first[INSTALLED]})
    assert rest[INSTALLED] is first[INSTALLED] and rest[INSTALLED].get_seq_length() == T
    torch.testing.assert_close(rest.logits, loaded(tokens).logits[:, -1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="past_key_values and cache are two names of one argument"):
        loaded(tokens[:, -1:], **dict.fromkeys(NAMES, first[INSTALLED]))


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_from_a_cache_by_either_name(name: str, tmp_path: Path) -> None:
    loaded, tokens = exported(*make(BACKBONES["llama"]), tmp_path), tokens_of()
    cache = transformers.DynamicCache(config=loaded.config)
    expected = loaded.generate(tokens, **GREEDY, use_cache=False)
    assert torch.equal(loaded.generate(tokens, **GREEDY, **{name: cache}), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    with pytest.raises(TypeError, match="two names of one argument"):
        loaded.generate(tokens, **GREEDY, **dict.fromkeys(NAMES, cache))


@pytest.mark.parametrize("name", ["llama", "window", "documents", "rotary documents, tied"])
def test_drafts_of_another_model_change_nothing(name: str, tmp_path: Path) -> None:
    loaded = exported(*make(BACKBONES[name]), tmp_path / "large")
    drafts = exported(*make({**BACKBONES[name], "layers": 1}), tmp_path / "small")
    tokens = tokens_of(1)
    expected = loaded.generate(tokens, **GREEDY, use_cache=False)
    assert torch.equal(loaded.generate(tokens, **GREEDY, assistant_model=drafts), expected)
    assert torch.equal(loaded.generate(tokens, **GREEDY, prompt_lookup_num_tokens=2), expected)


def test_a_document_mask_refuses_what_would_hide_where_documents_begin(tmp_path: Path) -> None:
    loaded, tokens = exported(*make(BACKBONES["documents"]), tmp_path), tokens_of()
    with pytest.raises(ValueError, match="position_ids: a model with document_mask counts them"):
        loaded.generate(tokens, **GREEDY, position_ids=torch.arange(T)[None])
    cache = transformers.DynamicCache(config=loaded.config)
    loaded(tokens, cache=cache)
    with pytest.raises(ValueError, match="prefill_chunk_size: .* needs the whole row"):
        loaded.prepare_inputs_for_generation(tokens[:, :4], **{INSTALLED: cache})


@pytest.mark.parametrize("unknown", ["foo", "past_key_value", "is_causal", "cu_seq_lens_q", "token_type_ids", "caches"])
def test_arguments_that_nobody_knows_are_refused(unknown: str, tmp_path: Path) -> None:
    causal = exported(*make({}), tmp_path / "causal")
    masked = exported(*make(MASKED["bert"]), tmp_path / "masked")
    for model in (causal, masked):
        with pytest.raises(TypeError, match=unknown):
            model(tokens_of(), **{unknown: torch.ones(1)})
    with pytest.raises((TypeError, ValueError), match=unknown):  # some by the library
        causal.generate(tokens_of(), **GREEDY, **{unknown: torch.ones(1)})
    with pytest.raises(TypeError, match=unknown):
        causal.create_masks_for_generate(None, **{unknown: torch.ones(1)})
    with pytest.raises(TypeError, match="past_key_values|cache"):
        masked(tokens_of(), **{INSTALLED: transformers.DynamicCache()})


def test_arguments_that_ask_for_what_is_not_there(tmp_path: Path) -> None:
    """The library's callers name them at every call: only a value that asks for something is refused."""
    for kind, settings in {"causal": {}, "masked": MASKED["bert"]}.items():
        loaded, tokens = exported(*make(settings), tmp_path / kind), tokens_of()
        named: dict[str, Any] = {"inputs_embeds": None, "output_attentions": False, "return_dict": True}
        assert torch.equal(loaded(tokens, **named).logits, loaded(tokens).logits)
        with pytest.raises(ValueError, match="output_attentions=True: attention weights are not given out"):
            loaded(tokens, output_attentions=True)
        with pytest.raises(ValueError, match="inputs_embeds: the model takes token ids"):
            loaded(tokens, inputs_embeds=torch.zeros(2, T, 32))
        assert isinstance(loaded(tokens, return_dict=False), tuple)
        loaded.config.return_dict = False
        assert isinstance(loaded(tokens), tuple) and not isinstance(loaded(tokens, return_dict=True), tuple)


def test_a_trainer_divides_the_loss_itself(tmp_path: Path) -> None:
    for kind, settings in {"causal": {}, "masked": MASKED["bert"]}.items():
        loaded, tokens = exported(*make(settings), tmp_path / kind), tokens_of()
        assert loaded.accepts_loss_kwargs and set(NAMES) <= set(loaded.config.keys_to_ignore_at_inference)
        assert transformers.utils.generic.find_labels(type(loaded)) == ["labels"], "what a batch must have for a loss"
        labels = torch.where(torch.arange(T) % 2 == 0, tokens, -100)
        count = int((labels[:, 1:] if kind == "causal" else labels).ne(-100).sum())
        mean, total = loaded(tokens, labels=labels).loss, loaded(tokens, labels=labels, num_items_in_batch=1).loss
        torch.testing.assert_close(total, mean * count)
        ignoring = torch.where(labels == -100, PAD, labels)
        torch.testing.assert_close(loaded(tokens, labels=ignoring, ignore_index=PAD).loss, mean)
        if kind == "causal":
            moved = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            torch.testing.assert_close(loaded(tokens, shift_labels=moved).loss, mean)


@pytest.mark.parametrize("kind", ["rotary documents, tied", "llama", "bert"])
def test_a_folder_saved_twice_holds_its_code_and_its_options(kind: str, vocabulary: Path, tmp_path: Path) -> None:
    out = tmp_path / "saved0"
    loaded = exported(*make({**BACKBONES, **MASKED}[kind], {"distance": "minkowski", "params": {"p": 3.0}}), out)
    (out / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    auto = transformers.AutoModelForMaskedLM if kind in MASKED else transformers.AutoModelForCausalLM
    options = {"use_cache": False, "output_hidden_states": True, "dropout": 0.25, "pad_token_id": 4}
    first = auto.from_pretrained(out, trust_remote_code=True, **options)
    tokenizer = load_tokenizer(out, add_bos_token=True)
    ids, tokens = tokenizer("one 42")["input_ids"], tokens_of()
    model, own = first, set(export.decoder_settings(make({})[0].config)) | {"distance_params", "distance", *options}
    for number in (1, 2):
        out = tmp_path / f"saved{number}"
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        for name in ("modeling_overtone.py", "tokenization_overtone.py"):
            assert (out / name).read_bytes() == (export.CODE / name).read_bytes()
        model = auto.from_pretrained(out, trust_remote_code=True)
        tokenizer = load_tokenizer(out)
        assert tokenizer("one 42")["input_ids"] == ids
        assert {name: getattr(model.config, name) for name in own} == {
            name: getattr(first.config, name) for name in own
        }
        with torch.no_grad():
            found = model(tokens)
            assert torch.equal(found.logits, loaded(tokens).logits) and len(found.hidden_states) == 3
        if kind not in MASKED:
            assert model.generation_config.eos_token_id == EOS
            assert torch.equal(model.generate(tokens, **GREEDY), loaded.generate(tokens, **GREEDY))


def state_of(tokenizer: Any) -> dict[str, Any]:
    batch = tokenizer(["a", "a harmonic loss, one and"], padding=True, truncation=True)
    names = ["special_tokens_map", "all_special_ids", "padding_side", "truncation_side", "model_max_length"]
    names += ["split_special_tokens", "add_bos_token", "model_input_names", "chat_template", "extra_special_tokens"]
    names += ["token_type_ids_pattern", "token_type_ids_include_special_tokens"]
    told = {name: getattr(tokenizer, name) for name in names}
    ids = tokenizer(TEXT)["input_ids"]
    texts = [tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]
    return {**told, "ids": ids, "batch": dict(batch), "texts": texts, "vocabulary": tokenizer.get_vocab()}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_of_a_tokenizer_survive_saving(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    one = load_tokenizer(tokenizer_folder, **OPTIONS[kind])
    plain, expected = state_of(load_tokenizer(tokenizer_folder)), state_of(one)
    assert plain != expected, "an option that does something"
    assert {0, 1, 2, 3, 4} <= set(expected["all_special_ids"])
    for number in (1, 2):
        one.save_pretrained(tmp_path / str(number))
        assert {path.name for path in (tmp_path / str(number)).iterdir()} >= FILES
        one = load_tokenizer(tmp_path / str(number))
        assert state_of(one) == expected


def test_what_was_set_later_is_saved_and_can_be_undone(tokenizer_folder: Path, tmp_path: Path) -> None:
    one = load_tokenizer(tokenizer_folder)
    plain = one("The")["input_ids"]
    one.add_bos_token = True
    one.add_tokens(["<tool>"], special_tokens=True)
    assert one("The")["input_ids"] == [EOS, *plain]
    one.save_pretrained(tmp_path)
    again, undone = load_tokenizer(tmp_path), load_tokenizer(tmp_path, add_bos_token=False)
    assert again.add_bos_token and again("The")["input_ids"] == [EOS, *plain]
    assert again.convert_tokens_to_ids("<tool>") == one.convert_tokens_to_ids("<tool>") == one.vocab_size
    assert not undone.add_bos_token and undone("The")["input_ids"] == plain


def test_a_tokenizer_refuses_what_it_would_drop(tokenizer_folder: Path) -> None:
    one = load_tokenizer(tokenizer_folder)
    for call in (one, one.tokenize, one.encode, lambda text, **more: one([text, text], **more)):
        with pytest.raises(TypeError, match="foo=1: not known to this tokenizer"):
            call("x", foo=1)
    with pytest.raises(TypeError, match="return_offsets_mapping=True"):
        one("x", return_offsets_mapping=True)
    for decode in (one.decode, lambda ids, **more: one.batch_decode([ids], **more)):
        with pytest.raises(TypeError, match="foo"):
            decode([5], foo=1)
    assert one.decode(one("a ?")["input_ids"], clean_up_tokenization_spaces=True) == "a ?"
    with pytest.raises(TypeError, match="add_eos_token: this tokenizer adds nothing"):
        load_tokenizer(tokenizer_folder, add_eos_token=True)
    with pytest.raises(ValueError, match="special_tokens_pattern='eos': expected bos or none"):
        load_tokenizer(tokenizer_folder, special_tokens_pattern="eos")
    with pytest.raises(ValueError, match="clean_up_tokenization_spaces=True: texts come back"):
        load_tokenizer(tokenizer_folder, clean_up_tokenization_spaces=True)
    with pytest.warns(UserWarning, match="paddng_side: no option of this tokenizer"):
        load_tokenizer(tokenizer_folder, paddng_side="right")


def test_bytes_are_not_joined_over_a_special_id(tokenizer_folder: Path) -> None:
    ours, theirs = Tokenizer(tokenizer_folder / "tokenizer.model"), load_tokenizer(tokenizer_folder)
    ids = theirs.convert_tokens_to_ids(["<0xC2>", "<s>", "<0x80>"])
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == "\ufffd\ufffd"
