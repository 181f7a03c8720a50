"""lm-eval reads a run: likelihoods of continuations and whole texts, and greedy generation, on tasks of local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")

from data.settings import ConfigError  # noqa: E402
from pretrain import ranks as process  # noqa: E402
from pretrain.harness import Overtone  # noqa: E402
from tests.pretrain.test_evaluate import english  # noqa: E402, F401
from tests.pretrain.tiny import T  # noqa: E402

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
def model(english: Path) -> Iterator[Overtone]:  # noqa: F811
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


def greedy(model: Overtone, context: str, most: int) -> list[int]:
    ids = [model.eot_token_id, *model.tok_encode(context)][most - T :]
    for _ in range(most):
        ids.append(int(log_probs(model, ids)[-1].argmax()))
    return ids[-most:]


def test_generation_is_greedy_and_stops(model: Overtone) -> None:
    ids = greedy(model, "the model", 5)
    if model.eot_token_id in ids:
        ids = ids[: ids.index(model.eot_token_id)]
    text = model.text.decode(ids)
    assert text, "this model does not end at once"
    until = text[len(text) // 2]
    settings: list[dict[str, Any]] = [{"until": [], "max_gen_toks": 5}, {"until": until, "max_gen_toks": 5}]
    assert model.generate_until(asked(*(("the model", one) for one in settings))) == [text, text[: text.index(until)]]
    with pytest.raises(ConfigError, match="generation with beams"):
        model.generate_until(asked(("the", {"until": [], "beams": 3})))


def test_the_command_runs_local_tasks(model: Overtone, english: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(tmp_path / "rows.jsonl")))
    command = [sys.executable, "-m", "pretrain.harness", "run", "--model", "overtone"]
    command += ["--model_args", f"run={english / 'small'}", "--include_path", str(tmp_path)]
    command += ["--tasks", "choose", "roll", "write", "--output_path", str(tmp_path / "out.json")]
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}  # this process made a group
    alone = {**inherited, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
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
