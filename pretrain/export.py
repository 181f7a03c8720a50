"""`python -m pretrain.export RUN|CHECKPOINT --out FOLDER [--format weights|transformers]`: a checkpoint for others.

`weights`: the float32 weights as plain safetensors, beside the run's config.yaml. `transformers`: a folder that the
transformers library loads (docs/export.md). Both from any layout, without DeepSpeed and without a process group.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_INTERRUPTED

FORMATS = ("weights", "transformers")
MAX_GB = 5.0  # of one file


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for input that cannot be used (the reason is on standard error)."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.export", description="Write a checkpoint for others.")
    parser.add_argument("run", type=Path, help="a run folder (its newest whole checkpoint), or one checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--format", choices=FORMATS, default="weights", help="what to write (default %(default)s)")
    parser.add_argument("--max-gb", type=float, default=MAX_GB, help="of one file's weights (default %(default)s)")
    asked = parser.parse_args(argv)
    try:
        if not asked.max_gb > 0:
            raise ConfigError(f"--max-gb {asked.max_gb}: must be positive")
        if asked.format == "weights":
            from pretrain.analysis.export import export_weights as export  # torch: after the arguments were read
        else:
            from pretrain.analysis.export import export_transformers as export
        checkpoint, size = export(asked.run, asked.out, asked.max_gb * 1e9)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED
    print(f"{asked.out}: {size / 1e9:.3g} GB of weights of {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
