"""Numbers as plots write them, and round numbers for ticks."""

from __future__ import annotations

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def known(value: float | None) -> bool:
    """Neither None nor infinite nor not a number."""
    return value is not None and math.isfinite(value)


def short(value: float) -> str:
    """As on a tick: 1.5k, 20M, 0.003, 3e-5, 10⁻⁶."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    if size >= 1e-3 or not size:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    digits, power = mantissa.rstrip("0").rstrip("."), str(int(exponent))
    return "10" + power.translate(SUPERSCRIPTS) if digits == "1" else f"{digits}e{power}"


def precise(value: float) -> str:
    """As in a tip: four figures."""
    return whole(value) if abs(value) >= 1e3 else f"{value:.4g}"


def whole(value: float) -> str:
    """Of a count: 12,345."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """Of a share: 0.255 is 25.5%."""
    return f"{100 * value:.3g}%"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of 10 apart) within low..high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12 - math.floor(math.log10(step))) for place in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers for a logarithmic axis: powers of 10, or 1, 2, 5 times them where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        candidates = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        within = [tick for tick in candidates if low * 0.999 <= tick <= high * 1.001]
        if len(within) >= 3:
            return within[:: math.ceil(len(within) / (count + 1))]
    return within if len(within) > 1 else ticks(low, high, count)
