"""Tokenizer: any text comes back byte for byte; no text makes a special id; training is deterministic."""

import re
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from data import tokenizer as module
from data.tokenizer import Tokenizer, train

TEXTS = [text for _, text in sorted(topics.items())][:30]
VOCAB = 512
SPECIAL = set(range(5))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(TEXTS, VOCAB, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_path) -> Tokenizer:
    return Tokenizer(model_path)


def test_ids(tokenizer):
    ids = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.decode([1, 2, 3, 4]) == ""


characters = st.text(st.characters(exclude_categories=["Cs"])) | st.text("\n\t\r ▁▅a1<>")


@settings(max_examples=400, deadline=None)
@given(characters)
@example("\n\n\n  \t\t    a  b \n ")
@example(" leading and trailing ")
@example("▁ ▁a▁▁ ▅ \ufffd ⁇ \ufeff")
@example("\0\0a\0")
@example("👩‍👩‍👧‍👦 🇪🇺 e\u0301 é ﬁ Ⅳ ½ ｆｕｌｌ")
@example("\r\n\x0b\x0c\x85\u2028\u3000")
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not SPECIAL & set(ids)
    assert all(0 <= i < VOCAB for i in ids)
    assert tokenizer.encode(text) == ids  # as remembered


FEW_BLANKS = {
    "Han": ["".join(chr(0x4E00 + (7 * n + m * m) % 151) for m in range(300)) for n in range(60)],
    "DNA": ["".join("ACGT"[(n * m + m // 3) % 4] for m in range(400)) for n in range(40)],
    "one blank": ["アイウエオ" * 200 + " " + "カキクケコ" * 2000] * 20,
    "blanks alone": [" " * n for n in range(1, 2000, 7)],
    "line ends": ["a\n\tb\n" * 300] * 20,
    "reserved": ["▁▅\0x" * 500] * 20,
}


@pytest.fixture(scope="module", params=FEW_BLANKS)
def of_few_blanks(tmp_path_factory, request) -> Tokenizer:
    path = tmp_path_factory.mktemp("few") / "m"
    try:
        train(FEW_BLANKS[request.param], 266, path)
    except ConfigError as error:  # as many as the sample needs
        train(FEW_BLANKS[request.param], int(re.search(r"set (?:it to )?(\d+) or", str(error))[1]), path)
    return Tokenizer(path)


@settings(max_examples=150, deadline=None)
@given(characters)
@example("one two")
@example(" ")
@example("    ")
@example(" \n \t ")
@example("▁ ▁a▁▁ ▅ \0 \ufffd ⁇ \ufeff")
@example("👩‍👩‍👧‍👦 \U000f0000 \U0010ffff \ue000 ꙮ नमस्ते ไทย العربية \x7f\x80\x1b")
@example("ＡＣＧＴ 休买ア 佉 ")
def test_any_text_round_trips_whatever_the_tokenizer_was_trained_on(of_few_blanks, text):
    assert of_few_blanks.decode(of_few_blanks.encode(text)) == text


def test_a_model_trained_here_changes_no_character(of_few_blanks, tokenizer):
    assert of_few_blanks.changes() == tokenizer.changes() == {}


def test_a_model_of_others_that_changes_text_says_what(tmp_path):
    import sentencepiece

    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    for number, (given_settings, changed) in enumerate(
        (
            ({**exact, "add_dummy_prefix": False}, set()),
            (exact, {"a▁b"}),  # the reserved character alone
            ({**exact, "add_dummy_prefix": False, "byte_fallback": False}, {"水", "🎉", "\0"}),
            ({**exact, "remove_extra_whitespaces": True}, {"a  b", " a", "a "}),
            ({**exact, "normalization_rule_name": "nmt_nfkc_cf"}, {"A", "ﬁ ½", "e\u0301", "a\tb", "a\nb", "a\u3000b"}),
            ({**exact, "normalization_rule_name": "", "normalization_rule_tsv": rule(tmp_path)}, {"Ω"}),
        )
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / str(number)), vocab_size=400,
            model_type="bpe", hard_vocab_limit=False, minloglevel=2, **given_settings,
        )  # fmt: skip
        found = Tokenizer(tmp_path / f"{number}.model").changes()
        assert changed <= set(found) and bool(changed) == bool(found)
        assert all(text != back for text, back in found.items())


def rule(folder: Path) -> str:
    """A rule of one's own: Ω is written W."""
    (folder / "rule.tsv").write_text("3A9\t57\n")
    return str(folder / "rule.tsv")


def test_text_stays_as_it_is_unless_a_normal_form_is_asked_for(tokenizer, tmp_path):
    text = "ﬁ Ⅳ  ｆｕｌｌ ①"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    train(TEXTS, VOCAB, tmp_path / "m", nfkc=True)
    normal = Tokenizer(tmp_path / "m")
    assert not normal._by_words
    assert normal.decode(normal.encode(text)) == unicodedata.normalize("NFKC", text) == "fi IV  full 1"


def test_what_no_piece_covers_becomes_bytes(tokenizer):
    ids = tokenizer.encode("☃")
    assert [tokenizer.piece(i) for i in ids[-3:]] == ["<0xE2>", "<0x98>", "<0x83>"]
    assert set(ids) <= set(tokenizer.byte_ids().tolist()) and len(tokenizer.byte_ids()) == 256


def test_names_of_specials_are_plain_text(tokenizer):
    for text in ("<mask>", "<s></s>", "<unk>", "<pad>", "a <mask> b", "<0x0A>", "</s>\n</s>"):
        ids = tokenizer.encode(text)
        assert len(ids) > 1 and not SPECIAL & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<0x0A>") != tokenizer.encode("\n")


def test_text_that_names_specials_can_be_trained_on(tmp_path):
    train([*TEXTS, "<mask> </s> <s> " * 1000], VOCAB, tmp_path / "m")
    tokenizer = Tokenizer(tmp_path / "m")
    assert tokenizer.mask_id == 4
    assert not SPECIAL & set(tokenizer.encode("<mask> </s> <s> <mask>"))


@settings(max_examples=200, deadline=None)
@given(characters.filter(lambda text: "▁" not in text))
@example("".join(TEXTS[:5]))
@example("")
@example(" ")
@example("a  b   c    \n  d ")
def test_words_that_are_looked_up_give_the_library_s_ids(model_path, tokenizer, text):
    import sentencepiece

    assert tokenizer._by_words
    array = tokenizer.encode_array(text)
    assert array.dtype == np.int32
    assert array.tolist() == sentencepiece.SentencePieceProcessor(model_file=str(model_path)).encode(text)


def test_few_words_are_remembered(model_path, monkeypatch):
    monkeypatch.setattr(module, "KNOWN_CHARS", 100)
    forgetful = Tokenizer(model_path)
    for text in (*TEXTS[:3], *TEXTS[:3]):
        assert forgetful.decode(forgetful.encode(text)) == text
        assert forgetful._words.chars <= 100


def test_models_of_others_are_asked_for_whole_texts(tmp_path):
    import sentencepiece

    for number, settings_of_others in enumerate(
        (
            {"add_dummy_prefix": True, "byte_fallback": True},
            {"split_by_whitespace": False, "byte_fallback": True, "normalization_rule_name": "identity"},
            {"byte_fallback": False},
        )
    ):
        prefix = tmp_path / str(number)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["to be or not to be"] * 200 + TEXTS[:3]), model_prefix=str(prefix), vocab_size=400,
            model_type="bpe", hard_vocab_limit=False, minloglevel=2, **settings_of_others,
        )  # fmt: skip
        raw = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
        tokenizer = Tokenizer(f"{prefix}.model")
        assert not tokenizer._by_words
        for text in ("to be or  not to be", "", " a b "):
            assert tokenizer.encode(text) == raw.encode(text)


def test_digits_are_split_and_runs_of_blanks_are_not(tokenizer, tmp_path):
    train([*TEXTS, " 2026" * 2000], VOCAB, tmp_path / "m")
    assert len(Tokenizer(tmp_path / "m").encode("2026")) == 4
    assert len(tokenizer.encode("a" + " " * 16 + "b")) < 6


def test_text_is_compressed(tokenizer):
    text = "\n".join(TEXTS)
    assert 1.6 < len(text.encode()) / len(tokenizer.encode(text)) < 8


def test_training_is_deterministic(model_path, tokenizer, tmp_path):
    train(iter(TEXTS), VOCAB, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == model_path.read_bytes()
    assert Tokenizer(tmp_path / "again").sha256 == tokenizer.sha256


@pytest.mark.parametrize("reserved", ["", "▅", "\0", "▁"])
def test_no_part_of_a_document_is_dropped(tmp_path, monkeypatch, reserved):
    """A word that occurs only at the far end of a document longer than the library's limit becomes a piece."""
    monkeypatch.setattr(module, "PIECE_CHARS", 1000)
    text = "".join(TEXTS)[:50_000] + (" Quetzalcoatl" + reserved) * 2000
    train([text], VOCAB, tmp_path / "m")
    assert len(Tokenizer(tmp_path / "m").encode(" Quetzalcoatl")) == 1


def test_a_vocabulary_too_large_or_too_small_for_the_text(tmp_path):
    with pytest.raises(ConfigError, match=r"vocab_size=5000: the text is too small for it; .* set it to \d+ or less"):
        train(["a few words of text"], 5000, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"vocab_size=100: too small for .*; set 3\d\d or more"):
        train(TEXTS, 100, tmp_path / "m")
    with pytest.raises(ConfigError, match="cannot train"):
        train([], 300, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\0" * 64, None])
def test_what_is_no_model_is_refused(tmp_path, model_path, content):
    path = tmp_path / "m"
    path.write_bytes(model_path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        Tokenizer(path)


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer(tmp_path / "none")


def test_a_model_without_eos_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:5]), model_prefix=str(tmp_path / "m"), vocab_size=250, eos_id=-1, minloglevel=2
    )
    with pytest.raises(ConfigError, match="no end-of-text id"):
        Tokenizer(tmp_path / "m.model")
