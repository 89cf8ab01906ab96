"""Numbers as the terminal's tables write them; what is not known is a dash."""

MISSING = "-"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}".replace("%", " %")


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else (f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.0f}")


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
