"""Counts as people write them, `40M` or `1.2B`, in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lathe.errors import RequestError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15}
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmbgtp]?)", re.IGNORECASE)
_LIMIT = 10**18


def parse_count(text: str | int | float, name: str) -> int:
    """Read `40M`, `1.2B`, `300k`, `40,000,000` or a number.

    Args:
        text: what was given.
        name: what the count is of, for the error's sake.

    Raises:
        RequestError: anything that is no count of at least 1 and at most 10^18.
    """
    written = _WRITTEN.fullmatch(str(text).strip().replace(",", "").replace("_", ""))
    if written is None or len(written[1]) > 40:
        raise RequestError(f"{name}={text!r}: expected a count such as 40M, 1.2B or 300k")
    value = float(written[1]) * _FACTORS[written[2].lower()]
    if not 1 <= value <= _LIMIT:
        raise RequestError(f"{name}={text!r}: expected a count from 1 to 10^18")
    return round(value)


def count_text(value: float) -> str:
    """A count in four characters or so: 60.5M, 1.24B, 512."""
    return _scaled(value, 1000.0, ("", "k", "M", "B", "T", "P", "E"))


def bytes_text(value: float) -> str:
    """Bytes in powers of 1,024: 231 MiB, 2.75 GiB."""
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"))


def flops_text(value: float) -> str:
    """Floating-point operations: 1.48 GFLOP."""
    return _scaled(value, 1000.0, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"))


def seconds_text(value: float) -> str:
    """A length of time in the unit that suits it: 12 ms, 3.4 s, 5.1 h, 12 days."""
    for limit, size, unit in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if value < limit:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value / 3600)} h" if value < 48 * 3600 else f"{_digits(value / 86400)} days"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    index = 0
    # 999.96 is written 1000 with four digits, so the step comes a little before the base.
    while value >= base * 0.9995 and index < len(units) - 1:
        value /= base
        index += 1
    return f"{_digits(value) if index else f'{value:.0f}'}{units[index]}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def written(changes: Mapping[str, Any]) -> str:
    """Fields as the command line takes them: `n_heads=8 d_ff=2048`."""
    return " ".join(f"{name}={typed(value)}" for name, value in changes.items())


def typed(value: Any) -> str:
    """A field's value as the command line takes it."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
