"""The results of a study of language models, as the sections of its page ask for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.study.page import layout
from pretrain.study.page.charts.lines import Series
from pretrain.study.page.charts.numbers import known
from pretrain.study.page.layout import NONE, written


class Figures:
    """Nested results, of which any may be None or missing."""

    def __init__(self, tree: Mapping[str, Any] | None) -> None:
        self.tree = tree

    def at(self, *keys: str) -> Any:
        """What is there after these keys; None if one of them is missing."""
        value: Any = self.tree
        for key in keys:
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value

    def figure(self, *keys: str) -> float | None:
        """A number; None if it is missing or not finite."""
        value = self.at(*keys)
        return value if isinstance(value, int | float) and known(value) else None

    def text(self, *keys: str, form: str = "{:,}", missing: str = NONE) -> str:
        """As HTML."""
        return written(self.at(*keys), form, missing)

    def bounds(self, form: str, prefix: str = "") -> str:
        """Of an interval; '' without one."""
        low, high = (self.figure(f"{prefix}{end}") for end in ("low", "high"))
        return "" if low is None or high is None else f"[{written(low, form)}, {written(high, form)}]"


def verdict(difference: Mapping[str, Any] | None) -> str | None:
    """Of a difference in bits/byte: better or worse if its corrected interval excludes 0; None without one."""
    low, high = (Figures(difference).figure(f"corrected_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return None
    return "better" if high < 0 else "worse" if low > 0 else "no difference"


class Head(Figures):
    """The results of one head, drawn in its `style`."""

    def __init__(self, tree: Mapping[str, Any], style: int, baseline: str) -> None:
        super().__init__(tree)
        self.style, self.name = style, str(tree["name"])
        self.is_baseline = self.name == baseline
        self.bits, self.difference = Figures(tree.get("bits_per_byte")), Figures(tree.get("difference"))
        self.trials: Sequence[Mapping[str, Any]] = tree.get("trials") or []
        self.at_edge: Sequence[str] = tree.get("at_edge") or []

    @property
    def trained(self) -> bool:
        """Whether it has a result: a run of a fresh seed that is done."""
        return self.bits.figure("mean") is not None

    @property
    def setting(self) -> Mapping[str, float]:
        """The chosen one; {} if none was."""
        return self.at("chosen", "setting") or {}

    @property
    def no_result(self) -> str:
        """Why it has no result, in words."""
        if not self.setting:
            ended = [trial for trial in self.trials if trial.get("outcome")]
            lost = ended and all(trial["outcome"] == "diverged" for trial in ended)
            return f"all {len(ended)} trials diverged" if lost else "no setting was chosen yet"
        started = self.at("started")
        if not started:
            return "no run of a fresh seed has ended"
        return f"all {started} runs diverged" if started != 1 else "its only run diverged"

    def card(self, svg: str, more: str = "", missing: str = "", below: str = "") -> str:
        """Its plot; `more` and `below` are HTML, `missing` says why there is none."""
        unmeasured = "Not measured." if self.trained else f"{self.no_result.capitalize()}."
        caption = layout.named(self.style, self.name, more)
        return layout.figure(svg, caption, missing or unmeasured, self.style, below)


class Study(Figures):
    """The results of all heads. The baseline comes first and has style 0."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        super().__init__(results)
        self.baseline = results.get("baseline") or "softmax"
        trees = sorted(results.get("heads") or [], key=lambda head: head["name"] != self.baseline)
        self.heads = [Head(tree, style, self.baseline) for style, tree in enumerate(trees)]
        self.names = [head.name for head in self.heads]
        self.title = str(results.get("title") or results.get("name") or "A study of output heads")
        self.has_baseline = bool(self.heads) and self.heads[0].is_baseline
        self.seeds, self.runs = self.at("seeds") or [], self.at("runs") or []
        self.sizes = [Figures(size) for size in self.at("sizes") or []]
        self.settled = bool(self.at("settled"))
        self.space: Mapping[str, Mapping[str, Any]] = self.at("protocol", "space") or {}
        self.unigram = self.figure("data", "test_unigram_bits_per_byte")
        self.val_unigram = self.figure("data", "val_unigram_bits_per_byte")

    @property
    def trained(self) -> list[Head]:
        """The heads that have a result, in the order of styles."""
        return [head for head in self.heads if head.trained]

    @property
    def has_energy(self) -> bool:
        """Of every head that has a result: else heads could not be compared."""
        return bool(self.trained) and all(head.figure("j_per_token") is not None for head in self.trained)

    @property
    def no_energy(self) -> str:
        """Why energy was not measured, as a sentence."""
        reason = self.unmeasured or "No reason was recorded"
        some = any(head.figure("j_per_token") is not None for head in self.heads)
        return f"Energy was not measured{' for every head' if some else ''}. {reason.rstrip('.')}."

    @property
    def unmeasured(self) -> str:
        """Parts whose energy is not told, and why."""
        reasons = self.at("not_measured") or {}
        return "; ".join(f"{part.upper()}: {why}" for part, why in reasons.items() if why)

    @property
    def counted(self) -> str:
        """What joules are of, as a sentence."""
        parts = ", ".join(map(str.upper, self.at("measured") or ())) or "parts not recorded"
        rest = f" Not measured in every run: {self.unmeasured.rstrip('.')}." if self.unmeasured else ""
        return f"Joules are those of {parts}.{rest}"

    @property
    def unigram_nats(self) -> float | None:
        """Per token of the `val` split."""
        size, tokens = self.figure("data", "val_bytes"), self.figure("data", "val_tokens")
        if self.val_unigram is None or not size or not tokens:
            return None
        return self.val_unigram * math.log(2) * size / tokens

    def series(self, lines: Iterable[Sequence[tuple[float, float | None]]]) -> list[Series]:
        """Points of each head, as its line."""
        return [Series(head.name, line, head.style) for head, line in zip(self.heads, lines, strict=True)]

    def beneath(self, head: Head, points: Sequence[tuple[float, float | None]]) -> list[Series]:
        """The baseline's line in grey, for the plot of another head."""
        return [Series(self.baseline, points, 0, muted=True)] if self.has_baseline and head.style else []
