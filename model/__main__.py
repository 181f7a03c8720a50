"""`python -m model sample|export RUN ...`: the former names of pretrain/sample.py and of pretrain/export.py with
`--format transformers`, for one release.
"""

import sys

if __name__ == "__main__":
    from pretrain import export, sample

    command, *words = sys.argv[1:] or [""]
    if command == "sample":
        sys.exit(sample.main(words))
    if command == "export":
        sys.exit(export.main([*words, "--format", "transformers"]))
    sys.exit("usage: python -m model sample|export RUN ...")
