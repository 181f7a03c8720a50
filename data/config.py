"""The `data:` section of a config: which text, which tokenizer, which shards."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator


class EmbeddedSource(BaseModel, extra="forbid", frozen=True):
    """The prose that this Python carries: pydoc topics and the docstrings of the standard library."""

    kind: Literal["embedded"]


class FilesSource(BaseModel, extra="forbid", frozen=True):
    """Local files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet."""

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]  # files or globs, read in this order
    text_field: str = "text"  # key of a JSON line or column of a parquet file
    separator: Annotated[str, Field(min_length=1)] | None = None  # between the documents of a .txt; null: one document


class HubSource(BaseModel, extra="forbid", frozen=True):
    """A dataset of the Hugging Face Hub, or a local folder of parquet files in the same layout, streamed.

    `openwebtext` is `hub` under a name that says what the default is.
    """

    kind: Literal["hub", "openwebtext"]
    name: str = "Skylion007/openwebtext"
    revision: str | None = None
    split: str = "train"
    text_field: str = "text"


Source = Annotated[EmbeddedSource | FilesSource | HubSource, Field(discriminator="kind")]


class TokenizerConfig(BaseModel, extra="forbid", frozen=True):
    vocab_size: int = Field(gt=0)
    model: Path | None = None  # a trained SentencePiece model; null: train one on the corpus
    train_bytes: int = Field(50_000_000, gt=0)  # most bytes of text that training sees


class DataConfig(BaseModel, extra="forbid", frozen=True):
    path: Path  # folder of the prepared data
    source: Source
    tokenizer: TokenizerConfig
    dtype: Literal["uint16", "uint32"] = "uint16"
    shard_tokens: int = Field(100_000_000, gt=0)  # a shard is closed before the document that would pass this
    val_fraction: float = Field(0.01, gt=0, lt=1)  # of documents, chosen by their hash
    limit_documents: int | None = Field(None, gt=0)  # null: the whole source

    @model_validator(mode="after")
    def _ids_fit(self) -> "DataConfig":
        if self.dtype == "uint16" and self.tokenizer.vocab_size > 1 << 16:
            raise ValueError(
                f"tokenizer.vocab_size={self.tokenizer.vocab_size} does not fit dtype uint16, which holds 65,536 ids; "
                "set dtype: uint32 or take a smaller vocabulary"
            )
        return self
