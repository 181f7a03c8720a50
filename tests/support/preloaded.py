"""What the ranks of tests need, imported once: see tests/support/ranks.py. Importing starts no thread."""

import gc
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, with a warning

for name in (
    "pretrain.loop",
    "data.prepare",
    "tests.support.tiny",
    "deepspeed.module_inject.auto_ep_layer",  # these are imported at first use; the next one brings all of Inductor
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "safetensors.torch",
    "zeus.device",
    "hypothesis",  # these by the files of tests, which every rank imports
    "pytest",
):
    importlib.import_module(name)
gc.freeze()  # what is here stays, and no rank looks through it
