"""Random token ids by Zipf's law, brought in by the project's own import: what training costs does not ask for text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

EXPONENT = 1.3
DOCUMENT = 500  # tokens between two ends of text


def make(folder: Path, vocab: int, train_tokens: int, val_tokens: int) -> Path:
    """Makes a prepared folder `folder / "prepared"` of ids below `vocab`, the last of which ends documents."""
    from data.nanogpt import import_nanogpt
    from data.token_files import Asked

    raw = folder / "ids"
    raw.mkdir(parents=True)
    stream = np.random.default_rng(1)
    weights = np.arange(1, vocab + 1, dtype=np.float64) ** -EXPONENT
    upto = np.cumsum(weights) / weights.sum()
    for split, tokens in {"train": train_tokens, "val": val_tokens}.items():
        ids = np.minimum(np.searchsorted(upto, stream.random(tokens)), vocab - 2).astype("<u2")
        ids[DOCUMENT - 1 :: DOCUMENT] = vocab - 1
        ids.tofile(raw / f"{split}.bin")
    prepared = folder / "prepared"
    import_nanogpt(raw, prepared, log=lambda text: None, asked=Asked(vocab_size=vocab, eos_id=vocab - 1))
    return prepared


def settings(prepared: Path, vocab: int) -> str:
    """The override that has a configuration train on them."""
    return f"data={{path: '{prepared}', source: {{kind: prepared}}, tokenizer: {{vocab_size: {vocab}}}}}"
