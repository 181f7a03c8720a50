"""Results of a study that nobody ran: shaped like the real ones, with every case that a page must show."""

from __future__ import annotations

import math
import random
from typing import Any

HEADS = (
    "softmax",
    "euclidean",
    "cosine",
    "manhattan",
    "chebyshev",
    "minkowski",
    "canberra",
    "braycurtis",
    "hamming",
    "mahalanobis",
)
DIVERGED = "hamming"
RATES = (0.001, 0.003, 0.01)
SEEDS = (1, 2, 3)
STEPS, PER_STEP, WIDTH = 600, 4096, 128
HOSTILE = ("<b>bold</b>", "&amp;", "\"double\" 'single'", "line\nbreak", "</script><script>alert(1)</script>", "\t", "")
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an".split()  # noqa: SIM905
UNIGRAM = 3.05


def study_results(energy: bool = False) -> dict[str, Any]:
    chance = random.Random(7)
    return {
        "name": "small",
        "title": "Ten output heads on a small language model",
        "machine": "2 cores of a machine, 8 GiB, no GPU",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
        "revision": "abc1234",
        "data": {
            "path": "prepared/pydoc",
            "fingerprint": "9f2c41d07be5a3346c1f",
            "train_tokens": 812_345,
            "val_tokens": 20_480,
            "val_documents": 57,
            "val_bytes": 71_234,
            "unigram_bits_per_byte": UNIGRAM,
        },
        "model": {
            "layers": 3,
            "dim": WIDTH,
            "heads": 4,
            "seq_len": 128,
            "vocab_size": 2048,
            "parameters": 1_181_824,
        },
        "budget": {"steps": STEPS, "tokens": STEPS * PER_STEP, "tokens_per_step": PER_STEP},
        "seeds": list(SEEDS),
        "lrs": list(RATES),
        "baseline": "softmax",
        "measured": ["gpu"] if energy else [],
        "not_measured": {} if energy else {"gpu": "no NVIDIA GPU", "cpu": "no RAPL counter that may be read"},
        "heads": [_head(name, place, energy, chance) for place, name in enumerate(HEADS)],
        "runs": [
            {
                "head": name,
                "lr": lr,
                "seed": 1,
                "outcome": "diverged" if name == DIVERGED else "done",
                "bits_per_byte": None if name == DIVERGED else 1.9,
            }
            for name in HEADS
            for lr in RATES
        ],
    }


def _head(name: str, place: int, energy: bool, chance: random.Random) -> dict[str, Any]:
    sweep = [{"lr": lr, "seed": seed, **_outcome(name, place, lr, seed, chance)} for lr, seed in _runs(name)]
    return {
        "name": name,
        "distance": "dot" if name == "softmax" else name,
        "exponent": None if name == "softmax" else "sqrt_dim",
        "sweep": sweep,
        "started": len(sweep),
        "diverged": sum(entry["outcome"] == "diverged" for entry in sweep),
        "seeds": list(SEEDS),
        **(NOTHING if name == DIVERGED else _figures(name, place, energy, chance)),
    }


JUDGED = {"judged": STEPS - 60.0, "first": 40, "window": 21}
NOTHING: dict[str, Any] = {  # of a head without a result
    **dict.fromkeys(("lr", "bits_per_byte", "difference", "tokens_per_s", "seconds_per_token", "j_per_token", "pca90")),
    **dict.fromkeys(("effective_rank", "participation_ratio", "first_2", "scree", "projection")),
    "lr_at_edge": False,
    "gradient_stability": {"residual_variance": None, "spikes": None, "judged": 0, "first": 40, "window": 21},
    "learning_stability": {"residual_variance": None, "spikes": None, "judged": 0, "largest_rise": None},
    "train_curve": [],
    "eval_curve": [],
    "norms": {},
}


def _figures(name: str, place: int, energy: bool, chance: random.Random) -> dict[str, Any]:
    rate = _chosen(name)
    values = [round(_final(place) + chance.gauss(0, 0.006), 4) for _ in SEEDS]
    mean = sum(values) / len(values)
    off = mean - _final(0)
    per_token = 2e-5 * (1 + 0.6 * place)
    joules = 3e-4 * (1 + 0.5 * place) if energy else None
    variances = [math.exp(-(0.05 + 0.012 * place) * k) for k in range(WIDTH)]
    scree = [sum(variances[: k + 1]) / sum(variances) for k in range(WIDTH)]
    documents = {"documents_low": off - 0.02, "documents_high": off + 0.02}
    return {
        "lr": rate,
        "lr_at_edge": rate in (RATES[0], RATES[-1]),
        "bits_per_byte": {"mean": mean, "low": mean - 0.012, "high": mean + 0.012, "values": values},
        "difference": None
        if name == "softmax"
        else {"mean": off, "low": off - 0.015, "high": off + 0.015, **documents},
        "tokens_per_s": 1 / per_token,
        "seconds_per_token": per_token,
        "j_per_token": joules,
        "gradient_stability": {**JUDGED, "residual_variance": 0.02 * (1 + place), "spikes": place / 3},
        "learning_stability": {**JUDGED, "residual_variance": 0.01, "spikes": 0, "largest_rise": 0.001},
        "pca90": next(k for k, share in enumerate(scree, 1) if share >= 0.9) + 1 / 3,
        "displacement_pca90": 26.0 + place,
        "hidden_pca90": 40.0 + 2 * place,
        "start_share": 0.5 + 0.01 * place,
        "count_correlation": 0.9,
        "effective_rank": 90.0 - 4 * place,
        "participation_ratio": 40.0 - 2 * place,
        "first_2": scree[1],
        **_curves(place, per_token, joules, chance),
        "scree": scree,
        "projection": {"explained": [scree[0], scree[1] - scree[0]], "points": _points(place, chance)},
        "norms": {
            str(step): {"median": 1 + 0.2 * place + step / 400, "max/median": 1.2 + (step / 100) ** (1 + place / 8)}
            for step in range(0, STEPS + 1, 100)
        },
    }


def _curves(place: int, per_token: float, joules: float | None, chance: random.Random) -> dict[str, Any]:
    last = _final(place) * 1.9
    held_out = [_point(step, per_token, joules, 7.4, last, 0.0) for step in range(0, STEPS + 1, 50)]
    return {
        "train_curve": [
            _point(step, per_token, joules, 7.6 * 0.78, last, chance.gauss(0, 0.05)) for step in range(1, STEPS + 1)
        ],
        "eval_curve": [{**point, "bits_per_byte": point["loss"] / 1.9 if point["step"] else 3.9} for point in held_out],
    }


def _chosen(name: str) -> float:
    return RATES[0] if name == "cosine" else RATES[1]


def _runs(name: str) -> list[tuple[float, int]]:
    return [(lr, 1) for lr in RATES] + [(_chosen(name), seed) for seed in SEEDS[1:]]


def _outcome(name: str, place: int, lr: float, seed: int, chance: random.Random) -> dict[str, Any]:
    if name == DIVERGED or (name == "canberra" and lr == RATES[-1]):
        return {"bits_per_byte": None, "outcome": "diverged"}
    if name == "minkowski" and lr == RATES[0]:
        return {"bits_per_byte": None, "outcome": "failed"}
    off = {RATES[0]: 0.0 if name == "cosine" else 0.12, RATES[1]: 0.06 if name == "cosine" else 0.0}.get(lr, 0.3)
    return {"bits_per_byte": _final(place) + off + chance.gauss(0, 0.006), "outcome": "done"}


def _final(place: int) -> float:
    return (1.90, 1.86, 1.88, 1.905, 2.20, 1.87, 2.45, 2.02, 2.5, 1.84)[place]


def _point(
    step: int, per_token: float, joules: float | None, first: float, last: float, noise: float
) -> dict[str, Any]:
    tokens = step * PER_STEP
    return {
        "step": step,
        "tokens": tokens,
        "seconds": tokens * per_token,
        "joules": None if joules is None else tokens * joules,
        "loss": last + (first - last) * math.exp(-step / 90) + noise,
    }


def _points(place: int, chance: random.Random) -> list[list[Any]]:
    texts = [*HOSTILE, *(f"▁{word}" for word in WORDS), *(f"▁w{k}" for k in range(265))]
    return [
        [chance.gauss(0, 1 + place / 5), chance.gauss(0, 1), text, 40_000 // (rank + 1)]
        for rank, text in enumerate(texts)
    ]
