"""A SentencePiece model as Overtone reads text with it, for the transformers library: any text in, the same text out.

It needs sentencepiece and transformers alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

VOCABULARY = "tokenizer.model"
BLANK = "\u2581"  # as SentencePiece writes a blank; the character itself goes in as its bytes


class OvertoneTokenizer(PreTrainedTokenizer):
    """No text gives a special id, unless `split_special_tokens=False`.

    Args:
        vocab_file: the SentencePiece model.
        add_bos_token: open every text as a document is opened, with the end of the one before it.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, add_bos_token: bool = False, **kwargs: Any) -> None:
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
        kwargs.setdefault("extra_special_tokens", [piece for piece in control if piece not in known])
        kwargs.setdefault("split_special_tokens", True)
        kwargs["special_tokens_pattern"] = "bos" if add_bos_token else "none"
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(add_bos_token=add_bos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self._pieces, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        found: list[str] = []
        for number, part in enumerate(text.split(BLANK) if self._blank_bytes else [text]):
            found += self._blank_bytes if number else []
            found += (self.model.id_to_piece(index) for index in self.model.encode(part))
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.get(token, self.model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(list(tokens)))

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        """Special ids are written as their names, or left out; bytes that are no UTF-8 become U+FFFD."""
        parts: list[str] = []
        ordinary: list[int] = []
        special = set(self.all_special_ids)
        for index in [token_ids] if isinstance(token_ids, int) else map(int, token_ids):
            if index < self.vocab_size and not self.model.is_control(index):
                ordinary.append(index)
            elif not (skip_special_tokens and index in special):
                parts += [self.model.decode(ordinary), self.convert_ids_to_tokens(index)]
                ordinary = []
        return "".join([*parts, self.model.decode(ordinary)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / "-".join(filter(None, (filename_prefix, VOCABULARY)))
        path.write_bytes(self._proto)
        return (str(path),)
