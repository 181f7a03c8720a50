"""SentencePiece BPE with byte fallback: any text in, the same text out, byte for byte."""

import hashlib
import io
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from common.command import leaving_at_once
from common.errors import ConfigError
from common.files import read_bounded

UNK, BOS, EOS, PAD, MASK = range(5)

# SentencePiece writes a blank as U+2581, so the real character must go past it, as its bytes.
BLANK = "\u2581"
# Its trainer skips the whole sentence for a U+2585, ignores NUL and takes U+2581 for a blank.
RESERVED = re.compile("[\0\u2581\u2585]")
# Its trainer skips longer sentences, so documents come in pieces; the cut spoils one word in some thousands.
PIECE_CHARS = 16_000
# To look a word up is many times faster than to ask the library for its ids, and most words come again.
WORD = re.compile(" *[^ ]+| +")
MOST = 1 << 30  # bytes of a model file
KNOWN_CHARS = 1 << 23  # words with so many characters in all are remembered
# What models of others are known to change: blanks, line ends, capitals, compatibility forms, rare characters.
PROBES = (
    "one two",
    "a  b",
    " a",
    "a ",
    "a\nb",
    "a\tb",
    "A",
    "ﬁ ½",
    "e\u0301",
    "a\u3000b",
    "水",
    "🎉",
    "\0",
    "a▁b",
    "\ufeffa",
)
LATER_BLOCKS = (*range(0xE000, 0x10000, 256), *range(0x1F000, 0x20000, 256))  # behind the surrogates; emoji


def train(texts: Iterable[str], vocab_size: int, model_path: Path, nfkc: bool = False) -> None:
    """Trains a model on texts and writes it to `model_path`. The same texts give the same bytes.

    Args:
        texts: the sample; it is held in memory by the library, about ten times over.
        vocab_size: number of ids, with the 5 special ones and the 256 bytes.
        nfkc: encode text in Unicode's form NFKC; text that is not in that form does not come back exactly.
    Raises:
        ConfigError: the vocabulary is too large or too small for the sample.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        with leaving_at_once():  # the library makes its own error of what the texts raise
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_pieces(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                pad_id=PAD,
                control_symbols=["<mask>"],  # takes the next id, MASK; control symbols are never found in text
                normalization_rule_name="nfkc" if nfkc else "identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                required_chars=BLANK,  # text with few blanks must not cost the blank its piece
                max_sentence_length=4 * PIECE_CHARS,  # bytes
                num_threads=1,  # is written into the model, so the machine must not choose it
                minloglevel=2,
            )
    except RuntimeError as error:
        raise ConfigError(_why_untrained(str(error), vocab_size)) from None
    model_path.write_bytes(model.getvalue())


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in RESERVED.split(text):
            for start in range(0, len(part), PIECE_CHARS):
                yield part[start : start + PIECE_CHARS]


def _why_untrained(message: str, vocab_size: int) -> str:
    given = f"data.tokenizer.vocab_size={vocab_size}"
    if too_high := re.search(r"value <= (\d+)", message):
        return f"{given}: the text is too small for it; give more text or set it to {too_high[1]} or less"
    if too_low := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{given}: too small for 256 bytes, 5 specials and this text's characters; set {too_low[1]} or more"
    return f"{given}: SentencePiece cannot train a model on this text: {message.strip()}"


class _Words(dict[str, bytes]):
    """Ids of words, as int32, each asked of the library once."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode, self.chars = encode, 0

    def __missing__(self, word: str) -> bytes:
        self.chars += len(word)
        self[word] = ids = array("i", self._encode(word)).tobytes()
        return ids

    def clear(self) -> None:
        super().clear()
        self.chars = 0


class Tokenizer:
    """A trained SentencePiece model.

    Attributes: `vocab_size`, `sha256` of the model file, and the ids `unk_id`, `bos_id`, `eos_id`, `pad_id`, `mask_id`
    (None where a model of others lacks one).

    Raises:
        ConfigError: the file is missing, no SentencePiece model, or has no end-of-text id.
    """

    def __init__(self, model_path: str | Path) -> None:
        import sentencepiece

        try:
            model = read_bounded(Path(model_path), MOST)
        except OSError as error:
            raise ConfigError(
                f"{model_path}: the tokenizer cannot be read ({error}); give a SentencePiece model file"
            ) from None
        try:
            # It takes an empty model for "none given".
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
        except RuntimeError:
            raise ConfigError(
                f"{model_path}: not a SentencePiece model; give a .model file made by SentencePiece"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.unk_id: int = self._model.unk_id()
        self.bos_id = _id_or_none(self._model.bos_id())
        self.pad_id = _id_or_none(self._model.pad_id())
        self.mask_id = _id_or_none(self._special("<mask>"))
        eos_id = _id_or_none(self._model.eos_id())
        if eos_id is None:
            raise ConfigError(
                f"{model_path}: the model has no end-of-text id (eos), which ends every document; train with one"
            )
        self.eos_id: int = eos_id
        blank_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        self._blank_bytes = b""  # none: a model without byte fallback
        if self.unk_id not in blank_bytes:
            self._blank_bytes = array("i", blank_bytes).tobytes()
        # No piece has a blank behind another character, so text cut in front of blanks gives the same ids.
        whole = all(BLANK not in self.piece(i).lstrip(BLANK) for i in range(self.vocab_size))
        self._by_words = whole and bool(self._blank_bytes) and self._model.normalize("  ﬁ  a ") == "▁▁ﬁ▁▁a▁"
        self._words = _Words(self._model.encode)

    def _special(self, piece: str) -> int:
        index = self._model.piece_to_id(piece)
        return index if self._model.is_control(index) else -1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos; no text can produce a special id."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` without a Python object for each id: int32 (tokens,)."""
        parts = text.split(BLANK) if self._blank_bytes else [text]
        ids = self._blank_bytes.join(self._encode(part) for part in parts)
        if self._words.chars > KNOWN_CHARS:
            self._words.clear()
        return np.frombuffer(ids, dtype=np.int32)

    def _encode(self, text: str) -> bytes:
        words = WORD.findall(text) if self._by_words else [text]
        return b"".join(map(self._words.__getitem__, words))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids are left out, bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(i) for i in ids])

    def piece(self, index: int) -> str:
        """How an id is written, with U+2581 for a blank and <0x..> for a byte."""
        return self._model.id_to_piece(index)

    def changes(self) -> dict[str, str]:
        """Texts that do not come back as they were, and what comes back; none for a model that is exact."""
        blocks = ("".join(map(chr, range(start, start + 256))) for start in (*range(0, 0xD800, 256), *LATER_BLOCKS))
        changed = (c for block in blocks if self._changes(block) for c in block if self._changes(c))
        texts = [*(text for text in PROBES if self._changes(text)), *islice(changed, 1)]
        return {text: self.decode(self.encode(text)) for text in texts}

    def _changes(self, text: str) -> bool:
        return self.decode(self.encode(text)) != text

    def byte_ids(self) -> np.ndarray:
        """Ids of the single bytes that stand for what no other piece covers, int64 (ids,); 0 without byte fallback."""
        return np.array([i for i in range(self.vocab_size) if self._model.is_byte(i)], dtype=np.int64)


def _id_or_none(index: int) -> int | None:
    return None if index < 0 else index
