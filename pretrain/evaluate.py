"""`overtone evaluate RUN [--split val|test|train] [--stride S] [--json]`: perplexity, nats/token, bits/byte, accuracy
over a whole split, every token scored exactly once, the same on any number of ranks. Of a masked model it is the
pseudo-likelihood that `pretrain.analysis.scoring.scoring` defines.

`deepspeed --module pretrain.evaluate RUN` scores on many ranks. The number is the true negative log-likelihood: no
smoothing, no clamp.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command
from common.errors import ConfigError
from common.strict_json import to_json

if TYPE_CHECKING:
    from pretrain.analysis.evaluation import Task
    from pretrain.analysis.scoring import Evaluation


def parser() -> argparse.ArgumentParser:
    """The runs, the text to score them on, and how."""
    made = command.parser(
        "evaluate",
        "Held-out perplexity, nats/token, bits/byte and accuracy of a run over a whole split, every token scored once. "
        "On many ranks: deepspeed --module pretrain.evaluate RUN.",
        [
            "runs/quickstart",
            "runs/quickstart --stride 64 --text README.md",
            "runs/quickstart --data prepared/other --json",
            "runs/quickstart runs/quickstart-softmax --paired --split test",
        ],
    )
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                      help="a run folder (its newest whole checkpoint), or one checkpoint's folder")  # fmt: skip
    text = made.add_mutually_exclusive_group()
    about = "val, test (where data.test_fraction made one) or train, of the prepared data (default %(default)s)"
    text.add_argument("--split", default="val", metavar="NAME", help=about)
    text.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                      help="text files, each a document; RUN goes before them")  # fmt: skip
    made.add_argument("--data", type=Path, metavar="DIR", help="a prepared folder (default: the run's own)")
    made.add_argument("--stride", type=int, metavar="S",
                      help="tokens that a window scores, from seq_len - S or more (default: seq_len)")  # fmt: skip
    made.add_argument("--paired", action="store_true", help="compare two runs on the same documents")
    made.add_argument("--json", action="store_true", help="one JSON object instead of text")
    command.add_rank_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Scores on this rank, and prints on the first; exit code 2 for what cannot be scored or compared."""
    made = parser()
    asked = command.parse(made, argv)
    if len(asked.runs) != 1 + asked.paired:
        made.error(f"{len(asked.runs)} RUNs given: expected one, or two with --paired")
    return command.run(_evaluate, asked)


def _evaluate(asked: argparse.Namespace) -> int:
    with command.importing():
        from pretrain.analysis.evaluation import check_same_documents, open_task, run_task
        from pretrain.run_folder import settings_if_any
        from pretrain.runtime import ranks as process

    settings = [cfg for cfg in map(settings_if_any, asked.runs) if cfg is not None]
    ranks = process.start_command(
        cfg=max(settings, key=lambda cfg: cfg.train.deterministic, default=None),
        allow_code=asked.allow_different_code,
        data=asked.data,
        texts=asked.text,
    )
    try:
        tasks = [open_task(path, asked.split, asked.data, asked.text, asked.stride) for path in asked.runs]
        if asked.paired:
            check_same_documents(*tasks)
        ranks = process.with_groups(ranks, ranks.world)
        results = [run_task(task, ranks) for task in tasks]
        code = 0
    except ConfigError as error:
        code = command.refuse(error, says=ranks.first)
    if ranks.first and not code:
        told = [_figures(task, *result) for task, result in zip(tasks, results, strict=True)]
        if asked.paired:
            from pretrain.analysis.scoring import compare

            (a, _), (b, _) = results
            told.append(vars(compare(a, b)))
        print(to_json(told if asked.paired else told[0])) if asked.json else _tell(told)
    process.stop()
    return code


def _figures(task: Task, result: Evaluation, checkpoint: Path) -> dict[str, Any]:
    from pretrain.analysis.evaluation import by_source
    from pretrain.analysis.heldout import text_sha256

    sources = {name: {**part.as_dict(), **part.standard_errors()} for name, part in by_source(task, result).items()}
    about = {"checkpoint": str(checkpoint), "split": task.windows.split.name, "stride": task.windows.stride}
    about["objective"] = task.cfg.model.objective
    about["text_sha256"] = text_sha256(task.windows.split, task.folder)
    about["tokenizer_sha256"] = task.tokenizer_sha256
    return {**about, **result.as_dict(), **result.standard_errors(), **({"sources": sources} if sources else {})}


def _tell(told: list[dict[str, Any]]) -> None:
    for found in told:
        if "checkpoint" not in found:
            print(_difference(found))
            continue
        print(
            f"{found['checkpoint']} on {found['split']}: {'pseudo-' if found['objective'] == 'masked' else ''}"
            f"perplexity {found['perplexity']:.3f}, {found['loss']:.5f}{_error(found['loss_se'])} nats/token, "
            f"{_bits(found)} bits/byte, accuracy {found['accuracy']:.2%} over {found['tokens']:,} tokens, "
            f"{_count(found['text_bytes'])} bytes, {found['documents']:,} documents"
        )
        if "sources" in found:
            _tell_sources(found["sources"])


def _tell_sources(sources: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("source", "documents", "tokens", "nats/token", "bits/byte", "perplexity", "accuracy")
    for name, found in sources.items():
        table.add_row(
            name,
            f"{found['documents']:,}",
            f"{found['tokens']:,}",
            f"{found['loss']:.4f}{_error(found['loss_se'])}",
            _bits(found),
            f"{found['perplexity']:.2f}",
            f"{found['accuracy']:.2%}",
        )
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def _bits(found: dict[str, Any]) -> str:
    known = found["bits_per_byte"]
    return "unknown" if known is None else f"{known:.4f}{_error(found['bits_per_byte_se'])}"


def _error(value: float | None) -> str:
    """A standard error behind its figure."""
    return "" if value is None else f" ± {value:.4f}"


def _count(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"


def _difference(found: dict[str, Any]) -> str:
    from pretrain.analysis.scoring import INTERVAL

    told = f"first less second: {found['bits_per_byte_difference']:+.5f}{_error(found['standard_error'])} bits/byte"
    if found["low"] is None:
        return f"{told}; one document gives no interval"
    bounds = f"{found['low']:+.5f} to {found['high']:+.5f}"
    return f"{told}, {INTERVAL:.0%} interval {bounds} by paired bootstrap over documents"


if __name__ == "__main__":
    sys.exit(main())
