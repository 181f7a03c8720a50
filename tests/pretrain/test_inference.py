"""Sampling from a model: greedy is the head's prediction at every step, and rows end where they should."""

from __future__ import annotations

import pytest
import torch

from model.sample import generate
from pretrain.inference import Model
from pretrain.modules import build_modules
from pretrain.runtime.ranks import Ranks
from tests.support.shards import EOS
from tests.support.tiny import T, V, tiny_config


def model(**changes: object) -> Model:
    cfg = tiny_config(**changes)
    return Model(cfg, *build_modules(cfg, Ranks(0, 1, 0, 1, torch.device("cpu"))), step=1, eos_id=EOS)


@pytest.mark.parametrize(
    "changes", [{}, {"model__tied": True, "head__distance": "cosine"}, {"train__precision": "bf16"}]
)
def test_greedy_takes_the_most_probable_token(changes: dict[str, object]) -> None:
    made = model(**changes)
    tokens = torch.randint(0, V, (3, 2), generator=torch.Generator().manual_seed(1))
    found = torch.stack(list(generate(made.decoder, made.head, tokens, max_tokens=T - 1, temperature=0)), 1)
    assert found.shape == (3, T - 1)
    for step in range(T - 1):
        read = torch.cat((tokens, found[:, :step]), 1)
        assert torch.equal(found[:, step], made.head.log_probs(made.hidden(read)[:, -1]).argmax(-1))


def test_rows_repeat_their_stop_token_until_all_have_one() -> None:
    made = model()
    tokens = torch.randint(0, V, (2, 2), generator=torch.Generator().manual_seed(2))
    free = torch.stack(list(generate(made.decoder, made.head, tokens, max_tokens=4, temperature=0)), 1)
    stop = {int(free[0, 1]), int(free[1, 0])}
    found = torch.stack(list(generate(made.decoder, made.head, tokens, max_tokens=4, temperature=0, stop=stop)), 1)
    for row, plain in zip(found.tolist(), free.tolist(), strict=True):
        first = next(k for k, token in enumerate(plain) if token in stop)
        assert row == [*plain[: first + 1], *[plain[first]] * (len(row) - first - 1)]
    assert found.shape[1] <= 2


def test_draws_follow_the_probabilities() -> None:
    made = model(head__exponent=60.0)
    tokens = torch.full((4000, 1), 7)
    drawn = next(
        iter(generate(made.decoder, made.head, tokens, max_tokens=1, generator=torch.Generator().manual_seed(0)))
    )
    expected = made.head.log_probs(made.hidden(tokens[:1])[:, -1])[0].exp()
    shares = torch.bincount(drawn, minlength=V) / len(drawn)
    assert (shares - expected).abs().max() < 5 * (expected.max() / len(drawn)).sqrt()
