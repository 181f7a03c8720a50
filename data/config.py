"""The `data:` section of a config: which text, which tokenizer, which shards."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from common.fields import FilePath, Name, PathText

MOST_IDS = 2**24  # of a vocabulary
MOST_TEXT = 10**15  # bytes or tokens


class EmbeddedSource(BaseModel, extra="forbid", frozen=True):
    """The prose that this Python carries: pydoc topics and the docstrings of the standard library."""

    kind: Literal["embedded"]


class FilesSource(BaseModel, extra="forbid", frozen=True):
    """Local files: .txt and JSON lines (.jsonl, .ndjson, .json), as they are or as .gz or .zst; .parquet and .arrow."""

    kind: Literal["files"]
    paths: Annotated[tuple[PathText, ...], Field(min_length=1)]  # files or globs, read in this order
    text_field: Name = "text"  # key of a JSON line or column of a parquet or arrow file
    separator: Annotated[str, Field(min_length=1)] | None = None  # between the documents of a .txt; null: one document


class HubSource(BaseModel, extra="forbid", frozen=True):
    """A dataset of the Hugging Face Hub, or a local folder in the same layout: its data files, streamed.

    The folder may also be one that `save_to_disk` wrote.
    `openwebtext` is `hub` under a name that says what the default is.
    """

    kind: Literal["hub", "openwebtext"]
    name: PathText = "Skylion007/openwebtext"
    subset: Name | None = None  # the dataset's configuration, where it has several
    revision: Name | None = None  # branch, tag or commit; null: the Hub's default
    split: Name = "train"
    text_field: Name = "text"
    partial: bool = False  # take files of `partial-...` folders, which hold only the first part of a split


class DebianPackage(BaseModel, extra="forbid", frozen=True):
    """A package of Debian's, and which of its files are read. In a pattern `*` stands for any letters, also for `/`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$", max_length=200)]
    version: Annotated[str, Field(pattern=r"^[0-9][A-Za-z0-9.+:~-]*$", max_length=200)] | None = None  # null: any
    files: Annotated[tuple[PathText, ...], Field(min_length=1)] = ("*.html", "*.htm", "*.txt", "*.txt.gz")
    skip: tuple[PathText, ...] = ()  # files that are left out


class DebianSource(BaseModel, extra="forbid", frozen=True):
    """The prose of files in Debian packages: text and pages of HTML, without markup, navigation and listings."""

    kind: Literal["debian"]
    packages: Annotated[tuple[DebianPackage, ...], Field(min_length=1)]  # read in this order
    folder: PathText = "prepared/packages"  # of their .deb files; what is not there yet is fetched into it by apt
    document_chars: int = Field(10_000, gt=0, le=MOST_TEXT)  # a longer text is cut, between paragraphs
    prose: float = Field(0.5, ge=0, le=1)  # a file with a smaller share of its characters in prose is left out

    @model_validator(mode="after")
    def _each_once(self) -> "DebianSource":
        names = [package.name for package in self.packages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"packages: {twice[0]} is there twice; name all its files in one entry")
        return self


class PreparedSource(BaseModel, extra="forbid", frozen=True):
    """No text: `data.path` holds tokens that were imported, such as by `overtone import`."""

    kind: Literal["prepared"]


PlainSource = Annotated[EmbeddedSource | FilesSource | HubSource | DebianSource, Field(discriminator="kind")]


class Weighted(BaseModel, extra="forbid", frozen=True):
    """A source of a mixture: its share of the tokens is its weight over the sum of all weights."""

    weight: float = Field(ge=1e-9, le=1e9)
    source: PlainSource


class MixtureSource(BaseModel, extra="forbid", frozen=True):
    """Several sources by name, with shares of the tokens as their weights. It ends with the first that runs out."""

    kind: Literal["mixture"]
    sources: dict[Name, Weighted] = Field(min_length=1, max_length=1 << 16)


Source = Annotated[
    EmbeddedSource | FilesSource | HubSource | DebianSource | MixtureSource | PreparedSource,
    Field(discriminator="kind"),
]


class TokenizerConfig(BaseModel, extra="forbid", frozen=True):
    """The tokenizer of the prepared data: a SentencePiece model that is given, or one trained on the train split."""

    vocab_size: int = Field(gt=0, le=MOST_IDS)  # ids, with the 256 bytes and the specials
    model: FilePath | None = None  # a trained SentencePiece model; null: train one on the corpus
    train_bytes: int = Field(50_000_000, gt=0, le=MOST_TEXT)  # most bytes of text that training sees
    nfkc: bool = False  # brings text to Unicode's form NFKC before it is encoded, so that it does not come back exactly

    @model_validator(mode="after")
    def _given_as_it_is(self) -> "TokenizerConfig":
        if self.nfkc and self.model is not None:
            raise ValueError("nfkc: a given model normalises as it was trained to; leave nfkc or model out")
        return self


class DataConfig(BaseModel, extra="forbid", frozen=True):
    """The `data:` section: what a prepared folder is made from, and where it is."""

    path: FilePath  # folder of the prepared data
    source: Source
    tokenizer: TokenizerConfig
    dtype: Literal["uint16", "uint32"] = "uint16"  # of the ids on the disk
    shard_tokens: int = Field(100_000_000, gt=0, le=2**40)  # a shard is closed before the document that would pass this
    val_fraction: float = Field(0.01, gt=0, lt=1)  # of documents, chosen by their hash: the split to tune on
    test_fraction: float = Field(0.0, ge=0, lt=1)  # likewise: the split that training never looks at; 0: there is none
    limit_documents: int | None = Field(None, gt=0, le=MOST_TEXT)  # of those with text in them; null: the whole source
    deduplicate: bool = True  # a document whose very text came before is dropped
    min_chars: int = Field(0, ge=0, le=MOST_TEXT)  # shorter documents are dropped
    # A train document is dropped if at least this share of its runs of 13 words occurs in val or test; null: none is.
    val_overlap: float | None = Field(None, gt=0, le=1)

    def sources(self) -> dict[str, Weighted]:
        """The sources by name. One that stands alone has its kind for a name; imported tokens have none."""
        if isinstance(self.source, PreparedSource):
            return {}
        if isinstance(self.source, MixtureSource):
            return self.source.sources
        return {self.source.kind: Weighted(weight=1.0, source=self.source)}

    @model_validator(mode="after")
    def _some_are_left_to_train(self) -> "DataConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction={self.val_fraction:g} and test_fraction={self.test_fraction:g} leave no document to "
                "train on; their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _ids_fit(self) -> "DataConfig":
        if self.dtype == "uint16" and self.tokenizer.vocab_size > 1 << 16:
            raise ValueError(
                f"tokenizer.vocab_size={self.tokenizer.vocab_size} does not fit dtype uint16, which holds 65,536 ids; "
                "set dtype: uint32 or take a smaller vocabulary"
            )
        return self

    @model_validator(mode="after")
    def _imported_as_they_are(self) -> "DataConfig":
        given = self.model_fields_set - {"path", "source", "tokenizer", "dtype"}
        changed = sorted(name for name in given if getattr(self, name) != type(self).model_fields[name].default)
        if isinstance(self.source, PreparedSource) and (changed or self.tokenizer.model is not None):
            raise ValueError(
                f"{(changed or ['tokenizer.model'])[0]}: imported data are taken as they are; leave this setting out"
            )
        return self
