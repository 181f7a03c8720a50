"""`python -m model sample|export RUN ...`: see pretrain/analysis/export.py."""

import sys

if __name__ == "__main__":
    from pretrain.analysis.export import main

    sys.exit(main())
