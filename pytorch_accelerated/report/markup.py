"""Pieces of HTML: everything that comes from a run is escaped here."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MISSING = "\N{EN DASH}"
"""Stands in a table for what is not there."""

EXTRA = 'pip install "pytorch-accelerated[report]"'


def text_of(value: Any) -> str:
    """Return a value of the log or of the settings as text, numbers with all their digits; not escaped."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return exact(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {text_of(item)}" for name, item in value.items()) if value else "none"
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value) if value else "none"
    return str(value)


def exact(number: float) -> str:
    """Return a number with all digits it has."""
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else repr(float(number))


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", numeric: Iterable[int] = (), name: str = ""
) -> str:
    """Return a table in a box of its own, which scrolls if the table is too wide.

    Args:
        head: the names of the columns.
        rows: the cells; what is no ``Html`` is made text and escaped.
        caption: what the table shows.
        numeric: the columns whose cells are aligned as numbers.
        name: how a screen reader calls the box; the caption if it is empty.
    """
    numbers = set(numeric)
    classes = [' class="n"' if column in numbers else "" for column in range(len(head))]
    ths = "".join(f'<th scope="col"{css}>{escape(title)}</th>' for title, css in zip(head, classes, strict=True))
    lines = []
    for row in rows:
        cells = [cell if isinstance(cell, Html) else escape(text_of(cell)) for cell in row]
        lines.append("".join(f"<td{css}>{cell}</td>" for cell, css in zip(cells, classes, strict=True)))
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return box(f"<table>{title}<thead><tr>{ths}</tr></thead><tbody>{body}</tbody></table>", name or caption)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def box(content: str, name: str) -> str:
    """Return a box that scrolls, also by the keyboard."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{escape(name or "table")}">{content}</div>'


def card(title: str, content: str) -> str:
    """Return a card with a title, which is escaped."""
    return f'<section class="card"><h3>{escape(title)}</h3>{content}</section>'


def settings_list(settings: Any) -> str:
    """Return nested settings as nested lists."""
    if not isinstance(settings, Mapping):
        return escape(text_of(settings))
    if not settings:
        return '<span class="muted">nothing</span>'
    items = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            items.append(f"<li><b>{escape(str(name))}</b>{settings_list(value)}</li>")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            several = {f"{name}.{number}": item for number, item in enumerate(value)}
            items.append(settings_list(several).removeprefix('<ul class="settings">').removesuffix("</ul>"))
        else:
            items.append(f"<li><b>{escape(str(name))}</b>: {escape(text_of(value))}</li>")
    return f'<ul class="settings">{"".join(items)}</ul>'


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(content: bytes, alt: str, kind: str = "image/png", is_small: bool = False) -> str:
    """Return an image that is part of the page; a small one is enlarged without being smoothed."""
    css = ' class="pixels"' if is_small else ""
    return f'<img{css} src="{data_uri(content, kind)}" alt="{escape(alt)}" loading="lazy">'


def figure(image: str, caption: str) -> str:
    """Return an image with a caption, which is escaped."""
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
