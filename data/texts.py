"""Text files as a split that was never prepared: each file is a document, tokenized here and now."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import ConfigError
from data.sources.encoding import without_mark
from data.tokenizer import Tokenizer


class Texts:
    """Files of UTF-8 text with the interface of `data.shards.Split`; each document ends with eos, as in shards.

    Attributes: `sources`, the files' names: every document is a source of its own.

    Raises:
        ConfigError: a file is missing, empty or no UTF-8.
    """

    name = "text"

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer) -> None:
        texts = [_read(path) for path in paths]
        ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        self.sources = tuple(map(str, paths))
        self.eos_id, self.tokenizer_sha256, self.vocab_size = tokenizer.eos_id, tokenizer.sha256, tokenizer.vocab_size
        self._stream = np.concatenate([np.array(part, dtype=np.int64) for part in ids])
        self._starts = np.cumsum([0, *map(len, ids[:-1])], dtype=np.int64)
        self._bytes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
        self.tokens, self.documents, self.text_bytes = len(self._stream), len(texts), int(self._bytes.sum())

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start+count-1 of the stream, int64 (count,)."""
        return self._stream[start : start + count]

    def document_starts(self) -> np.ndarray:
        """Position in the stream at which each document starts, int64 (documents,)."""
        return self._starts

    def document_bytes(self) -> np.ndarray:
        """Bytes of each document's UTF-8 text, int64 (documents,)."""
        return self._bytes

    def document_sources(self) -> np.ndarray:
        """Index into `sources` of each document, int64 (documents,)."""
        return np.arange(self.documents)


def _read(path: Path) -> str:
    try:
        text = without_mark(path.read_bytes(), str(path)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}); give a text file") from None
    if not text:
        raise ConfigError(f"{path}: empty; give a file with text in it")
    return text
