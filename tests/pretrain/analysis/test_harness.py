"""lm-eval reads a run: likelihoods of continuations and whole texts, and greedy generation, on tasks of local files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")

from common.errors import ConfigError  # noqa: E402
from model.sample import generate  # noqa: E402
from pretrain.analysis import harness  # noqa: E402
from pretrain.analysis.harness import Overtone  # noqa: E402
from pretrain.runtime import ranks as process  # noqa: E402
from tests.support.commands import call  # noqa: E402
from tests.support.tiny import T  # noqa: E402

TASKS = {
    "choose": """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "roll": """
task: roll
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "write": """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
}
ROWS = [
    {"question": "the model reads", "choices": [" a", " it"], "answer": 0, "text": "a page of words"},
    {
        "question": "because it",
        "choices": [" has", " it"],
        "answer": 1,
        "text": "the model says what comes next",
    },
]


@pytest.fixture(scope="module")
def model(english: Path) -> Iterator[Overtone]:
    with mock.patch.dict(os.environ):  # a process group leaves its variables behind
        yield Overtone(run=str(english / "small"), batch_size=3)
        process.stop()


def log_probs(model: Overtone, ids: list[int]) -> torch.Tensor:
    """(T, V) of what follows each of `ids`."""
    return model.model.head.log_probs(model.model.hidden(torch.tensor(ids)[None]))[0]


def asked(*pairs: Any) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_continuations_have_the_heads_likelihood_whatever_the_batch(model: Overtone) -> None:
    pairs = [("the", " m"), ("", "th"), ("a", " page of words"[:4]), ("it", " sa"), ("so" * 30, "on")]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    eos = model.eot_token_id
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        before, whole = model.tok_encode(context), model.tok_encode(context + continuation)
        ids = [eos, *whole][-T - 1 :]
        count = len(whole) - len(before)
        logs = log_probs(model, ids[:-1])[-count:]
        expected = logs.gather(1, torch.tensor(ids[-count:])[:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-4), (context, continuation)
        assert greedy == (logs.argmax(1).tolist() == ids[-count:])
    first = int(log_probs(model, [eos])[-1].argmax())
    pairs_of_ids = [("", [eos], [first]), ("", [eos], [first + 1]), ("", [], [first])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(pairs_of_ids)] == [True, False, True]
    with pytest.raises(ConfigError, match="but the model has 8 positions"):
        model.loglikelihood(asked(("a", " word" * 30)), disable_tqdm=True)


def test_a_whole_text_is_scored_once_in_windows(model: Overtone) -> None:
    text = "the model reads a page of plain words and says what comes next"
    ids = model.tok_encode(text)
    assert len(ids) > 2 * T and len(ids) % T, "several windows and a rest"
    expected, stream = 0.0, [model.eot_token_id, *ids]
    for first in range(0, len(ids), T):
        last = min(first + T, len(ids))
        inputs = stream[last - T if last - T > 0 else 0 : last]  # a window without overlap, but the last one is full
        logs = log_probs(model, inputs)[first - last :]
        expected += logs.gather(1, torch.tensor(ids[first:last])[:, None]).sum().item()
    (found,) = model.loglikelihood_rolling(asked((text,)))
    assert found == pytest.approx(expected, abs=1e-4)


def greedy(model: Overtone, context: str, most: int) -> str:
    """What the most probable tokens say after the whole context, or its last T tokens, while there are positions."""
    ids = [model.eot_token_id, *model.tok_encode(context)][-T:]
    given = len(ids)
    while len(ids) < min(given + most, T + 1) and (len(ids) == given or ids[-1] != model.eot_token_id):
        ids.append(int(log_probs(model, ids)[-1].argmax()))
    return model.text.decode(ids[given:])


def fitting(model: Overtone, tokens: int) -> str:
    """A context of so many tokens, its end mark among them."""
    text = "the model reads it " * 9
    return next(text[:n] for n in range(len(text)) if len(model.tok_encode(text[:n])) + 1 == tokens)


def test_generation_is_greedy_and_stops(model: Overtone) -> None:
    context = fitting(model, 3)
    text = greedy(model, context, 5)
    assert len(text) > 2, "this model does not end at once"
    until = text[len(text) // 2]
    settings: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 5},
        {"until": until, "max_gen_toks": 5},
        {"until": ["\n\n\n", "", until], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7},
    ]
    cut = text[: text.index(until)]
    assert model.generate_until(asked(*((context, one) for one in settings))) == [text, cut, cut]


@pytest.mark.parametrize("tokens", [2, T - 1, T, T + 5])
@pytest.mark.parametrize("most", [1, 3, T - 1, T, 20 * T, None])
def test_a_prompt_is_read_whole_whatever_is_to_be_generated(
    model: Overtone, tokens: int, most: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = []

    def watched(decoder: Any, head: Any, given: torch.Tensor, **settings: Any) -> Any:
        read.append((given.shape[1], settings["max_tokens"]))
        return generate(decoder, head, given, **settings)

    monkeypatch.setattr(harness, "generate", watched)
    context = fitting(model, tokens)
    settings: dict[str, Any] = {"until": []} | ({} if most is None else {"max_gen_toks": most})
    found = model.generate_until(asked((context, settings), (context, settings)))
    wanted = most or harness.MAX_NEW_TOKENS
    room = max(1, T + 1 - tokens)
    assert read == [(min(tokens, T), min(wanted, room))] * 2
    assert found == [greedy(model, context, wanted)] * 2
    told = [record.getMessage() for record in caplog.records if record.name == harness.log.name]
    assert len(told) == (tokens > T or wanted > room), "told once, however many there are"
    assert all("2 of 2 prompts are longer than the 8" in one for one in told) == (tokens > T or not told)


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"beams": 3}, "generation with beams"),
    ({"max_gen_toks": 0}, "max_gen_toks=0: expected a number of tokens from 1 on"),
    ({"max_gen_toks": -8}, "max_gen_toks=-8"),
    ({"max_gen_toks": "many"}, "max_gen_toks='many'"),
    ({"max_gen_toks": 2.5}, "max_gen_toks=2.5"),
    ({"until": 3}, "until=3: expected a text"),
    ({"until": ["a", 3]}, "until="),
    ({"do_sample": "no"}, "do_sample='no'"),
    ({"do_sample": True, "temperature": -1}, "temperature=-1"),
    ({"do_sample": True, "temperature": "hot"}, "temperature='hot'"),
]


@pytest.mark.parametrize(("settings", "told"), BAD_SETTINGS, ids=[told for _, told in BAD_SETTINGS])
def test_settings_of_generation_that_make_no_sense_are_refused(model: Overtone, settings: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        model.generate_until(asked(("the", {"until": [], **settings})))


def merging(model: Overtone) -> tuple[str, str]:
    """A context and a continuation that is a part of the context's last token, as the whole text has it."""
    for index in range(model.text.vocab_size):
        piece = model.text.decode([index])
        if len(piece) > 1 and piece.isalpha() and model.tok_encode(f"a {piece}")[-1:] == [index]:
            context = f"a {piece[:-1]}"
            if len(model.tok_encode(context)) >= len(model.tok_encode(f"a {piece}")):
                return context, piece[-1]
    raise AssertionError("no piece of two letters")


def test_a_continuation_within_the_contexts_last_token_is_scored_with_that_token(
    model: Overtone, caplog: pytest.LogCaptureFixture
) -> None:
    context, continuation = merging(model)
    before, whole = model.tok_encode(context), model.tok_encode(context + continuation)
    assert not whole[len(before) :], "what is behind the context's tokens is nothing"
    same = next(k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    ids = [model.eot_token_id, *whole]
    logs = log_probs(model, ids[:-1])[same:]
    expected = logs.gather(1, torch.tensor(whole[same:])[:, None]).sum().item()
    model._told.clear()
    found = model.loglikelihood(asked((context, continuation), (context, continuation)), disable_tqdm=True)
    assert [score for score, _ in found] == [pytest.approx(expected, abs=1e-4)] * 2 and expected < -1e-3
    assert found[0][1] == (logs.argmax(1).tolist() == whole[same:])
    assert caplog.text.count("shares a token with the end of its context") == 1


def test_blanks_are_scored_as_the_tokens_they_are(model: Overtone) -> None:
    whole = model.tok_encode("it ")
    same = len(model.tok_encode("it"))
    logs = log_probs(model, [model.eot_token_id, *whole[:-1]])
    expected = sum(logs[k, whole[k]].item() for k in range(same, len(whole)))
    ((score, _),) = model.loglikelihood(asked(("it", " ")), disable_tqdm=True)
    assert len(whole) > same and score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("context", ["", "the model", "the model ", " "])
def test_a_continuation_of_nothing_is_refused_and_never_certain(model: Overtone, context: str) -> None:
    request = SimpleNamespace(args=(context, ""), task_name="choose", doc_id=7)
    with pytest.raises(ConfigError, match="request 1 of the task choose, document 7: the continuation is empty"):
        model.loglikelihood([*asked(("the", " it")), request], disable_tqdm=True)
    with pytest.raises(ConfigError, match="a continuation of no token"):
        model._loglikelihood_tokens([((context, ""), model.tok_encode(context), [])])


def test_a_continuation_that_the_tokenizer_drops_is_refused(model: Overtone, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = model.text.encode
    monkeypatch.setattr(model.text, "encode", lambda text: encode(text.rstrip()))
    with pytest.raises(ConfigError, match=r"request 0: the tokenizer gives the continuation ' ' no token behind 'it'"):
        model.loglikelihood(asked(("it", " ")), disable_tqdm=True)


def test_a_text_of_nothing_is_refused(model: Overtone) -> None:
    with pytest.raises(ConfigError, match="request 0: the text '' has no token"):
        model.loglikelihood_rolling(asked(("",)))


def test_a_context_that_is_cut_is_told_and_a_window_is_not(model: Overtone, caplog: pytest.LogCaptureFixture) -> None:
    model.loglikelihood_rolling(asked(("the model reads a page of plain words",)))
    assert "cut on the left" not in caplog.text
    model.loglikelihood(asked(("so" * 30, " on"), ("a", " b"), ("no" * 30, " on")), disable_tqdm=True)
    assert "2 of 3 contexts are cut on the left, to the 8 tokens" in caplog.text


def test_special_tokens_are_added_where_they_are_asked_for(model: Overtone) -> None:
    ids = model.tok_encode("it")
    assert model.tok_encode("it", add_special_tokens=False) == ids
    assert model.tok_encode("it", add_special_tokens=True) == [model.eot_token_id, *ids]
    with pytest.raises(TypeError):
        model.tok_encode("it", truncation=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"dtype": "float16"}, "model_args dtype: this model takes run and data alone"),
        ({"batch_size": "many"}, "--batch_size many: expected"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"max_batch_size": "x"}, "--max_batch_size x"),
        ({"device": "cuda:7"}, "--device cuda:7: this process runs on cpu"),
        ({"device": "gpu"}, "--device gpu"),
    ],
)
def test_arguments_that_cannot_be_kept_are_refused(
    model: Overtone,
    english: Path,
    arguments: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        Overtone(run=str(english / "small"), **arguments)


def test_an_automatic_batch_has_its_limit(model: Overtone, english: Path) -> None:
    run = str(english / "small")
    assert Overtone(run=run, batch_size="auto:2", max_batch_size=2, device="cpu").batch == 2
    assert Overtone(run=run, device=harness.LM_EVALS_DEVICE).batch == 4
    assert Overtone(run=run).batch == 4 and Overtone(run=run, batch_size="16", max_batch_size=2).batch == 16


@pytest.mark.slow
def test_the_command_runs_local_tasks(model: Overtone, english: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(tmp_path / "rows.jsonl")))
    command = ["run", "--model", "overtone", "--model_args", f"run={english / 'small'}"]
    command += ["--include_path", str(tmp_path), "--tasks", "choose", "roll", "write"]
    command += ["--output_path", str(tmp_path / "out.json")]
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}  # this process made a group
    alone = {**inherited, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = call("-m", "pretrain.harness", *command, environment=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = tmp_path.glob("**/out*.json")
    found = json.loads(report.read_text())["results"]
    assert found["choose"]["acc,none"] in (0, 0.5, 1)
    nats = -sum(model.loglikelihood_rolling(asked(*((row["text"],) for row in ROWS))))
    text_bytes = sum(len(str(row["text"]).encode()) for row in ROWS)
    assert found["roll"]["bits_per_byte,none"] == pytest.approx(nats / text_bytes / 0.6931471805599453, rel=1e-6)
    assert "exact_match,none" in found["write"]


def test_a_missing_run_is_refused(model: Overtone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run folder"):
        Overtone(run=str(tmp_path))
