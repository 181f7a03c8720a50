"""`python -m pretrain.export RUN --out FOLDER`: see pretrain/checkpoints/weights.py."""

import sys

from pretrain.checkpoints.weights import main

if __name__ == "__main__":
    sys.exit(main())
