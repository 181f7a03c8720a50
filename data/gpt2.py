"""GPT-2's ids and its vocabulary file, which tells the byte string of each."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from common.errors import ConfigError
from common.files import read_bounded
from common.strict_json import from_json

VOCAB_SIZE, EOS = 50257, 50256
MOST = 1 << 26  # bytes of its file


class Gpt2Vocabulary:
    """The byte string of each GPT-2 id, from a vocab.json.

    Raises:
        ConfigError: the file cannot be read or is not such a vocabulary.
    """

    def __init__(self, path: Path) -> None:
        try:
            ids = from_json(read_bounded(path, MOST).decode())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); give GPT-2's vocab.json or encoder.json") from None
        whole = isinstance(ids, dict) and all(type(number) is int for number in ids.values())
        if not whole or sorted(ids.values()) != list(range(VOCAB_SIZE)):
            raise ConfigError(f"{path}: not GPT-2's vocabulary, which maps {VOCAB_SIZE:,} pieces to the ids from 0 on")
        if ids.get("<|endoftext|>") != EOS:
            raise ConfigError(f"{path}: <|endoftext|> is {ids.get('<|endoftext|>')}, but GPT-2's is {EOS}")
        byte_of = alphabet()
        self.pieces: list[str] = sorted(ids, key=ids.__getitem__)
        try:
            texts = [bytes(byte_of[character] for character in piece) for piece in self.pieces[:EOS]]
        except KeyError as error:
            raise ConfigError(
                f"{path}: {error} is not in the alphabet of GPT-2's pieces; give its vocab.json"
            ) from None
        self._bytes = [*texts, b""]  # the mark of the end has no text

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of text of each id, int64 (V,)."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    def piece(self, index: int) -> str:
        """How an id is written in the file."""
        return self.pieces[index]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


def alphabet() -> dict[str, int]:
    """The character by which GPT-2's files write each byte: itself where it is visible, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
