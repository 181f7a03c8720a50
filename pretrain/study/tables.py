"""What a study prints: its results in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from pretrain.study.search import Planned

Entry = Mapping[str, Any]


def language(results: Entry) -> Table:
    """Heads by row, at the size that is shown."""
    columns: dict[str, Callable[[Entry], str]] = {
        "head": lambda head: head["name"],
        "lr": lambda head: _chosen(head, "lr"),
        "at an edge": lambda head: ", ".join(head["at_edge"]) or "-",
        "test bits/byte": lambda head: _with_bounds(head["bits_per_byte"], "{:.4f}"),
        f"less {results['baseline']}": lambda head: _with_bounds(head["difference"], "{:+.4f}"),
        "p, corrected": lambda head: _written((head["difference"] or {}).get("corrected_p"), "{:.3g}"),
        "too good by": lambda head: _written((head["winners_curse"] or {}).get("mean"), "{:+.4f}"),
        "trials, runs": lambda head: f"{head['spent']['trials']}, {head['spent']['runs']}",
        "tokens spent": lambda head: f"{head['spent']['tokens']:,}",
        "tokens/s": lambda head: _written(head["tokens_per_s"], "{:,.0f}"),
        "J/token": lambda head: _written(head["j_per_token"], "{:.3e}", "not measured"),
        "diverged": lambda head: f"{head['diverged']} of {head['started']}",
    }
    title = f"size {results['shown']}"
    if not results["settled"]:
        title += "; not settled: nothing is called the best while a chosen setting lies at an edge, or none is chosen"
    table = Table(*columns, title=title)
    for head in results["heads"]:
        table.add_row(*(cell(head) for cell in columns.values()))
    return table


def _chosen(head: Entry, name: str) -> str:
    return _written(((head["chosen"] or {}).get("run") or {}).get(name), "{:g}")


def plan(planned: Sequence[Planned]) -> Table:
    """What a study takes, a row for each head, size and rung, and in all."""
    table = Table("head", "size", "what", "runs", "steps of each", "tokens", title="if no trial diverges")
    for one in planned:
        table.add_row(one.head, one.size, one.what, f"{one.runs:,}", f"{one.steps:,}", f"{one.tokens:,}")
    table.add_section()
    runs, steps = sum(one.runs for one in planned), sum(one.runs * one.steps for one in planned)
    table.add_row("all", "", "", f"{runs:,}", f"{steps:,} in all", f"{sum(one.tokens for one in planned):,}")
    return table


def algorithmic(results: Entry) -> Table:
    """A row for each task, network and head; all but the data needed and the cells that never generalised is at the
    largest fraction.
    """
    columns: dict[str, Callable[[Entry, Entry], str]] = {
        "task": lambda entry, at: entry["task"],
        "network": lambda entry, at: entry["network"],
        "head": lambda entry, at: entry["head"],
        "rate, decay": lambda entry, at: f"{entry['lr']:g}, {entry['weight_decay']:g}",
        "data needed": lambda entry, at: _written(entry["data_needed"], "{:.0%}", "more"),
        "never": lambda entry, at: f"{entry['never']} of {_total(entry, 'seeds')}",
        "diverged": lambda entry, at: str(_total(entry, "diverged")),
        "of the examples": lambda entry, at: f"{at['fraction']:.0%}",
        "epochs to 95%": lambda entry, at: _written(at["median_epochs_to_generalise"], "{:.0f}", "never"),
        "test accuracy": lambda entry, at: _with_deviation(at["test_accuracy"], "{:.0%}"),
        "prototypes: 2 components": lambda entry, at: _with_deviation(at["prototypes_explained"], "{:.0%}"),
        "crystal": lambda entry, at: _with_deviation(at["prototypes_crystal"], "{:.2f}"),
        "embedding: 2 components": lambda entry, at: _with_deviation(at["embedding_explained"], "{:.0%}"),
    }
    table = Table(*columns, title="epochs as medians, all else as means over seeds")
    last = None
    for entry in results["summary"]:
        if last not in (None, (entry["task"], entry["network"])):
            table.add_section()
        last = entry["task"], entry["network"]
        table.add_row(*(cell(entry, entry["fractions"][-1]) for cell in columns.values()))
    return table


def vision(results: Entry) -> Table:
    """A row for each data set, network and head: of the test part, over seeds."""
    base = results["config"]["baseline"]
    choices = {(entry["data"], entry["network"], entry["head"]): entry for entry in results["choices"]}
    against = {(entry["data"], entry["network"], entry["head"]): entry for entry in results["comparison"]}
    trials = len(results["choices"][0]["trials"])
    robust = [name for name in results["summary"][0] if name.startswith(("accuracy_noise", "accuracy_fgsm"))]
    table = Table(
        *("data", "network", "head", "rate, decay, start", "accuracy", f"less {base} (Holm)", "loss"),
        *(name.removeprefix("accuracy_").replace("_", " ") for name in robust),
        *("images/s", "J/image", "diverged"),
        title=f"test part, means over seeds; {trials} trials of each head; *: at an edge of what was tried",
    )
    last = None
    for entry in results["summary"]:
        key = entry["data"], entry["network"], entry["head"]
        if last not in (None, key[:2]):
            table.add_section()
        last, chosen = key[:2], choices[key]
        setting = ", ".join(
            f"{chosen[name]:g}{'*' * (name in chosen['edges'])}" for name in ("lr", "weight_decay", "init")
        )
        difference = against[key]["accuracy"] if key in against else None
        table.add_row(
            *(*key, setting, _with_bounds(entry["accuracy"], "{:.1%}")),
            _with_bounds(difference, "{:+.1%}"),
            _written(entry["loss"]["mean"], "{:.3f}"),
            *(_written(entry[name]["mean"], "{:.1%}") for name in robust),
            _written(entry["images_per_s"]["mean"], "{:,.0f}"),
            _written(entry["j_per_image"]["mean"], "{:.2e}", "not measured"),
            f"{entry['diverged']} of {entry['seeds']}",
        )  # fmt: skip
    return table


def _total(entry: Entry, name: str) -> int:
    return sum(at_fraction[name] for at_fraction in entry["fractions"])


def _with_bounds(interval: Entry | None, form: str) -> str:
    if interval is None:
        return "-"
    mean, low, high = (_written(interval[key], form) for key in ("mean", "low", "high"))
    return mean if interval["low"] is None else f"{mean} [{low}, {high}]"


def _with_deviation(spread: Entry, form: str) -> str:
    deviation = "" if spread["deviation"] is None else f" ± {form.format(spread['deviation'])}"
    return _written(spread["mean"], form) + deviation


def _written(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)
