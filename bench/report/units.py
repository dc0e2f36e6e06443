"""How numbers are written: one place, so that page, terminal and Markdown say the same.

The unit of a value is the end of its key (``time_s``, ``sent_B``, ``vector_float32_1_flops``).
Three significant digits are kept, enough for a measurement whose interval is about a percent wide.
"""

from __future__ import annotations

import math
from decimal import Decimal

NOTHING = "-"  # what is written for a value that is not there

_DECIMAL = {-12: "p", -9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
_RATIOS = ("x", "%", "percent")  # units that take no prefix and follow the number without one
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

# End of a key -> unit. The first that fits wins, so the longer ones come first.
_KEY_UNITS = (
    ("_s_per_byte", "s/B"),
    ("_bytes_per_second", "B/s"),
    ("_bytes_per_s", "B/s"),
    ("_b_per_s", "B/s"),
    ("_flops_per_s", "FLOP/s"),
    ("_flops_per_second", "FLOP/s"),
    ("_flops_per_byte", "FLOP/B"),
    ("_flop", "FLOP"),
    ("_flops", "FLOP/s"),
    ("_seconds", "s"),
    ("_s", "s"),
    ("_bytes", "B"),
    ("_b", "B"),
    ("_hz", "Hz"),
    ("_ratio", "x"),
    ("_speedup", "x"),
    ("_fraction", "%"),
    ("_percent", "percent"),
)


def unit_of(key: str) -> str:
    """The unit a key ends with: ``s``, ``B``, ``FLOP/s``, ... or "" for a plain number."""
    word = "_" + key.lower()
    return next((unit for ending, unit in _KEY_UNITS if word.endswith(ending)), "")


def unit_of_label(label: str) -> str:
    """The unit in brackets at the end of an axis label: ``time (s)`` -> ``s``; "" without one."""
    label = label.rstrip()
    return label[label.rindex("(") + 1 : -1].strip() if label.endswith(")") and "(" in label else ""


def is_number(value: object) -> bool:
    """True for a finite int or float (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _plain(value: float, digits: int) -> str:
    """``value`` with this many significant digits and no exponent."""
    return format(Decimal(f"{value:.{digits - 1}e}"), "f")


def _decimal_exponent(value: float, digits: int) -> int:
    """Multiple of three for the prefix, after rounding: 999.96 us is 1.00 ms."""
    if value == 0:
        return 0
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return max(min(_DECIMAL), min(max(_DECIMAL), 3 * (exponent // 3)))


def _binary_exponent(value: float, digits: int) -> int:
    size = abs(value)
    step = 0
    while step < len(_BINARY) - 1 and float(_plain(size, digits + 1)) >= 1024:
        size /= 1024
        step += 1
    return step


def _scaled(value: float, unit: str, like: float, digits: int) -> tuple[str, str]:
    """Number and unit as text, with the prefix that suits ``like`` (an interval shares its value's)."""
    if unit == "B":
        step = _binary_exponent(like, digits)
        scaled = value / 1024**step
        whole = scaled == int(scaled) and abs(scaled) < 10_000
        return (str(int(scaled)) if whole else _plain(scaled, digits), _BINARY[step])
    if unit == "%":
        return _number(100 * value, digits), "%"
    if unit == "percent":
        return _number(value, digits), "%"
    if unit == "x":
        return _plain_number(value, digits), "x"
    if unit in ("s", "s/B", "B/s", "FLOP/s", "FLOP", "Hz"):
        exponent = _decimal_exponent(like, digits)
        # Seconds above a thousand stay seconds: nobody reads "1.2 ks".
        exponent = min(exponent, 0) if unit in ("s", "s/B") else max(exponent, 0)
        return _plain_number(value / 10.0**exponent, digits), _DECIMAL[exponent] + unit
    return _number(value, digits), unit


def _plain_number(value: float, digits: int) -> str:
    """Three digits, or all digits before the point for what is larger, or an exponent if that is silly."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10**digits:
        return f"{value:.0f}"
    return _plain(value, digits) if value else "0"


def _number(value: float, digits: int) -> str:
    """A number without a prefix; whole numbers stay whole."""
    if abs(value) < 1e7 and value == int(value):
        return str(int(value))
    return _plain_number(value, digits)


def _odd(value: object) -> str | None:
    """What to write for None, NaN, infinities and whatever is no number; None for a number."""
    if is_number(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return NOTHING


def format_quantity(value: float | None, unit: str, *, digits: int = 3) -> str:
    """``(0.00123, "s")`` -> ``1.23 ms``. Bytes take KiB, MiB; rates and FLOP take k, M, G, T."""
    odd = _odd(value)
    if odd is not None or value is None:
        return odd or NOTHING
    number, shown = _scaled(float(value), unit, float(value), digits)
    return f"{number}x" if shown == "x" else f"{number} {shown}".rstrip()


def format_seconds(value: float | None) -> str:
    """Seconds as ``1.23 s``, ``ms``, ``us`` or ``ns``; ``-`` for None and NaN."""
    return format_quantity(value, "s")


def format_value(key: str, value: float | None, *, exact: bool = False) -> str:
    """A value with the unit that its key ends with. ``exact`` writes a counted quantity in full."""
    unit = unit_of(key)
    if exact and value is not None and is_number(value) and value == int(value) and unit not in _RATIOS:
        return f"{int(value):,} {unit}".rstrip()
    return format_quantity(value, unit)


def format_interval(key: str, value: float | None, low: float | None, high: float | None) -> str:
    """``12.3 ms [11.9, 12.8]``: the bounds share the value's unit. Only the value without bounds."""
    text = format_value(key, value)
    if value is None or low is None or high is None or not all(map(is_number, (value, low, high))):
        return text
    bounds = [_scaled(float(bound), unit_of(key), float(value), 3)[0] for bound in (low, high)]
    return f"{text} [{bounds[0]}, {bounds[1]}]"


def format_ratio(value: float | None) -> str:
    """``1.23x``; ``-`` when there is none."""
    return format_quantity(value, "x")


def format_number(value: object) -> str:
    """A cell of a figure's table: four digits, the unit stands in the header. Text stays text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and is_number(value):
        return _number(float(value), 4)
    return _odd(value) or NOTHING


def format_tick(value: float, unit: str) -> str:
    """A short label for an axis whose label already names the unit: ``10 ms``, ``64 KiB``, ``100 G``."""
    if unit in ("FLOP/s", "B/s", "FLOP", "Hz"):
        text = format_quantity(float(f"{value:.3g}"), unit)
        number, _, shown = text.partition(" ")
        return f"{_short(number)} {shown.removesuffix(unit)}".rstrip()
    if unit in ("s", "B"):
        number, _, shown = format_quantity(float(f"{value:.4g}"), unit).partition(" ")
        return f"{_short(number)} {shown}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.6g}" if abs(value) >= 10_000 else f"{value:.6g}"


def _short(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


def text_of(value: object, limit: int = 0) -> str:
    """Untrusted text made printable: control characters and line breaks become visible or a space."""
    text = str(value)
    if limit:
        text = text[: limit + 1]  # a name may have a million letters
    if not text.isprintable():
        text = "".join(
            " " if letter.isspace() else letter if letter.isprintable() else "\ufffd" for letter in text
        )
    return text if not limit or len(text) <= limit else text[: max(1, limit - 1)] + "\u2026"
