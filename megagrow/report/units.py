"""Human-readable numbers."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def human(value: float, unit: str = "", *, digits: int = 3) -> str:
    """`value` with a decimal prefix and `digits` significant digits: 1234567 -> '1.23 M'.

    An integer below 1000 is written exactly; a non-finite value is written in words.
    """
    if not math.isfinite(value):
        return _not_finite(value)
    magnitude = abs(value)
    power = 0
    # The rounded number determines the prefix: 999.9996 k is 1 M, not 1000 k.
    while power < len(_PREFIXES) - 1 and float(f"{magnitude:.{digits}g}") >= 1000:
        magnitude /= 1000
        power += 1
    number = number_text(math.copysign(magnitude, value), digits=digits)
    return f"{number} {_PREFIXES[power]}{unit}".rstrip()


def number_text(value: float, *, digits: int = 4) -> str:
    """`value` with `digits` significant digits; powers of ten for the very large or small."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return (f"{float(text):.0f}" if "e" in text else text).replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign: '+0.0312', '−2×10⁻⁶', '±0'."""
    if value == 0:
        return "±0"
    text = number_text(value, digits=2 if abs(value) < 1e-3 else 3)
    return f"+{text}" if value > 0 else text


def whole(value: float) -> str:
    """A whole number with thin spaces between its thousands: '1 234 567'."""
    if not math.isfinite(value):
        return _not_finite(value)
    return f"{int(value):,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """A time span: '0.42 s', '12.3 s', '4 min 05 s', '3 h 07 min', '2 d 04 h'."""
    if not math.isfinite(seconds):
        return _not_finite(seconds)
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"


def binary_bytes(count: float) -> str:
    """A number of bytes in binary units: '64 MiB'."""
    if not math.isfinite(count):
        return _not_finite(count)
    for name in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1023.5 or name == "TiB":
            break
        count /= 1024
    return f"{number_text(count, digits=3)} {name}"


def _not_finite(value: float) -> str:
    return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
