"""Texts and numbers of runs in a terminal. Those of models and prompts are untrusted: none may steer it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.style import Style
from rich.text import Text

# What would not be seen, turn the line around or steer the terminal: controls but for newline and tab, marks of
# direction, invisible letters, halves of characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
BARS = "▁▂▃▄▅▆▇█"


def visible(text: Any) -> str:
    """The text with its hidden characters written out, as ⟨U+001B⟩."""
    return HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", str(text))


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """The last numbers as one line of bars, each the mean of as many steps as fit; a blank where there is none."""
    if len(values) > width:
        size = len(values) / width
        parts = [values[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))] for i in range(width)]
        values = [_mean(part) for part in parts]
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if v is None else BARS[min(7, int(8 * (v - low) / span))] for v in values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def number(value: Any, digits: int = 4) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {whole % 60:02} s"
        if minutes
        else f"{seconds:.0f} s"
    )


def shade(share: float | None) -> Style:
    """From red at 0 over yellow to green at 1; no colour where nothing is known."""
    if share is None:
        return Style()
    share = min(1.0, max(0.0, share))
    red, green = (220, int(60 + 300 * share)) if share < 0.5 else (int(220 - 320 * (share - 0.5)), 190)
    return Style(color=f"rgb({red},{min(green, 200)},70)")


def coloured(response: dict[str, Any], texts: dict[str, Any], by: str = "overlap") -> Text:
    """A recorded response, each token in the colour of its overlap or its prune weight; drift events are underlined,
    and a mark stands where reliability is spent."""
    line = Text()
    drift, spent = set(response.get("drift") or ()), response.get("effective_length")
    values = response.get(by) or []
    for i, token in enumerate(response.get("ids") or ()):
        if i == spent and drift:
            line.append("⟦reliability spent⟧", Style(color="white", bgcolor="red"))
        value = values[i] if i < len(values) else None
        style = shade(value if isinstance(value, int | float) else None)
        line.append(visible(texts.get(str(token), f"<{token}>")), style + Style(underline=i in drift))
    return line
