"""`python -m pretrain.harness run --model overtone --model_args run=RUN --tasks TASK ...`: the command of lm-eval (the
Language Model Evaluation Harness of EleutherAI; `pip install -e '.[eval]'`), which knows the model `overtone` then.

RUN is a run folder (its newest whole checkpoint) or one checkpoint's folder. One process. A text is read as the model
read documents in training: after an end mark, where there is room for it.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.command import refuse
from common.errors import ConfigError
from data.vocabulary import open_tokenizer
from model.sample import generate
from pretrain.run_folder import RunFolder, settings_if_any
from pretrain.runtime import ranks as process

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise SystemExit(f"error: lm-eval cannot be imported ({error}); pip install -e '.[eval]'") from None

MAX_NEW_TOKENS = 256  # where a task does not say
LM_EVALS_DEVICE = "cuda:0"  # what it hands over where no --device is given
GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}

NOTHING_TO_SCORE = (
    "Nothing of it can be scored, and to call it certain would make it the best choice: mend or leave out that "
    "document (process_docs), or look at the task's doc_to_choice, doc_to_target and target_delimiter"
)

log = logging.getLogger(__name__)

Pair = tuple[Any, list[int], list[int]]  # of texts, which are not read; ids of context and continuation


@register_model("overtone")
class Overtone(TemplateLM):
    """A run of ours as a model of lm-eval.

    Args:
        run: a run folder or checkpoint.
        data: the prepared folder whose tokenizer reads the text; None: the run's own.
        batch_size: sequences at a time; None or "auto": those of the run's evaluation.
        max_batch_size: the most of them under "auto".
        device: only that on which this process runs anyway.
        others: none; lm-eval would end with a traceback.

    Raises:
        ConfigError: as `overtone evaluate`; an argument that is not known, or of another kind.
    """

    def __init__(
        self,
        run: str,
        data: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise ConfigError(
                f"model_args {', '.join(sorted(others))}: this model takes run and data alone, and of lm-eval's "
                "options --batch_size, --max_batch_size and --device"
            )
        asked = _batch(batch_size, max_batch_size)
        ranks = process.start(cfg=settings_if_any(Path(run)))
        if ranks.world > 1:
            raise ConfigError(f"lm-eval was started on {ranks.world} ranks: this model runs on one process")
        _check_device(device, ranks.device)
        folder = RunFolder.containing(Path(run))
        cfg = folder.settings()
        self.text = open_tokenizer(Path(data) if data else cfg.data.path)
        if not cfg.model.causal:
            raise ConfigError(f"{run}: a masked model has no next token; lm-eval asks for a causal one")
        place = Path(data) if data else None
        self.model = folder.read(lambda path: folder.open_model(path, data=place, ranks=ranks), Path(run), ranks)
        self.length = cfg.model.seq_len
        most = math.inf if max_batch_size is None else int(max_batch_size)
        self.batch = asked or int(min(cfg.evaluation.micro_batch or cfg.train.micro_batch, most))
        self._device = ranks.device
        self._told: set[str] = set()  # warnings that are given once

    @property
    def eot_token_id(self) -> int:
        """The id of the end mark, which lm-eval puts where a context is empty."""
        return self.text.eos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once, for lm-eval."""
        return self.length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text, which has no end mark of its own; `add_special_tokens` puts one before it."""
        ids = self.text.encode(string)
        return self._after_eos(ids) if add_special_tokens else ids

    def _after_eos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == [self.text.eos_id] else [self.text.eos_id, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats after its context, and whether it is the greedy one.

        Raises:
            ConfigError: a continuation without a token, of which nothing can be said, or one too long for the model.
        """
        pairs: list[Pair] = []
        for number, request in enumerate(requests):
            context, continuation = request.args
            if not continuation:
                raise ConfigError(f"{_named(request, number)}: the continuation is empty. {NOTHING_TO_SCORE}")
            before, scored = self._encode_pair(context, continuation)
            if not scored:
                raise ConfigError(
                    f"{_named(request, number)}: the tokenizer gives the continuation {continuation!r} no token behind "
                    f"{context[-40:]!r}. {NOTHING_TO_SCORE}"
                )
            pairs.append(((context, continuation), before, scored))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, split where the ids of the whole text part from those of the context alone.

        Blanks at the context's end belong to the continuation, as lm-eval has it. Where the continuation's beginning
        and the context's end make one token, that token is scored: the text is the one that the model would read in
        training, and what is scored is the likelihood of its tokens from there on, a lower bound of the continuation's.
        """
        kept = context.rstrip()
        before, whole = self.text.encode(kept), self.text.encode(context + continuation)
        same = next((k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        if same < len(before) and len(whole) > same and "merged" not in self._told:
            self._told.add("merged")
            log.warning(
                f"the continuation {continuation!r} shares a token with the end of its context {kept[-40:]!r}: such "
                "tokens are scored with the continuation (said once)",
            )
        return whole[:same], whole[same:]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats, and whether every token of it is the most probable one."""
        if not all(continuation for _, _, continuation in requests):
            raise ConfigError(f"a continuation of no token. {NOTHING_TO_SCORE}")
        cut = sum(len(context) + len(continuation) > self.length + 1 for _, context, continuation in requests)
        if cut:
            log.warning(
                f"{cut} of {len(requests)} contexts are cut on the left, to the {self.length} tokens that the model "
                "can read with the continuation"
            )
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
        """The whole text's log-likelihood in nats, every token once, in windows without overlap.

        Raises:
            ConfigError: a text without a token.
        """
        totals = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.text.encode(text)
            if not ids:
                raise ConfigError(f"{_named(request, number)}: the text {text!r} has no token. {NOTHING_TO_SCORE}")
            windows = get_rolling_token_windows(ids, self.text.eos_id, self.length, 1)
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its `until`, the end mark or `max_gen_toks` tokens.

        A context is what the task is: it is read whole wherever the model can, and what is generated gets the positions
        that are left. Only a context that leaves no room for one token is cut, on the left.

        Raises:
            ConfigError: a setting of generation that is not known or malformed.
        """
        asked = [_Generation.of(*request.args) for request in requests]
        given = [self._after_eos(self.text.encode(one.context)) for one in asked]
        cut = sum(len(ids) > self.length for ids in given)
        short = sum(len(ids) + one.most - 1 > self.length for ids, one in zip(given, asked, strict=True))
        if cut:
            log.warning(
                f"{cut} of {len(given)} prompts are longer than the {self.length} tokens that the model reads: they "
                "are cut on the left, and one token is generated"
            )
        if short > cut:
            log.warning(
                f"{short - cut} of {len(given)} generations get less than the max_gen_toks that their task asks for "
                f"({MAX_NEW_TOKENS} where it does not say): what the prompt leaves of the model's {self.length} "
                "positions"
            )
        return [self._continued(ids[-self.length :], one) for ids, one in zip(given, asked, strict=True)]

    def _continued(self, given: list[int], asked: _Generation) -> str:
        most = min(asked.most, self.length - len(given) + 1)  # the last one drawn is not read any more
        tokens = torch.tensor(given, device=self._device)[None]
        draw = partial(generate, self.model.decoder, self.model.head, max_tokens=most, temperature=asked.temperature)
        ids: list[int] = []
        text = ""
        for token in draw(tokens, stop=(self.text.eos_id,)):
            ids.append(int(token))
            text = self.text.decode(ids)
            if any(end in text for end in asked.ends):
                break
        return text[: _first(text, asked.ends)]


@dataclass(frozen=True)
class _Generation:
    """What a request of generation asks for."""

    context: str
    ends: tuple[str, ...]  # of which the first one found ends the text
    most: int  # tokens
    temperature: float  # 0: greedy

    @classmethod
    def of(cls, context: str, settings: dict[str, Any]) -> _Generation:
        """Raises ConfigError for a setting that is not known or malformed."""
        if unknown := settings.keys() - GENERATION_SETTINGS:
            raise ConfigError(
                f"generation with {', '.join(sorted(unknown))}: only {sorted(GENERATION_SETTINGS)} are known"
            )
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else until
        if not isinstance(ends, list | tuple) or not all(isinstance(end, str) for end in ends):
            raise ConfigError(f"generation with until={until!r}: expected a text or a list of texts")
        most = settings.get("max_gen_toks")
        most = MAX_NEW_TOKENS if most is None else most
        if isinstance(most, bool) or not str(most).isdecimal() or int(most) < 1:
            raise ConfigError(f"generation with max_gen_toks={most!r}: expected a number of tokens from 1 on")
        sampled, heat = settings.get("do_sample") or False, settings.get("temperature")
        if not isinstance(sampled, bool):
            raise ConfigError(f"generation with do_sample={sampled!r}: expected true or false")
        try:
            temperature = 1.0 if heat is None else float(heat)
        except (TypeError, ValueError):
            temperature = math.nan
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"generation with temperature={heat!r}: expected a number from 0 on")
        return cls(context, tuple(end for end in ends if end), int(most), temperature if sampled else 0.0)


def _named(request: Any, number: int) -> str:
    """Which of a task's requests."""
    task, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    return f"request {number}" + (f" of the task {task}, document {document}" if task else "")


def _batch(batch_size: int | str | None, max_batch_size: int | str | None) -> int | None:
    """Sequences at a time; None: the run's own. Raises ConfigError."""
    given = "auto" if batch_size is None else str(batch_size)
    for option, value in (("batch_size", given.partition(":")[0]), ("max_batch_size", max_batch_size)):
        if value not in (None, "auto") and (not str(value).isdecimal() or int(value) < 1):
            raise ConfigError(f"--{option} {value}: expected a number of sequences from 1 on, or auto")
    return None if given.startswith("auto") else int(given.partition(":")[0])


def _check_device(asked: str | None, own: torch.device) -> None:
    """Raises ConfigError for another device than the process's own; lm-eval's default is nobody's wish."""
    try:
        device = None if asked in (None, LM_EVALS_DEVICE) else torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")  # none of ours
    if device is not None and (device.type != own.type or device.index not in (None, own.index)):
        raise ConfigError(
            f"--device {asked}: this process runs on {own}; leave it out, and choose with CUDA_VISIBLE_DEVICES (empty: "
            "the CPU)"
        )


def _first(text: str, ends: Iterable[str]) -> int:
    """Where the first of `ends` begins; else the text's length."""
    return min((text.index(end) for end in ends if end in text), default=len(text))


def main() -> int:
    """lm-eval's own command, with `overtone` among its models; exit code 2 for bad input of ours."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
