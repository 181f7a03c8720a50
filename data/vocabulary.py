"""The tokenizer of prepared data."""

from pathlib import Path

from common.errors import ConfigError
from data.manifest import TOKENIZER, check_tokenizer, read_manifest
from data.tokenizer import Tokenizer


def open_tokenizer(folder: Path) -> Tokenizer:
    """That of a prepared folder. Raises ConfigError if it is not the one that made its shards, or cannot read text."""
    manifest = read_manifest(folder)
    if manifest["tokenizer_file"] != TOKENIZER:
        raise ConfigError(f"{folder} was imported as tokens: there is no SentencePiece model in it to read text with")
    check_tokenizer(folder, manifest)
    return Tokenizer(folder / TOKENIZER)
