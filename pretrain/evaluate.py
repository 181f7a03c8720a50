"""`python -m pretrain.evaluate RUN`: see pretrain/analysis/evaluation.py."""

import sys

from pretrain.analysis.evaluation import main

if __name__ == "__main__":
    sys.exit(main())
