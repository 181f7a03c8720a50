"""`overtone export`: pretrain/export.py, but for its default, which is what the transformers library loads."""

from functools import partial

from pretrain import export

parser = partial(export.parser, "transformers")
main = partial(export.main, default="transformers")
