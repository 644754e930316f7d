"""Figures as text: a few significant digits, a unit, and "not measured" where there is none."""

from __future__ import annotations

NOT_MEASURED = "not measured"


def number(value: float | None, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits; whole numbers in full with thousands apart."""
    if value is None:
        return NOT_MEASURED
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def size(count: int | None) -> str:
    """Return bytes as kB, MB or GB (powers of ten)."""
    if count is None:
        return NOT_MEASURED
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def milliseconds(value: float | None) -> str:
    """Return milliseconds, with three significant digits below 100."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def seconds(value: float | None) -> str:
    """Return seconds, or minutes and seconds from two minutes on."""
    if value is None:
        return NOT_MEASURED
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{value:.1f} s" if value >= 0.1 or value == 0 else f"{value:.2g} s"


def decibels(value: float | None) -> str:
    """Return dB with one decimal."""
    return NOT_MEASURED if value is None else f"{value:.1f} dB"


def percent(share: float | None) -> str:
    """Return a share of 1 as a percentage with one decimal."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def times(factor: float | None) -> str:
    """Return a factor, such as ``1.79x``."""
    return NOT_MEASURED if factor is None else f"{factor:.2f}x"
