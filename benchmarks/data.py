"""What the way from text to batches costs: `python -m benchmarks.data prepare [TEXT.txt ...]` and `... load CONFIG`.

`prepare` times all of `python -m data prepare` with a tokenizer that is there (read, hash, drop duplicates, encode,
write, hash the shards), for one process and for every core; beside it two libraries that encode the same texts from
memory on as many threads: SentencePiece and tiktoken. tiktoken's own vocabularies have to be fetched from the network,
so it is given the pieces of the SentencePiece model as its merges, with GPT-2's splitting pattern: the same text, the
same vocabulary size, nearly the same tokens. Medians of several. The
embedded corpus is small and is said again, which flatters preparation: it remembers words. Give text files for a figure
to rely on.

`load` reads training batches in one process as a run reads them (shuffled windows over memory-mapped shards, with the
fingerprint of every batch), with warm files; then trains some steps of the configuration on all cores (or one GPU), the
reader a step ahead in its thread. The ratio is that of the two rates; what training still waited is beside it. Medians
of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measuring import batches_of, machine, parser, timed, trainer_of, wide_console
from common.errors import ConfigError
from common.machine import cores
from common.settings import validate
from data.config import DataConfig, EmbeddedSource, FilesSource
from data.prepare import prepare
from data.sources.corpus import documents
from data.tokenizer import BLANK, Tokenizer, train
from pretrain.config import RunConfig

VOCAB = 16_384
TRAIN_BYTES = 4_000_000
TIKTOKEN = "tiktoken, encoding alone"
# The pattern by which GPT-2 splits text before merging: github.com/openai/gpt-2, src/encoder.py.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
WARM_UP = 2
READ_SECONDS = 3.0


@dataclass(frozen=True)
class Speed:
    """Of one way to tokenize a text, in seconds."""

    name: str
    cores: int  # processes or threads
    seconds: float
    text_bytes: int
    tokens: int


def texts_of(paths: list[str], megabytes: int) -> list[str]:
    """The documents of text files (one each), or the embedded corpus; said again and again until there are so many."""
    source = FilesSource(kind="files", paths=tuple(paths)) if paths else EmbeddedSource(kind="embedded")
    texts = list(documents(source))
    out: list[str] = []
    size = turn = 0
    while size < megabytes * 1_000_000:
        for text in texts:
            out.append(f"{turn}\n{text}")  # no duplicates: they would not be written
            size += len(out[-1].encode())
        turn += 1
    return out


def tiktoken_of(tokenizer: Tokenizer) -> Any:
    """A tiktoken encoder whose merges are the pieces of a SentencePiece model, in their order."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    for i in range(int(tokenizer.byte_ids()[-1]) + 1, tokenizer.vocab_size):  # the specials and bytes come first
        ranks.setdefault(tokenizer.piece(i).replace(BLANK, " ").encode(), len(ranks))
    return tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


def preparation(texts: list[str], repeats: int) -> Iterator[Speed]:
    """Each way in turn."""
    import sentencepiece

    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "text.jsonl").open("w") as stream:
            stream.writelines(json.dumps({"text": text}, allow_nan=False) + "\n" for text in texts)
        train(_sample(texts), VOCAB, folder / "model")
        library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model"))
        other = tiktoken_of(Tokenizer(folder / "model"))
        cfg = validate(
            DataConfig,
            {
                "path": str(folder / "prepared"),
                "source": {"kind": "files", "paths": [str(folder / "text.jsonl")]},
                "tokenizer": {"vocab_size": VOCAB, "model": str(folder / "model")},
            },
        )

        def prepared(workers: int) -> int:
            fresh = cfg.model_copy(update={"path": Path(tempfile.mkdtemp(dir=folder))})
            splits = prepare(fresh, lambda _: None, workers)["splits"].values()
            return sum(split["tokens"] - split["documents"] for split in splits)

        def sentencepiece_alone(threads: int) -> int:
            return sum(map(len, library.encode(texts, num_threads=threads)))

        def tiktoken_alone(threads: int) -> int:
            return sum(map(len, other.encode_ordinary_batch(texts, num_threads=threads)))

        ways: dict[str, Callable[[int], int]] = {
            "python -m data prepare": prepared,
            "SentencePiece, encoding alone": sentencepiece_alone,
            TIKTOKEN: tiktoken_alone,
        }
        for count in sorted({1, cores()}):
            for name, way in ways.items():
                times, tokens = [], 0
                for _ in range(repeats):
                    began = time.perf_counter()
                    tokens = way(count)
                    times.append(time.perf_counter() - began)
                yield Speed(name, count, statistics.median(times), size, tokens)


def _sample(texts: list[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        if size >= TRAIN_BYTES:
            return
        size += len(text.encode())
        yield text


def preparation_table(speeds: list[Speed]) -> Table:
    """Ways by row; the ratio is to tiktoken with as many threads."""
    table = Table("", "cores", "MB/s", "million tokens/s", "bytes/token", "MB/s against tiktoken", title="preparation")
    reference = {speed.cores: speed.seconds for speed in speeds if speed.name == TIKTOKEN}
    for speed in speeds:
        rates = (speed.text_bytes / 1e6 / speed.seconds, speed.tokens / 1e6 / speed.seconds)
        ratios = (speed.text_bytes / speed.tokens, reference[speed.cores] / speed.seconds)
        cells = (f"{rates[0]:.2f}", f"{rates[1]:.3f}", f"{ratios[0]:.3f}", f"{ratios[1]:.2f}x")
        table.add_row(speed.name, str(speed.cores), *cells)
    return table


@dataclass(frozen=True)
class Loading:
    """Rates in tokens/s; `stored_bytes` are those of a token in its shard."""

    read: float
    trained: float
    stored_bytes: int
    waited: float  # share of the training steps' time

    @property
    def ratio(self) -> float:
        """How many times faster batches are read than trained on."""
        return self.read / self.trained


def loading(cfg: RunConfig, steps: int) -> Loading:
    """Reads for READ_SECONDS, then trains `steps` steps."""
    from data.shards import open_split
    from pretrain.runtime import ranks as process

    split = open_split(cfg.data.path, "train")
    trainer = trainer_of(cfg, split.eos_id)
    batches = batches_of(cfg, trainer.ranks)
    tokens = cfg.train.tokens_per_step
    times: list[float] = []
    while sum(times) < READ_SECONDS or len(times) <= WARM_UP:
        times.append(timed(lambda: batches.read(len(times))))
    read = tokens / statistics.median(times[WARM_UP:])

    times = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            batches.restart()
        times.append(timed(lambda s=step: trainer.train_step(batches.of(s), cfg.lr_at(s)).loss.item()))  # type: ignore[misc]
    spent = times[WARM_UP:]
    process.stop()
    itemsize = {"uint16": 2, "uint32": 4}[split.dtype]
    return Loading(read, tokens / statistics.median(spent), itemsize, batches.waited_s / sum(spent))


def loading_table(loading: Loading) -> Table:
    """Reading in its first row, training in its second."""
    table = Table("loading", "tokens/s", "GB/s of shards", "against training", "training waits")
    table.add_row(
        "read", f"{loading.read:,.0f}", f"{loading.read * loading.stored_bytes / 1e9:.3f}", f"{loading.ratio:,.0f}x", ""
    )
    table.add_row("trained", f"{loading.trained:,.0f}", "", "1x", f"{loading.waited:.2%}")
    return table


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code, 2 for input that is refused."""
    command = parser("data", __doc__)
    commands = command.add_subparsers(dest="command", required=True)
    text = commands.add_parser("prepare", help="from text to shards, against tiktoken")
    text.add_argument("texts", nargs="*", metavar="TEXT.txt", help="text files (default: the embedded corpus)")
    text.add_argument("--megabytes", type=int, default=16, help="so much text, said again (default %(default)s)")
    text.add_argument("--repeats", type=int, default=3, help="medians are over so many (default %(default)s)")
    shards = commands.add_parser("load", help="from shards to batches, against training")
    shards.add_argument("config", help="a YAML file of configs/, prepared")
    shards.add_argument("overrides", nargs="*", metavar="key=value")
    shards.add_argument("--steps", type=int, default=5, help="training steps that are timed (default %(default)s)")
    args = command.parse_args(argv)
    try:
        return _measure(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.train import trainable

    if args.command == "load":
        table = loading_table(loading(trainable(args.config, args.overrides), args.steps))
    else:
        table = preparation_table(list(preparation(texts_of(args.texts, args.megabytes), args.repeats)))
    console = wide_console(120)
    console.print(machine("cuda" if args.command == "load" and torch.cuda.is_available() else "cpu"))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
