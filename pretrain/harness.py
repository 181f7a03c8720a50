"""`python -m pretrain.harness run ...`: see pretrain/analysis/harness.py."""

if __name__ == "__main__":
    import common.starting  # noqa: F401

import sys

from pretrain.analysis.harness import main

if __name__ == "__main__":
    sys.exit(main())
