"""What a study prints: its results in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

Entry = Mapping[str, Any]


def language(results: Entry) -> Table:
    """Heads by row."""
    table = Table(
        "head", "lr", "held-out bits/byte", f"less {results['baseline']}", "tokens/s", "J/token", "PCA90", "eff. rank",
        "unrest", "spikes", "diverged",
    )  # fmt: skip
    for head in results["heads"]:
        stable = head["gradient_stability"]
        table.add_row(
            head["name"],
            "-" if head["lr"] is None else f"{head['lr']:g}{' (edge)' if head['lr_at_edge'] else ''}",
            _with_bounds(head["bits_per_byte"], "{:.4f}"),
            _with_bounds(head["difference"], "{:+.4f}"),
            _written(head["tokens_per_s"], "{:,.0f}"),
            _written(head["j_per_token"], "{:.3e}", "not measured"),
            _written(head["pca90"], "{:.1f}"),
            _written(head["effective_rank"], "{:.1f}"),
            _written(stable["residual_variance"], "{:.3g}"),
            _written(stable["spikes"], "{:.3g}"),
            f"{head['diverged']} of {head['started']}",
        )
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
