"""Which text a run was scored on, so that figures stand side by side only where they compare.

Bits per byte compare between tokenizers if the text is one; nats per token and perplexity if the tokenizer is one too;
a masked model's pseudo-likelihood compares with no likelihood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ConfigError
from data.manifest import TOKENIZER, read_manifest
from data.shards import open_split
from pretrain.checkpoints import resume
from pretrain.checkpoints.contents import read_state
from pretrain.config import RunConfig
from pretrain.records import Eval
from pretrain.run_folder import RunFolder

if TYPE_CHECKING:
    from data.loader import Scorable
    from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """What is known of the text that a run was last scored on; None: not known."""

    text_sha256: str | None  # of its documents
    tokenizer_sha256: str | None
    data_fingerprint: str | None  # of the prepared folder: the same tokens in both splits
    objective: str
    scored: bool  # False: the run has no held-out figures

    def is_same(self, other: HeldOut) -> bool | None:
        """Whether bits per byte of the two compare; None: that is not known."""
        if self.objective != other.objective:
            return False
        if self.data_fingerprint is not None and self.data_fingerprint == other.data_fingerprint:
            return True
        if self.text_sha256 is None or other.text_sha256 is None:
            return None
        return self.text_sha256 == other.text_sha256


def tokens_of(split: Scorable) -> Iterator[np.ndarray]:
    """The tokens of each document with its end mark, int64 (tokens,)."""
    starts = split.document_starts().tolist()
    for start, end in zip(starts, [*starts[1:], split.tokens], strict=True):
        yield split.read(start, end - start)


def documents_of(split: Scorable, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each document, as its tokens give it back."""
    return (tokenizer.decode(tokens.tolist()) for tokens in tokens_of(split))


def text_sha256(split: Scorable, folder: Path) -> str | None:
    """Of the documents' text and where each ends, whatever the tokenizer; None if its tokens do not give the text back.

    Args:
        split: what is scored.
        folder: the prepared data whose tokenizer made its tokens.
    """
    from data.tokenizer import Tokenizer

    sizes = split.document_bytes().tolist()
    if read_manifest(folder)["tokenizer_file"] != TOKENIZER or min(sizes, default=0) < 0:
        return None  # imported tokens
    try:
        tokenizer = Tokenizer(folder / TOKENIZER)
    except ConfigError:
        return None  # it trains all the same: what needs the tokenizer says so
    digest = hashlib.sha256()
    for size, text in zip(sizes, documents_of(split, tokenizer), strict=True):
        raw = text.encode("utf-8", errors="replace")
        if len(raw) != size:
            return None
        digest.update(size.to_bytes(8, "little") + raw)
    return digest.hexdigest()


def identify(cfg: RunConfig) -> dict[str, str | None]:
    """What an evaluation's record says of the text that a run is scored on: its prepared `val` split."""
    split = open_split(cfg.data.path, "val")
    return {
        "text_sha256": text_sha256(split, cfg.data.path),
        "tokenizer_sha256": split.tokenizer_sha256,
        "data_fingerprint": split.fingerprint,
    }


def held_out_of(run: RunFolder, cfg: RunConfig, last: Eval | None) -> HeldOut:
    """Of a run, by the record of its last evaluation; of an older one, by what its newest checkpoint says of its data,
    and by the data themselves where they are still the same.
    """
    names = ("text_sha256", "tokenizer_sha256", "data_fingerprint")
    identity = {name: getattr(last, name, None) for name in names}
    if last and identity["data_fingerprint"] is None:
        identity |= _by_checkpoint(run, cfg)
    return HeldOut(**identity, objective=cfg.model.objective, scored=last is not None)


def _by_checkpoint(run: RunFolder, cfg: RunConfig) -> dict[str, Any]:
    try:
        identity = read_state(run.checkpoints()[-1])["identity"]
        trained_on = {"data_fingerprint": identity[resume.DATA], "tokenizer_sha256": identity[resume.TOKENIZER]}
    except (IndexError, KeyError, ConfigError):  # none, or one that was deleted meanwhile
        return {}
    try:
        there_now = identify(cfg)
    except ConfigError:
        return trained_on  # the data are elsewhere
    return there_now if there_now["data_fingerprint"] == trained_on["data_fingerprint"] else trained_on


def comparable(texts: Mapping[str, HeldOut]) -> list[list[str]]:
    """The runs, by name, in groups that were scored on one text. One without figures is in the first group."""
    groups: list[list[str]] = []
    for name, mine in texts.items():
        if mine.scored:
            fitting = next((group for group in groups if any(mine.is_same(texts[other]) for other in group)), None)
            if fitting is None:
                groups.append([name])
            else:
                fitting.append(name)
    unscored = [name for name, mine in texts.items() if not mine.scored]
    if not groups:
        return [unscored]
    order = list(texts)
    groups[0] = sorted([*groups[0], *unscored], key=order.index)
    return groups


def check_one_text(texts: Mapping[str, HeldOut]) -> None:
    """Raises ConfigError if runs that are to be compared were scored on texts that are known to differ."""
    scored = [(name, text) for name, text in texts.items() if text.scored]
    for name, text in scored[1:]:
        first, other = scored[0]
        if text.is_same(other) is False:
            raise ConfigError(
                f"{first} and {name} were scored on other held-out texts, so their figures do not compare; prepare the "
                "data that both are to have, and train the one anew that had others"
            )


def told_of(group: Sequence[str], texts: Mapping[str, HeldOut]) -> str:
    """The held-out text of a group, in words."""
    known = [texts[name] for name in group if texts[name].scored]
    if not known:
        return "no held-out text was scored"
    text, data = known[0].text_sha256, known[0].data_fingerprint
    what = "masked tokens of " if known[0].objective == "masked" else ""
    if text is None and data is None:
        return f"{what}held-out text unknown (of an older run, whose checkpoints and data do not tell)"
    return f"{what}held-out text {text[:12] if text else f'of the data {str(data)[:12]}'}"
