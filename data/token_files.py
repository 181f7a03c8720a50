"""Files of token ids that other programs wrote, checked as far as ids can tell what they are.

nanoGPT writes bare ids. llm.c (and what took its format) puts 256 int32 before them: a magic number that tells the
tokenizer and the width, a version and the number of tokens (`dev/data/data_common.py` there).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import ConfigError
from common.progress import Log, progress
from data.gpt2 import EOS, VOCAB_SIZE
from data.manifest import DTYPES
from data.shards import MAGIC

BLOCK = 1 << 24  # tokens that are looked at together
LLM_C_HEADER = 256  # int32
LLM_C_EXAMPLES = 20240522  # the magic number of its multiple-choice files
NUMPY = b"\x93NUMPY"
FEW = 16  # tokens that tell nothing of their width
SMALL = 16  # what the upper halves of uint32 ids stay below: a million ids


@dataclass(frozen=True)
class Layout:
    """How ids are written and which there are."""

    dtype: str  # uint16 or uint32
    vocab_size: int
    eos_id: int  # between documents

    @property
    def ids(self) -> str:
        """What one of the ids is called in messages."""
        return "GPT-2 id" if self.vocab_size == VOCAB_SIZE else f"id of a vocabulary of {self.vocab_size:,}"


GPT2 = Layout("uint16", VOCAB_SIZE, EOS)
LLAMA3 = Layout("uint32", 128256, 128000)  # llm.c puts <|begin_of_text|> between documents
LLM_C = {20240520: (1, GPT2), 20240801: (7, LLAMA3)}  # by magic number: version, layout


@dataclass(frozen=True)
class Asked:
    """What the user says of the files; None: as their headers say, or as nanoGPT writes them."""

    dtype: str | None = None
    vocab_size: int | None = None
    eos_id: int | None = None
    one_document: bool = False  # a split need not hold eos_id

    def layout(self, known: Layout) -> Layout:
        """Raises ConfigError if the settings do not go together."""
        layout = Layout(
            self.dtype or known.dtype,
            known.vocab_size if self.vocab_size is None else self.vocab_size,
            known.eos_id if self.eos_id is None else self.eos_id,
        )
        if layout.vocab_size > 1 << 16 and layout.dtype == "uint16":
            raise ConfigError(
                f"a vocabulary of {layout.vocab_size:,} has ids that uint16 cannot hold; add --dtype uint32"
            )
        if not 0 <= layout.eos_id < layout.vocab_size:
            raise ConfigError(
                f"the end-of-text id {layout.eos_id} is not within a vocabulary of {layout.vocab_size:,}; give the id "
                "that stands between documents as --eos-id"
            )
        return layout


@dataclass(frozen=True)
class TokenFile:
    """Ids in a file, memory-mapped."""

    path: Path
    ids: np.ndarray  # uint16 or uint32 (tokens,)

    def blocks(self) -> Iterator[np.ndarray]:
        """The ids in order, (BLOCK,) at a time, the last ones fewer: views of the mapped file."""
        for first in range(0, len(self.ids), BLOCK):
            yield self.ids[first : first + BLOCK]


def files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split: SPLIT.bin as nanoGPT names it, or NAME_SPLIT.bin, NAME_SPLIT_N.bin as llm.c does. Of test
    there need not be any. Raises ConfigError.
    """
    plain = folder / f"{split}.bin"
    if plain.is_file():
        return [plain]
    paths = sorted({*folder.glob(f"*_{split}.bin"), *folder.glob(f"*_{split}_[0-9]*.bin")})
    names = {path.name.rpartition(f"_{split}")[0] for path in paths}
    if len(names) > 1:
        raise ConfigError(
            f"{folder}: files of several data sets ({', '.join(sorted(names))}); give a folder with those of one"
        )
    if not paths and split != "test":
        raise ConfigError(
            f"{plain}: missing; give the folder in which nanoGPT's prepare.py wrote train.bin and val.bin, or llm.c's "
            "NAME_train.bin and NAME_val.bin"
        )
    return paths


def open_files(paths: list[Path], asked: Asked) -> tuple[Layout, list[TokenFile]]:
    """Opens files of one layout.

    Raises:
        ConfigError: a file has another size or header than such files have, or another layout than those before it.
    """
    layouts = {path: _layout(path, asked) for path in paths}
    first = layouts[paths[0]][0]
    for path, (layout, _) in layouts.items():
        if layout != first:
            raise ConfigError(f"{path}: {layout}, but {paths[0]}: {first}; give files of one tokenizer")
    kind = DTYPES[first.dtype]
    return first, [TokenFile(path, np.memmap(path, kind, "r", offset=start)) for path, (_, start) in layouts.items()]


def _layout(path: Path, asked: Asked) -> tuple[Layout, int]:
    """A file's layout, and where its ids begin."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(4 * LLM_C_HEADER)
    for magic, what in ((NUMPY, "a NumPy file; write its ids with tofile"), (MAGIC, "a shard of prepared data")):
        if start.startswith(magic):
            raise ConfigError(f"{path}: {what}; expected bare token ids, or llm.c's header before them")
    header = np.frombuffer(start[: len(start) // 4 * 4], dtype="<i4")
    magic_number = int(header[0]) if len(header) else 0
    if magic_number == LLM_C_EXAMPLES:
        raise ConfigError(
            f"{path}: llm.c's multiple-choice examples, not a stream of tokens; give its train and val files"
        )
    if magic_number not in LLM_C:
        layout = asked.layout(GPT2)
        width = DTYPES[layout.dtype].itemsize
        if size == 0 or size % width:
            raise ConfigError(
                f"{path}: {size} bytes are no {layout.dtype} ids; give the width of the ids as --dtype, or prepare the "
                "file again"
            )
        return layout, 0
    version, known = LLM_C[magic_number]
    if len(header) < LLM_C_HEADER or header[1] != version:
        raise ConfigError(
            f"{path}: llm.c's magic number {magic_number}, but not the 1,024 bytes of a header of version {version}; "
            "make the file again"
        )
    if asked.dtype not in (None, known.dtype):
        raise ConfigError(f"{path}: llm.c's header says {known.dtype} ids; leave --dtype out")
    width = DTYPES[known.dtype].itemsize
    tokens, rest = int(header[2]), size - 4 * LLM_C_HEADER
    if tokens <= 0 or rest != tokens * width:
        raise ConfigError(
            f"{path}: its header says {tokens:,} tokens of {width} bytes, but {rest:,} bytes follow; give a whole copy"
        )
    return asked.layout(known), 4 * LLM_C_HEADER


def check_ids(files: list[TokenFile], split: str, layout: Layout, asked: Asked, log: Log) -> None:
    """Reads every id.

    Raises:
        ConfigError: ids that look like another width's, that the vocabulary does not have, or without any end of text.
    """
    total = sum(len(file.ids) for file in files)
    read, ended = 0, False
    with progress(f"checking {split}", log) as tell:
        for file in files:
            _check_width(file, layout)
            first = 0
            for block in file.blocks():
                if int(block.max()) >= layout.vocab_size:
                    at = first + int(np.argmax(block >= layout.vocab_size))
                    raise ConfigError(
                        f"{file.path}, token {at}: {file.ids[at]} is no {layout.ids}, which end at "
                        f"{layout.vocab_size - 1}; give the vocabulary of the ids as --vocab-size, or their width as "
                        f"--dtype (read as {layout.dtype})"
                    )
                ended = ended or bool((block == layout.eos_id).any())
                first += len(block)
                read += len(block)
                tell(read / total, f"{read:,} tokens")
    if not ended and not asked.one_document:
        raise ConfigError(
            f"{files[0].path}: end-of-text id {layout.eos_id} is not among the {total:,} tokens of {split}, so they "
            "may be another tokenizer's; give --eos-id, --vocab-size and --dtype of the one that made them, or "
            "--one-document if the ids are right and the file is one text"
        )


def _check_width(file: TokenFile, layout: Layout) -> None:
    """Ids of twice the width, read as ids of this one, have next to nothing in every second place."""
    block = file.ids[:BLOCK]
    if len(block) < FEW:
        return
    low, high = block[::2], int(block[1::2].max())
    if low.any() and (high == 0 or (high < SMALL and (low >= 1 << 8).mean() > 0.5)):
        wider = "add --dtype uint32" if layout.dtype == "uint16" else "write them as uint32"
        what = "0" if high == 0 else f"below {SMALL}"
        raise ConfigError(
            f"{file.path}: every second id is {what}, as in wider ids that are read as {layout.dtype}; {wider}"
        )
