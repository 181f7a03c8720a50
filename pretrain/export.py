"""`overtone export RUN --out FOLDER [--format transformers|weights]`: a checkpoint for others, from any layout, without
DeepSpeed and without a process group. `python -m pretrain.export` writes weights where no format is given.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common import command
from common.errors import ConfigError

FORMATS = ("transformers", "weights")
MAX_GB = 5.0  # of one file


def parser(default: str = "weights") -> argparse.ArgumentParser:
    """RUN, the folder to make, and how; `default`: the format where none is given."""
    made = command.parser(
        "export",
        "Write a checkpoint for others. transformers: a folder that the transformers library loads (docs/export.md). "
        "weights: the float32 weights as plain safetensors, beside the run's config.yaml.",
        ["runs/quickstart --out exported", "runs/quickstart/checkpoints/step-00000100 --out weights --format weights"],
    )
    command.add_run(made)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    made.add_argument("--format", choices=FORMATS, default=default, help="what to write (default %(default)s)")
    made.add_argument(
        "--max-gb", type=float, default=MAX_GB, metavar="GB", help="of one file's weights (default %(default)s)"
    )
    return made


def main(argv: Sequence[str] | None = None, default: str = "weights") -> int:
    """Writes the folder, whole or not at all; exit code 2 if that cannot be. `default`: as `parser` takes it."""
    return command.run(_export, command.parse(parser(default), argv))


def _export(asked: argparse.Namespace) -> None:
    if not asked.max_gb > 0:
        raise ConfigError(f"--max-gb {asked.max_gb}: must be positive")
    with command.importing():
        from pretrain.analysis import export

    write = export.export_weights if asked.format == "weights" else export.export_transformers
    checkpoint, size = write(Path(asked.run), asked.out, asked.max_gb * 1e9)
    print(f"{asked.out}: {size / 1e9:.3g} GB of weights of {checkpoint}")


if __name__ == "__main__":
    sys.exit(main())
