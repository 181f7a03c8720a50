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
AT_EDGE = "cosine"
SEEDS = (11, 12, 13)
TRIALS = 8
STEPS, PER_STEP, WIDTH = 600, 4096, 128
HOSTILE = ("<b>bold</b>", "&amp;", "\"double\" 'single'", "line\nbreak", "</script><script>alert(1)</script>", "\t", "")
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an".split()  # noqa: SIM905
UNIGRAM = 3.05


def study_results(energy: bool = False, settled: bool = False) -> dict[str, Any]:
    """`settled`: no choice lies at an edge."""
    chance = random.Random(7)
    heads = [_head(name, place, energy, settled, chance) for place, name in enumerate(HEADS)]
    edge = {"head": AT_EDGE, "setting": "lr", "value": 0.0291, "end": "high", "tried": "0.001 to 0.03"}
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
            "val_unigram_bits_per_byte": UNIGRAM,
            "test_tokens": 40_960,
            "test_documents": 81,
            "test_bytes": 142_468,
            "test_unigram_bits_per_byte": UNIGRAM,
        },
        **_size(WIDTH, 1_181_824),
        "shown": "d128",
        "seeds": list(SEEDS),
        "baseline": "softmax",
        "protocol": PROTOCOL,
        "chosen": True,
        "settled": settled,
        "edges": [] if settled else [{**edge, "try": "0.001 to 0.16", "behind": 0.0031, "spread": 0.002, "open": True}],
        "best": "mahalanobis" if settled else None,
        "measured": ["gpu"] if energy else [],
        "not_measured": {} if energy else {"gpu": "no NVIDIA GPU", "cpu": "no RAPL counter that may be read"},
        "sizes": [
            {
                "name": f"d{dim}",
                **_size(dim, parameters),
                "smallest_difference": 0.0213,
                "heads": [{"name": head["name"], "difference": head["difference"]} for head in heads],
            }
            for dim, parameters in ((64, 371_000), (WIDTH, 1_181_824))
        ],
        "heads": heads,
        "runs": [
            {"head": name, "size": "d128", "seed": seed, "outcome": "diverged" if name == DIVERGED else "done"}
            for name in HEADS
            for seed in SEEDS
        ],
    }


PROTOCOL: dict[str, Any] = {
    "trials": TRIALS,
    "counts": [TRIALS, 3],
    "rungs": [0.5, 1.0],
    "steps": [STEPS // 2, STEPS],
    "keep": 0.34,
    "seed": 1,
    "tuned_at": "d64",
    "space": {
        "lr": {"about": "learning rate", "low": 0.001, "high": 0.03},
        "warmup": {"about": "warm-up, share of the steps", "low": 0.02, "high": 0.3},
        "prototype_decay": {"about": "weight decay of the prototypes", "values": [0.0, 0.1]},
    },
    "lr_floor": 0.1,
    "comparisons": len(HEADS) - 1,
    "level": 0.95,
    "power": 0.8,
    "smallest_in_deviations": 9.87,
    "edges_by_chance": 9.0,
    "warnings": ["3 seeds: with fewer than 5 an interval means little."],
}


def _size(dim: int, parameters: int) -> dict[str, Any]:
    return {
        "model": {
            **{"layers": 3, "dim": dim, "heads": 4, "seq_len": 128, "vocab_size": 2048},
            "parameters": parameters,
        },
        "budget": {"steps": STEPS, "tokens": STEPS * PER_STEP, "tokens_per_step": PER_STEP},
    }


def _head(name: str, place: int, energy: bool, settled: bool, chance: random.Random) -> dict[str, Any]:
    lost = name == DIVERGED
    trials = _trials(name, place, chance)
    best = min((trial for trial in trials if trial["bits_per_byte"] is not None), key=_bits, default=None)
    setting = None if best is None else dict(best["setting"])
    if name == AT_EDGE and setting and not settled:
        setting["lr"] = 0.0291
    known = {"source": "a paper <1>", "settings": {"lr": 0.006}, "ratios": {"lr": 4.85}}
    curse = {"trial": 1.88, "fresh": 1.9, "mean": 0.02, "low": 0.01, "high": 0.03}
    return {
        "name": name,
        "distance": "dot" if name == "softmax" else name,
        "exponent": None if name == "softmax" else "sqrt_dim",
        "trials": trials,
        "own_space": {"lr": PROTOCOL["space"]["lr"]} if name == "canberra" else {},
        "spent": {
            "trials": TRIALS,
            "runs": len(trials),
            "diverged": sum(trial["outcome"] == "diverged" for trial in trials),
            "tokens": 12_345_678,
        },
        "chosen": None if best is None else {"trial": best["trial"], "setting": setting, "run": {"lr": setting["lr"]}},
        "at_edge": ["lr"] if name == AT_EDGE and not settled else [],
        "known": known if name == "euclidean" else None,
        "winners_curse": None if lost else curse,
        "trend": None,
        "started": 0 if lost else len(SEEDS),
        "diverged": 0,
        "waiting": 0,
        "seeds": [] if lost else list(SEEDS),
        **(NOTHING if lost else _figures(name, place, energy, chance)),
    }


def _bits(trial: dict[str, Any]) -> float:
    return float(trial["bits_per_byte"])


def _trials(name: str, place: int, chance: random.Random) -> list[dict[str, Any]]:
    trials = []
    for rung, count in enumerate((TRIALS, 3)):
        for number in range(count):
            lost = name == DIVERGED or (name == "canberra" and number == 1)
            setting = {
                "lr": 0.001 * 30 ** ((number + 0.5) / TRIALS),
                "warmup": 0.02 * 15 ** ((5 * number % TRIALS + 0.5) / TRIALS),
                "prototype_decay": 0.1 * (number % 2),
            }
            bits = None if lost else _final(place) + 0.3 - 0.1 * rung + chance.gauss(0, 0.05)
            outcome = "diverged" if lost else "done"
            trials.append(
                {"trial": number, "rung": rung, "setting": setting, "outcome": outcome, "bits_per_byte": bits}
            )
    return [trial for trial in trials if name != DIVERGED or not trial["rung"]]


JUDGED = {"judged": STEPS - 60.0, "first": 40, "window": 21}
NOTHING: dict[str, Any] = {  # of a head without a result
    **dict.fromkeys(("bits_per_byte", "difference", "tokens_per_s", "seconds_per_token", "j_per_token", "pca90")),
    **dict.fromkeys(("effective_rank", "participation_ratio", "first_2", "scree", "projection")),
    "gradient_stability": {"residual_variance": None, "spikes": None, "judged": 0, "first": 40, "window": 21},
    "learning_stability": {"residual_variance": None, "spikes": None, "judged": 0, "largest_rise": None},
    "train_curve": [],
    "eval_curve": [],
    "norms": {},
}


def _figures(name: str, place: int, energy: bool, chance: random.Random) -> dict[str, Any]:
    values = [round(_final(place) + chance.gauss(0, 0.006), 4) for _ in SEEDS]
    mean = sum(values) / len(values)
    off = mean - _final(0)
    per_token = 2e-5 * (1 + 0.6 * place)
    joules = 3e-4 * (1 + 0.5 * place) if energy else None
    variances = [math.exp(-(0.05 + 0.012 * place) * k) for k in range(WIDTH)]
    scree = [sum(variances[: k + 1]) / sum(variances) for k in range(WIDTH)]
    gap = {"mean": off, "p": 0.0123, "corrected_p": 0.0456, "smallest": 0.02, "values": [off, off]}
    for prefix, half in (("", 0.012), ("corrected_", 0.015), ("seeds_", 0.01), ("documents_", 0.006)):
        gap |= {f"{prefix}low": off - half, f"{prefix}high": off + half}
    return {
        "bits_per_byte": {"mean": mean, "low": mean - 0.012, "high": mean + 0.012, "values": values},
        "difference": None if name == "softmax" else gap,
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
