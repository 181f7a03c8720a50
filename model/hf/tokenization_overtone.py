"""A SentencePiece model as Overtone reads text with it, for the transformers library: any text in, the same text out.

It needs sentencepiece and transformers alone.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

VOCABULARY = "tokenizer.model"
BLANK = "\u2581"  # as SentencePiece writes a blank; the character itself goes in as its bytes
# Options that the library takes and does not save; it saves what is in `init_kwargs`, as it is by then.
UNSAVED = ("special_tokens_pattern", "token_type_ids_pattern", "token_type_ids_include_special_tokens")
# What the library hands over beside options; another version's may be more, so what is unknown is told, not refused.
BOOKKEEPING = {"added_tokens_decoder", "auto_map", "is_local", "local_files_only", "tokenizer_file", "processor_class"}
BOOKKEEPING |= {"model_specific_special_tokens", "special_tokens_map_file", "max_len", "response_schema", "device_map"}


class OvertoneTokenizer(PreTrainedTokenizer):
    """No text gives a special id, unless `split_special_tokens=False`.

    Args:
        vocab_file: the SentencePiece model.
        add_bos_token: open every text as a document is opened, with the end of the one before it; None: as
            `special_tokens_pattern` says.
        special_tokens_pattern: bos or none, in which `save_pretrained` keeps it: the library saves no add_bos_token.
        kwargs: options of every tokenizer of the library.
    Raises:
        TypeError, ValueError: an option that would change texts or ids, and is not there.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        add_bos_token: bool | None = None,
        special_tokens_pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        if special_tokens_pattern not in (None, "none", "bos"):
            raise ValueError(f"special_tokens_pattern={special_tokens_pattern!r}: expected bos or none")
        if kwargs.get("clean_up_tokenization_spaces"):
            raise ValueError("clean_up_tokenization_spaces=True: texts come back as they were; leave it out")
        if unknown := [name for name, value in kwargs.items() if name.startswith("add_") and value]:
            raise TypeError(f"{', '.join(unknown)}: this tokenizer adds nothing to a text, but for add_bos_token")
        if add_bos_token is None:
            add_bos_token = special_tokens_pattern == "bos"
        self._proto = Path(vocab_file).read_bytes()
        self.model = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        ids = range(self.model.get_piece_size())
        self._pieces = {self.model.id_to_piece(index): index for index in ids}
        blank_bytes = [f"<0x{byte:02X}>" for byte in BLANK.encode()]
        self._blank_bytes = blank_bytes if all(piece in self._pieces for piece in blank_bytes) else []
        control = [self.model.id_to_piece(index) for index in ids if self.model.is_control(index)]
        named = {"unk_token": self.model.unk_id(), "eos_token": self.model.eos_id(), "pad_token": self.model.pad_id()}
        named["bos_token"] = named["eos_token"]
        for name, index in named.items():
            if index >= 0:
                kwargs.setdefault(name, self.model.id_to_piece(index))
        if "<mask>" in control:
            kwargs.setdefault("mask_token", "<mask>")
        known = {str(value) for key, value in kwargs.items() if key.endswith("_token")}
        extra = kwargs.get("extra_special_tokens") or []
        if isinstance(extra, dict):  # with names
            kwargs["model_specific_special_tokens"] = {**kwargs.get("model_specific_special_tokens", {}), **extra}
            extra = []
        extra = [*extra, *(kwargs.pop("additional_special_tokens", None) or [])]  # its name in early versions
        known |= set(map(str, extra))
        kwargs["extra_special_tokens"] = [*extra, *(piece for piece in control if piece not in known)]
        kwargs.setdefault("split_special_tokens", True)
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(special_tokens_pattern="bos" if add_bos_token else "none", **kwargs)
        self.init_kwargs |= {name: getattr(self, name) for name in UNSAVED}
        if unknown := [name for name in kwargs if name not in BOOKKEEPING and not hasattr(self, name)]:
            warnings.warn(f"{', '.join(unknown)}: no option of this tokenizer, so it changes nothing", stacklevel=2)

    @property
    def add_bos_token(self) -> bool:
        """Whether every text is opened with an end of text."""
        return self.special_tokens_pattern == "bos"

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self.special_tokens_pattern = "bos" if value else "none"

    @property
    def vocab_size(self) -> int:
        """Pieces of the SentencePiece model; tokens that were added are beyond it."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece, added tokens included."""
        return {**self._pieces, **self._added_tokens_encoder}

    def prepare_for_tokenization(
        self, text: str, is_split_into_words: bool = False, **kwargs: Any
    ) -> tuple[str, dict[str, Any]]:
        """Where the library hands over what it did not use of a call's arguments. Raises TypeError."""
        if unknown := [f"{name}={value!r}" for name, value in kwargs.items() if value not in (None, False)]:
            raise TypeError(f"{', '.join(unknown)}: not known to this tokenizer; leave it out")
        return text, {}

    def _tokenize(self, text: str) -> list[str]:  # type: ignore[override]
        pieces: list[str] = []
        for number, part in enumerate(text.split(BLANK) if self._blank_bytes else [text]):
            pieces += self._blank_bytes if number else []
            pieces += (self.model.id_to_piece(index) for index in self.model.encode(part))
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.get(token, self.model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of pieces, as `decode` writes it."""
        return self._decode(self.convert_tokens_to_ids(list(tokens)))

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None) -> str:  # type: ignore[override]
        """Special ids are written as their names, or left out; bytes that are no UTF-8 become U+FFFD.

        Blanks are never cleaned up: early versions' pipelines ask for it unasked, and the text would not come back.
        """
        parts: list[str] = []
        ordinary: list[int] = []
        special = set(self.all_special_ids)
        for index in [token_ids] if isinstance(token_ids, int) else map(int, token_ids):
            if index < self.vocab_size and (skip_special_tokens or not self.model.is_control(index)):
                ordinary.append(index)  # SentencePiece leaves control ids out itself, and joins no bytes over them
            elif not (skip_special_tokens and index in special):
                parts += [self.model.decode(ordinary), self.convert_ids_to_tokens(index)]
                ordinary = []
        return "".join([*parts, self.model.decode(ordinary)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes the SentencePiece model, byte for byte as it was read; returns its path."""
        path = Path(save_directory) / "-".join(filter(None, (filename_prefix, VOCABULARY)))
        path.write_bytes(self._proto)
        return (str(path),)
