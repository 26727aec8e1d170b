"""Self-contained HTML pages: tables, and plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: left }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } td + td { font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } .bad { color: #b00020; font-weight: bold } .good { color: #0a7a33 }
"""


class Page:
    """A page that grows from top to bottom."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def text(self, words: str, kind: str = "") -> None:
        """A paragraph; `kind` is "good", "bad" or nothing."""
        self._parts.append(f'<p class="{kind}">{html.escape(words)}</p>')

    def heading(self, words: str) -> None:
        """The heading of what follows."""
        self._parts.append(f"<h2>{html.escape(words)}</h2>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table."""
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{cells}</tr>{body}</table>")

    def plot(self, figure: Figure) -> None:
        """A matplotlib figure."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        text = buffer.getvalue()
        self._parts.append(text[text.index("<svg") :])

    def save(self, path: Path) -> None:
        """Write it to a file."""
        head = f"<meta charset=utf-8><title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
        path.write_text(f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(self._parts)}</body></html>")
