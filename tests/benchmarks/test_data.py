"""`python -m benchmarks.data`: its figures come from reading and training, and its table says them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks import data as benchmark
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, tiny_config


def check_loading(base: Path) -> benchmark.Loading:
    from pretrain.runtime import ranks as process

    process.stop = lambda: None  # the tests' own group
    benchmark.READ_SECONDS = 0.1
    return benchmark.loading(tiny_config(run=str(base / "run"), data__path=str(base / "data")), steps=2)


def test_loading_is_measured_against_training(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    (found,) = run_ranks(check_loading, 1, tmp_path, base=tmp_path)
    assert found.read > found.trained > 0 and found.stored_bytes == 2 and 0 < found.waited < 1
    console = Console(width=110, record=True)
    console.print(benchmark.loading_table(found))
    shown = console.export_text()
    assert f"{found.ratio:,.0f}x" in shown and f"{found.trained:,.0f}" in shown


def test_data_that_are_not_prepared_are_refused(tmp_path: Path, capsys) -> None:
    assert benchmark.main(["load", "configs/quickstart.yaml", f"data.path={tmp_path}"]) == 2
    assert "no prepared data here" in capsys.readouterr().err
