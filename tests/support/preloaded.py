"""What the ranks of tests need, imported once: see tests/support/ranks.py. Importing starts no thread."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, with a warning

import pretrain.loop  # noqa: E402, F401
