"""How the report writes numbers."""

import math
from datetime import UTC, datetime

NONE = "\N{EN DASH}"  # where there is no figure


def count(value: float) -> str:
    """12345678 as 12.3M; below a thousand as it is."""
    if not math.isfinite(value):
        return "?"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            text = f"{scaled:.{digits}f}"
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{suffix}"
    return f"{value:.4g}"


def figure(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, in the form that reads best."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5:
        return count(value)
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{digits - 1 - math.floor(math.log10(size))}f}"


def scientific(value: float) -> str:
    """A small rate as 2.7e-3."""
    if not math.isfinite(value) or value == 0:
        return figure(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.123 as 12.3 %."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Seconds as 12 s, 3m 31s, 4h 05m or 2d 03h."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return NONE
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}h"
    return f"{hour}h {minute:02}m" if hour else f"{minute}m {second:02}s"


def size(number_of_bytes: float) -> str:
    """Bytes as 903 MB or 78.3 GB."""
    for limit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number_of_bytes >= limit:
            return f"{number_of_bytes / limit:.3g} {suffix}"
    return f"{number_of_bytes:.0f} B"


def moment(seconds: object) -> str:
    """Seconds since 1970 as a date and a time, UTC; empty where they are none."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return ""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return ""


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) inside [low, high].

    At most `most` + 1 of them; needs low < high.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """A tick with as many decimals as `step`, the distance between ticks, needs."""
    if value == 0:
        return "0"
    top = max(abs(value), abs(step))
    if top >= 1e3:
        return count(value)
    if abs(step) < 1e-3:
        return scientific(value)
    needed = -math.floor(math.log10(abs(step)))
    exact = abs(step * 10**needed - round(step * 10**needed)) < 1e-6
    return f"{value:.{max(0, needed + (0 if exact else 1))}f}"
