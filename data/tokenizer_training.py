"""The tokenizer of a prepared folder: a copy of the given one, or one trained on a sample of the train split."""

import heapq
import shutil
from pathlib import Path

from common.errors import ConfigError
from common.progress import Log
from data.config import DataConfig
from data.encode import digest_of, fractions_of
from data.sources.corpus import documents
from data.tokenizer import Tokenizer, train

SAMPLE_SPAN = 20  # the sample is drawn from the first 20 * train_bytes bytes of the source


def make_tokenizer(cfg: DataConfig, path: Path, log: Log) -> None:
    """Puts the tokenizer at `path`.

    Raises:
        ConfigError: the given one has another vocabulary than the settings say, or the sample is too small for them.
    """
    model = cfg.tokenizer.model
    if model is None:
        texts = sample(cfg)
        size = sum(len(text.encode()) for text in texts)
        log(f"training a tokenizer: {cfg.tokenizer.vocab_size:,} pieces from {size / 1e6:.2f} MB of text")
        train(texts, cfg.tokenizer.vocab_size, path, cfg.tokenizer.nfkc)
        return
    tokenizer = Tokenizer(model)
    if tokenizer.vocab_size != cfg.tokenizer.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but {model} has {tokenizer.vocab_size} pieces; "
            f"set it to {tokenizer.vocab_size}"
        )
    if changes := tokenizer.changes():
        examples = ", ".join(f"{text!r} becomes {back!r}" for text, back in changes.items())
        log(
            f"{model}: this model does not give every text back as it was: {examples}. It is used as it is; for exact "
            "text leave data.tokenizer.model out, and one is trained"
        )
    shutil.copyfile(model, path)


def sample(cfg: DataConfig) -> list[str]:
    """At most `train_bytes` of the train split: the documents of lowest hash, an even and reproducible sample.

    Each source of a mixture has a share of it as its weight.
    """
    weights = sum(entry.weight for entry in cfg.sources().values())
    fractions = fractions_of(cfg)
    chosen: set[int] = set()  # hashes: a document that occurs twice counts once
    texts = []
    for entry in cfg.sources().values():
        cap = cfg.tokenizer.train_bytes * entry.weight / weights
        kept: list[tuple[int, str]] = []  # a heap, highest hash first
        kept_bytes = seen_bytes = 0
        for text in documents(entry.source, cfg.limit_documents):
            size = len(text.encode())
            digest = digest_of(text)
            seen_bytes += size
            if digest not in chosen and not fractions.held_out(digest):
                chosen.add(digest)
                heapq.heappush(kept, (-digest, text))
                kept_bytes += size
                while kept_bytes > cap and len(kept) > 1:
                    kept_bytes -= len(heapq.heappop(kept)[1].encode())
            if seen_bytes >= SAMPLE_SPAN * cap:
                break
        texts += [text for _, text in sorted(kept, reverse=True)]
    return texts
