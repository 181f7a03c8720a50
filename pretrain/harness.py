"""`python -m pretrain.harness run --model overtone --model_args run=RUN --tasks TASK ...`: the command of lm-eval (the
Language Model Evaluation Harness of EleutherAI; `pip install -e '.[eval]'`), which knows the model `overtone` then.

RUN is a run folder (its newest whole checkpoint) or one checkpoint's folder. One process. A text is read as the model
read documents in training: after an end mark, where there is room for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.settings import ConfigError
from model.sample import generate
from pretrain import ranks as process
from pretrain.checkpoint import find_given
from pretrain.config import EXIT_BAD_INPUT, load
from pretrain.evaluate import open_tokenizer
from pretrain.inference import load_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise SystemExit(f"error: lm-eval cannot be imported ({error}); pip install -e '.[eval]'") from None

MAX_NEW_TOKENS = 256  # where a task does not say
GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}

Pair = tuple[Any, list[int], list[int]]  # of texts, which are not read; ids of context and continuation


@register_model("overtone")
class Overtone(TemplateLM):
    """A run of ours as a model of lm-eval.

    Args:
        run: a run folder or checkpoint.
        data: the prepared folder whose tokenizer reads the text; None: the run's own.
        batch_size: sequences at a time; None or "auto": those of the run's evaluation.

    Raises:
        ConfigError: as `python -m pretrain.evaluate`.
    """

    def __init__(
        self,
        run: str,
        data: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        ranks = process.start()
        if ranks.world > 1:
            raise ConfigError(f"lm-eval was started on {ranks.world} ranks: this model runs on one process")
        checkpoint, folder = find_given(Path(run), ranks)
        cfg = load(folder / "config.yaml")
        self.text = open_tokenizer(Path(data) if data else cfg.data.path)
        if not cfg.model.causal:
            raise ConfigError(f"{run}: a masked model has no next token; lm-eval asks for a causal one")
        self.model = load_model(checkpoint, cfg, self.text.sha256, self.text.eos_id, ranks)
        self.length = cfg.model.seq_len
        given = str(batch_size).partition(":")[0]
        self.batch = int(given) if given.isdigit() else cfg.evaluation.micro_batch or cfg.train.micro_batch
        self._device = ranks.device

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def max_length(self) -> int:
        return self.length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string)

    def _after_eos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == [self.text.eos_id] else [self.text.eos_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats, and whether every token of it is the most probable one."""
        order = sorted(range(len(requests)), key=lambda k: -len(requests[k][1]) - len(requests[k][2]))
        found: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            found.update(zip(chosen, self._score([requests[k][1:] for k in chosen]), strict=True))
        return [found[k] for k in range(len(requests))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        most = max(len(continuation) for _, continuation in pairs)
        if most > self.length:
            raise ConfigError(f"a continuation of {most} tokens, but the model has {self.length} positions")
        rows = [self._after_eos([*context, *continuation])[-self.length - 1 :] for context, continuation in pairs]
        inputs = torch.full((len(rows), max(map(len, rows)) - 1), self.text.eos_id)
        at = torch.zeros(len(rows), most, dtype=torch.int64)
        targets = torch.full((len(rows), most), -100)
        for k, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            inputs[k, : len(row) - 1] = torch.tensor(row[:-1])
            at[k, : len(continuation)] = torch.arange(len(row) - 1 - len(continuation), len(row) - 1)
            targets[k, : len(continuation)] = torch.tensor(continuation, dtype=torch.int64)
        nats, predicted = (
            part.view(len(rows), most).cpu()
            for part in self.model.score(*(t.to(self._device) for t in (inputs, at, targets)))
        )
        right = ((predicted == targets) | (targets < 0)).all(1)
        yield from zip((-nats.double()).sum(1).tolist(), right.tolist(), strict=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The whole text's log-likelihood in nats, every token once, in windows without overlap."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(self.text.encode(request.args[0]), self.text.eos_id, self.length, 1)
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its `until`, the end mark or `max_gen_toks` tokens."""
        return [self._continued(*request.args) for request in requests]

    def _continued(self, context: str, settings: dict[str, Any]) -> str:
        if unknown := settings.keys() - GENERATION_SETTINGS:
            raise ConfigError(
                f"generation with {', '.join(sorted(unknown))}: only {sorted(GENERATION_SETTINGS)} are known"
            )
        most = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), self.length - 1)
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        given = self._after_eos(self.text.encode(context))[most - self.length :]
        tokens = torch.tensor(given, device=self._device)[None]
        draw = partial(generate, self.model.decoder, self.model.head, max_tokens=most, temperature=temperature)
        ids: list[int] = []
        text = ""
        for token in draw(tokens, stop=(self.text.eos_id,)):
            ids.append(int(token))
            text = self.text.decode(ids)
            if any(end and end in text for end in ends):
                break
        return text[: _first(text, ends)]


def _first(text: str, ends: Iterable[str]) -> int:
    """Where the first of `ends` begins; else the text's length."""
    return min((text.index(end) for end in ends if end and end in text), default=len(text))


def main() -> int:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
