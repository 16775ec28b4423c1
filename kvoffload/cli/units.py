"""Numbers as people read them. Pure text: no terminal, no third-party import."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes with a binary unit: ``512 B``, ``1.5 MiB``, ``2.00 TiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def seconds(value: float) -> str:
    """Seconds, three digits: ``42.0 us``, ``3.10 ms``, ``1.20 s``, ``35 min``; sign kept."""
    sign, value = ("-" if value < 0 else ""), abs(value)
    if value >= 7200:
        return f"{sign}{value / 3600:.1f} h"
    if value >= 120:
        return f"{sign}{value / 60:.0f} min"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            value /= scale
            break
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{sign}{value:.{digits}f} {unit}" if value else "0 s"


def count(value: float) -> str:
    """A count: ``1,234``, ``123.4k``, ``4.56M``; a fraction only where the number is small."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e5)):
        if abs(value) >= scale:
            return f"{value / 1e3:.1f}k" if unit == "k" else f"{value / scale:.2f}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.1f}"


def share(value: float) -> str:
    """A fraction in percent: ``0 %``, ``4.2 %``, ``57 %``."""
    percent = 100 * value
    return f"{percent:.1f} %" if 0 < percent < 10 else f"{percent:.0f} %"
