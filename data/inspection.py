"""What a prepared folder holds, split by split: counts, lengths, frequent tokens and a sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import ConfigError
from data.gpt2 import Gpt2Vocabulary
from data.manifest import REMAKE, check_tokenizer, read_manifest
from data.shards import Split, open_split
from data.tokenizer import Tokenizer

QUANTILES = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
BLOCK = 1 << 24  # tokens that are counted together
FREQUENT = 20
SAMPLE_TOKENS = 120
BAR = 40  # characters

Vocabulary = Tokenizer | Gpt2Vocabulary


@dataclass(frozen=True)
class Statistics:
    """Of a split. Lengths are in tokens without eos."""

    lengths: np.ndarray  # int64 (documents,)
    counts: np.ndarray  # int64 (V,): how often each id occurs

    def quantiles(self) -> dict[float, int]:
        """Lengths by QUANTILES, each that of a document."""
        lengths = np.quantile(self.lengths, QUANTILES, method="inverted_cdf")
        return {q: int(length) for q, length in zip(QUANTILES, lengths, strict=True)}

    def histogram(self) -> list[tuple[int, int, int]]:
        """(least, most, documents) for lengths 0, 1, 2-3, 4-7 and so on, between the least and the greatest."""
        bits = np.frexp(self.lengths.astype(np.float64))[1]  # of a length, 0 for 0
        documents = np.bincount(bits)
        first = int(bits.min())
        return [(1 << b >> 1, (1 << b) - 1, int(documents[b])) for b in range(first, len(documents))]

    def frequent(self) -> list[tuple[int, int]]:
        """(id, count) of the most frequent tokens."""
        order = np.argsort(-self.counts, kind="stable")[:FREQUENT]
        return [(i, int(self.counts[i])) for i in order.tolist() if self.counts[i]]

    def share(self, ids: np.ndarray) -> float:
        """Share of all tokens, 0 to 1, that have one of these ids (any number,)."""
        return float(self.counts[ids].sum() / self.counts.sum())


def statistics(split: Split) -> Statistics:
    """Reads every token of a split."""
    lengths = np.diff(split.document_starts(), append=split.tokens) - 1
    counts = np.zeros(split.vocab_size, dtype=np.int64)
    for start in range(0, split.tokens, BLOCK):
        block = np.bincount(split.read(start, min(BLOCK, split.tokens - start)), minlength=split.vocab_size)
        if len(block) > split.vocab_size:
            raise ConfigError(
                f"the {split.name} split holds id {len(block) - 1}, but its vocabulary is {split.vocab_size}; {REMAKE}"
            )
        counts += block
    return Statistics(lengths, counts)


def vocabulary_of(folder: Path, manifest: dict[str, Any]) -> Vocabulary | None:
    """What turns a prepared folder's ids into text, or None: it was imported without a vocabulary.

    Raises:
        ConfigError: it is missing, or is not the one that made the ids.
    """
    check_tokenizer(folder, manifest)
    if manifest["tokenizer_file"] is None:
        return None
    path = folder / manifest["tokenizer_file"]
    return Gpt2Vocabulary(path) if path.suffix == ".json" else Tokenizer(path)


def inspect(folder: Path, console: Console | None = None) -> None:
    """Prints the statistics of every split. Raises ConfigError if there are no prepared data, or damaged ones."""
    console = console or Console(highlight=False)
    manifest = read_manifest(folder)
    vocabulary = vocabulary_of(folder, manifest)
    for name in manifest["splits"]:
        split = open_split(folder, name)
        _show(split, statistics(split), vocabulary, console)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.get("dropped", {}).items())
    console.print(f"dropped: {dropped or 'not known'}; fingerprint {split.fingerprint[:12]}")


def _show(split: Split, stats: Statistics, vocabulary: Vocabulary | None, console: Console) -> None:
    table = Table("", "documents", "tokens", "bytes of text", "bytes/token", title=split.name, title_justify="left")
    rows = {"all": {"documents": split.documents, "tokens": split.tokens, "text_bytes": split.text_bytes}}
    if len(split.sources) > 1:
        rows |= split.source_counts
    for name, counts in rows.items():
        size = counts["text_bytes"]
        ratio = "-" if size is None or not counts["tokens"] else f"{size / counts['tokens']:.3f}"
        size_told = "-" if size is None else f"{size:,}"
        table.add_row(escape(name), f"{counts['documents']:,}", f"{counts['tokens']:,}", size_told, ratio)
    console.print(table)

    console.print(
        "tokens per document: " + ", ".join(f"{q:.0%} {n:,}" for q, n in stats.quantiles().items()), soft_wrap=True
    )
    histogram = stats.histogram()
    most = max(count for _, _, count in histogram)
    for low, high, count in histogram:
        console.print(f"{low:>12,} to {high:>12,}  {'#' * -(-BAR * count // most):<{BAR}} {count:,}")

    if isinstance(vocabulary, Tokenizer) and len(vocabulary.byte_ids()):
        console.print(f"single bytes, for what no piece covers: {stats.share(vocabulary.byte_ids()):.3%} of the tokens")
    total = stats.counts.sum()
    pieces = [
        f"{i if vocabulary is None else repr(vocabulary.piece(i))} {count / total:.2%}" for i, count in stats.frequent()
    ]
    console.print(escape("most frequent: " + ", ".join(pieces)), soft_wrap=True)
    if vocabulary is None:
        console.print("no sample: these tokens were imported without a vocabulary")
        return
    middle = int(np.argsort(stats.lengths, kind="stable")[split.documents // 2])
    start, length = int(split.document_starts()[middle]), int(stats.lengths[middle])
    ids = split.read(start, min(length, SAMPLE_TOKENS)).tolist()
    console.print(f"the first {len(ids)} of {length:,} tokens of document {middle:,}, whose length is the median:")
    console.print(escape(vocabulary.decode(ids)), soft_wrap=True)
    console.print()
