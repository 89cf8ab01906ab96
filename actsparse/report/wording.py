"""Numbers and outside text as they are read: rounded, with their unit, free of control characters."""

import math
import re
import unicodedata

NARROW = "\u202f"
MINUS = "\u2212"
ABSENT = "\u2013"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_KEPT = "\n\t\u00a0\u202f"
_SPACES = re.compile(r"[ \t\n]+")


def clean(text: str) -> str:
    """The text with every control, bidirectional-override and unpaired character replaced by a visible sign."""
    if text.isprintable():
        return text
    return "".join(_visible(character) for character in text.replace("\r\n", "\n"))


def _visible(character: str) -> str:
    if character in _KEPT or character.isprintable():
        return character
    code, category = ord(character), unicodedata.category(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if category in ("Zs", "Zl", "Zp"):
        return " "
    return f"\u27e8U+{code:04X}\u27e9"


def one_line(text: str) -> str:
    """Cleaned text on one line."""
    return _SPACES.sub(" ", clean(text)).strip()


def number(value: float | None, digits: int = 3) -> str:
    """The value to `digits` significant digits; thousands set apart, powers of ten from 100,000 on."""
    if value is None or math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size and (size >= 1e5 or size < 1e-3):
        mantissa, exponent = f"{value:.{max(0, digits - 2)}e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", MINUS)
    if size >= 1000:
        return f"{value:,.0f}".replace(",", NARROW).replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    return f"{value:.{decimals}f}".replace("-", MINUS)


def exact(value: float | None) -> str:
    """A whole number as it is, any other value to three digits."""
    return f"{value:.0f}" if value is not None and abs(value) < 1e5 and value == round(value) else number(value)


def short(value: float) -> str:
    """A value on an axis as it is read off there: `0.9`, `128`, `89.8`."""
    return f"{value:.4g}".replace("-", MINUS)


def percent(share: float | None, decimals: int = 1, *, signed: bool = False) -> str:
    """A share as per cent, `0.4931` as `49.3 %`; large changes without decimals."""
    if share is None or math.isnan(share):
        return ABSENT
    if math.isinf(share):
        return f"{'+' if signed and share > 0 else ''}{number(share)}{NARROW}%"
    value = 100 * share
    if round(value, decimals) == 0:
        return f"{'±' if signed and value else ''}{0:.{decimals}f}{NARROW}%"
    if abs(value) >= 1e5:
        return f"{'+' if signed and value > 0 else ''}{number(value)}{NARROW}%"
    text = f"{value:{'+' if signed else ''},.{0 if abs(value) >= 100 else decimals}f}"
    return f"{text.replace(',', NARROW).replace('-', MINUS)}{NARROW}%"


def change(increase: float | None) -> str:
    """A relative change as `+31.6 %`, from tenfold on as `889×`."""
    if increase is not None and math.isinf(increase):
        return number(increase)
    if increase is not None and increase >= 9:
        return f"{number(increase + 1)}×"
    return percent(increase, signed=True)


def times(ratio: float | None) -> str:
    """A ratio as `1.31×`."""
    return ABSENT if ratio is None or math.isnan(ratio) else f"{ratio:.2f}×"


def between(low: float | None, high: float | None, decimals: int = 2) -> str:
    """An interval as `1.27–1.35`; empty where an end is unknown."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return _ends(f"{low:.{decimals}f}".replace("-", MINUS), f"{high:.{decimals}f}".replace("-", MINUS))


def shares_between(low: float | None, high: float | None) -> str:
    """An interval of shares in percent, `88.1–90.2 %`; empty where an end is unknown."""
    text = between(*(None if end is None else 100 * end for end in (low, high)), decimals=1)
    return f"{text}\u202f%" if text else ""


def span(low: float | None, high: float | None) -> str:
    """An interval of perplexities or other plain numbers; empty where an end is unknown."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return _ends(number(low), number(high))


def _ends(low: str, high: str) -> str:
    """Two ends with a dash, or with a word where a dash would stand beside a minus sign."""
    return f"{low} to {high}" if MINUS in (low[0], high[0]) else f"{low}\u2013{high}"


def milliseconds(value: float | None) -> str:
    """A time as `24.1 ms`."""
    return ABSENT if value is None or math.isnan(value) else f"{number(value)}{NARROW}ms"


def size(value: float) -> str:
    """A number of bytes as `268 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{number(value)}{NARROW}{unit}"
        value /= 1000
    return f"{number(value)}{NARROW}TB"


def count(n: int) -> str:
    """A whole number with its thousands set apart."""
    return f"{n:,}".replace(",", NARROW)


def listed(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else " and ".join([", ".join(items[:-1]), items[-1]]) if items else ""
