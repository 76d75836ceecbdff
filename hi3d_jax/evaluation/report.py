"""Scores as one HTML file that anyone can open: tables and pictures inside it, no scripts, nothing from a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hi3d_jax.evaluation.tables import Row, score_cells, summarise, summary_cells

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #ccc; padding: .2rem .6rem; }
td { text-align: right; } td:first-child, th { text-align: left; } .wide { overflow-x: auto; }
img { max-width: 100%; display: block; margin: .5rem 0; border: 1px solid #ddd; } .error { color: #a00; }
.note { color: #666; }
"""
# The browser itself then refuses scripts and requests, whatever a name in the tables may contain.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LEGEND = (
    "Arrows say which way is better. Intervals are 95 % percentile bootstraps over objects. Error maps are white where "
    "views agree and red where they differ by a quarter of the range or more."
)


def html_report(
    title: str, about: Mapping[str, Any], rows: Sequence[Row], pictures: Mapping[str, Sequence[Path]]
) -> str:
    """The report as text. `pictures` maps a row's name to JPEG files, which are put into the report."""
    parts = [
        "<h2>All objects</h2>",
        _summary(rows),
        "<h2>Object by object</h2>",
        _grid(score_cells(rows)),
        *(_details(row, pictures.get(row.name, ())) for row in rows),
    ]
    return _page(title, about, parts)


def comparison_report(
    title: str,
    about: Mapping[str, Any],
    tables: Mapping[str, Sequence[Sequence[str]]],
    pictures: Mapping[str, Mapping[str, Sequence[Path]]],
) -> str:
    """Several systems as text: `tables` by their headings, then for each result all systems' `pictures`.

    `pictures` maps a system's name to those that `html_report` takes.
    """
    parts = [f"<h2>{html.escape(label)}</h2>{_grid(cells)}" for label, cells in tables.items()]
    for name in dict.fromkeys(name for each in pictures.values() for name in each):
        parts.append(f"<h3>{html.escape(name)}</h3>")
        for system, found in pictures.items():
            if name in found:
                parts.append(f"<h4>{html.escape(system)}</h4>{_shown(found[name])}")
    return _page(title, about, parts)


def _page(title: str, about: Mapping[str, Any], parts: Sequence[str]) -> str:
    head = [
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title>",
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
        _settings(about),
        f"<p class=note>{LEGEND}</p>",
    ]
    return "\n".join([*head, *parts, "</body></html>\n"])


def _settings(about: Mapping[str, Any]) -> str:
    items = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in about.items()
    )
    return f"<table>{items}</table>"


def _summary(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.error]
    warning = f"<p class=error>{len(failed)} of {len(rows)} could not be scored and are in no mean.</p>"
    return (warning if failed else "") + _grid(summary_cells(summarise(rows)))


def _details(row: Row, pictures: Sequence[Path]) -> str:
    remarks = [f"<p class=error>{html.escape(row.error)}</p>"] if row.error else []
    remarks += [f"<p class=note>{html.escape(note)}</p>" for note in row.notes]
    return f"<h3>{html.escape(row.name)}</h3>{''.join(remarks)}{_shown(pictures)}"


def _shown(pictures: Sequence[Path]) -> str:
    return "".join(
        f'<img alt="{html.escape(picture.stem)}" src="data:image/jpeg;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )


def _grid(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rest = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in body)
    return f"<div class=wide><table><tr>{top}</tr>{rest}</table></div>"
