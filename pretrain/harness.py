"""`python -m pretrain.harness run ...`: see pretrain/analysis/harness.py."""

import sys

from pretrain.analysis.harness import main

if __name__ == "__main__":
    sys.exit(main())
