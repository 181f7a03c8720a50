"""Divisors of whole numbers, and lists of numbers as a message tells them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def divisors(number: int) -> list[int]:
    """All of them, from 1 to the number itself, in the time of its root."""
    small = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return small + [number // k for k in reversed(small) if k * k != number]


def listed(numbers: Sequence[int], none: str) -> str:
    """Numbers in words: of many the first and the last, of none `none`."""
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 16 else [*shown[:15], "...", shown[-1]]) or none
