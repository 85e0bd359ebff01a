"""How values read on the pages: Jinja filters, one for each kind of quantity."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from flask import Blueprint
from markupsafe import Markup, escape

#: A glyph and a word stand beside every colour: not everybody sees the colour.
GLYPHS = {
    "pending": "○",
    "pendingGpu": "◔",
    "pendingImages": "◑",
    "pendingModel": "◕",
    "training": "▶",
    "completed": "✔",
    "stalled": "‖",
    "failed": "✖",
    "cancelled": "■",
}


def money(micro_usd: int) -> str:
    """Micro-USD as dollars: `$0.0042`, `$12.30`."""
    dollars = micro_usd / 1_000_000
    return f"${dollars:,.4f}" if abs(dollars) < 1 else f"${dollars:,.2f}"


def span(value: timedelta | float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    seconds = round(value.total_seconds() if isinstance(value, timedelta) else value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86_400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"


def size(count: int) -> str:
    """Bytes: `812 B`, `3.4 MB`, `6.94 GB`."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:.3g} {unit}"
    return f"{count} B"


def when(at: datetime) -> str:
    """RFC 3339 in UTC, for `<time datetime=…>`; the page's script shows it in local time."""
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")


def ticks(text: str) -> Markup:
    """Text in which `commands` stand between backticks, as HTML."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if at % 2 else escape(piece)
        for at, piece in enumerate(pieces)
    )


def as_json(value: object) -> str:
    """`value` as indented JSON, for people to read."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def install(pages: Blueprint) -> None:
    """Make the filters and `GLYPHS` known to the templates."""
    for filter_ in (money, span, size, when, ticks):
        pages.add_app_template_filter(filter_)
    pages.add_app_template_filter(as_json, "json")
    pages.add_app_template_global(GLYPHS, "GLYPHS")  # type: ignore[arg-type]  # any value will do
