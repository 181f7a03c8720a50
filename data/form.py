"""The form of a prepared folder's manifest: of what types its values are, which files it may name, that its sums agree.

The fingerprint in a manifest shows that nobody changed it by accident; not that it is one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

Count = Annotated[int, Field(ge=0, lt=2**62)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # of a file in the folder itself


class _Counts(BaseModel, frozen=True, strict=True):
    tokens: Count
    documents: Count
    text_bytes: Count | None


class _Shard(_Counts, frozen=True):
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.bin$")]
    size: Count
    sha256: Hash
    index_sha256: Hash
    sources: dict[str, _Counts]


class _Split(_Counts, frozen=True):
    sources: dict[str, _Counts]
    shards: list[_Shard]

    @model_validator(mode="after")
    def _adds_up(self) -> _Split:
        for column in ("tokens", "documents"):
            if getattr(self, column) != sum(getattr(shard, column) for shard in self.shards):
                raise ValueError(f"its {column} are not those of its shards")
        return self


class Form(BaseModel, frozen=True, strict=True):
    """What readers lean on; other keys may be there."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    tokenizer_file: Name | None
    tokenizer_sha256: Hash | None
    eos_id: Count
    sources: list[str]
    splits: dict[str, _Split]
    dropped: dict[str, Count] = {}
    settings: dict[str, Any] = {}
    inputs: dict[str, list[Any]] = {}
    fingerprint: str

    @model_validator(mode="after")
    def _agrees(self) -> Form:
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id={self.eos_id} is not in a vocabulary of {self.vocab_size}")
        if self.tokenizer_file is not None and self.tokenizer_sha256 is None:
            raise ValueError(f"{self.tokenizer_file} has no hash")
        for name, split in self.splits.items():
            if split.sources.keys() != set(self.sources):
                raise ValueError(f"{name} is not of the sources {', '.join(self.sources)}")
        return self
