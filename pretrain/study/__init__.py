"""Matched comparisons of heads: `python -m pretrain.study CONFIG` (docs/study.md)."""
