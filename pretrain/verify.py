"""`python -m pretrain.verify RUN`: see pretrain/checkpoints/verification.py."""

import sys

from pretrain.checkpoints.verification import main

if __name__ == "__main__":
    sys.exit(main())
