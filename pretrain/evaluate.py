"""`python -m pretrain.evaluate RUN [--split val] [--stride S] [--json]`: held-out perplexity, nats/token, bits/byte and
accuracy over a whole split, every token scored exactly once, the same on any number of ranks. Of a masked model it is
the pseudo-likelihood that `pretrain.analysis.scoring.scoring` defines.

RUN is a run folder (its newest whole checkpoint) or one checkpoint's folder; `deepspeed --module pretrain.evaluate RUN`
scores on many ranks. `--data DIR` takes another prepared folder, `--text FILE ...` files that were never prepared.
`python -m pretrain.evaluate A B --paired` compares two runs on the same documents. The number is the true negative
log-likelihood: no smoothing, no clamp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT
from common.plain import to_json
from pretrain.analysis.evaluation import Task, by_source, check_same_documents, open_task, run_task
from pretrain.analysis.heldout import text_sha256

if TYPE_CHECKING:  # torch: --help does without
    from pretrain.analysis.scoring import Evaluation


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description="Held-out perplexity of a run.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="a run folder (its newest whole checkpoint), or one checkpoint's folder")  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--split", default="val", help="of the prepared data (default %(default)s)")
    text.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="text files; each is a document")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a prepared folder (default: the run's own)")
    parser.add_argument("--stride", type=int, metavar="S",
                        help="tokens that a window scores, from seq_len - S or more (default: seq_len)")  # fmt: skip
    parser.add_argument("--paired", action="store_true", help="compare two runs on the same documents")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds this one
    args = parser.parse_args(argv)
    if len(args.runs) != 1 + args.paired:
        parser.error(f"{len(args.runs)} RUNs given: expected one, or two with --paired")

    from pretrain.run_folder import settings_if_any
    from pretrain.runtime import ranks as process

    settings = [cfg for cfg in map(settings_if_any, args.runs) if cfg is not None]
    ranks = process.start_command(cfg=max(settings, key=lambda cfg: cfg.train.deterministic, default=None))
    try:
        tasks = [open_task(path, args.split, args.data, args.text, args.stride) for path in args.runs]
        if args.paired:
            check_same_documents(*tasks)
        ranks = process.with_groups(ranks, ranks.world)
        found = [run_task(task, ranks) for task in tasks]
        code = 0
    except ConfigError as error:
        code = EXIT_BAD_INPUT
        if ranks.first:
            print(f"error: {error}", file=sys.stderr)
    if ranks.first and not code:
        told = [_figures(task, result, checkpoint) for task, (result, checkpoint) in zip(tasks, found, strict=True)]
        if args.paired:
            from pretrain.analysis.scoring import compare

            (a, _), (b, _) = found
            told.append(vars(compare(a, b)))
        print(to_json(told if args.paired else told[0])) if args.json else _tell(told)
    process.stop()
    return code


def _figures(task: Task, result: Evaluation, checkpoint: Path) -> dict[str, Any]:
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
            f"{found['checkpoint']} on {found['split']}: "
            f"{'pseudo-' if found['objective'] == 'masked' else ''}perplexity "
            f"{found['perplexity']:.3f}, "
            f"{found['loss']:.5f}{_error(found['loss_se'])} nats/token, "
            f"{_bits(found)} bits/byte, accuracy "
            f"{found['accuracy']:.2%} over {found['tokens']:,} tokens, {_count(found['text_bytes'])} bytes, "
            f"{found['documents']:,} documents"
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
