"""A page built from headings, paragraphs, tables and pictures; one file, no scripts, nothing fetched.

Text that is passed in is escaped, so a model's output can be shown as it is. The page follows the reader's light
or dark setting and prints well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2f6fab; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, p { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.lead { color: #888; margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
th.text, td.text, table.left th, table.left td { text-align: left; }
tr.mark td { background: var(--soft); font-weight: 600; }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .9rem; padding: .2rem .4rem; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; }
mark { background: #ffe58a; color: #222; padding: 0 .15em; border-radius: 3px; }
@media print {
  body { max-width: none; margin: 0; font-size: 11px; } .scroll { overflow-x: visible; }
  th, td { padding: .25rem .4rem; overflow-wrap: anywhere; } figure, tr { break-inside: avoid; }
}
"""


@dataclass
class Page:
    """A page under construction; each method adds one thing below the last."""

    title: str
    lead: str = ""
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Text as it is, in a fixed width."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[str]], marked: int | None = None, *, left: bool = False
    ) -> None:
        """A table; numbers align to the right, the first column to the left.

        Args:
            marked: the number of a row to set apart.
            left: align everything to the left, for columns that hold words as well as numbers.
        """
        lines = list(rows)
        head = ""
        for column, cell in enumerate(header):  # a heading stands where its cells do
            words = not any(_is_number(cell) for line in lines for cell in line[column : column + 1])
            head += f'<th class="text">{escape(cell)}</th>' if words else f"<th>{escape(cell)}</th>"
        kind = ' class="left"' if left else ""
        body = []
        for number, row in enumerate(lines):
            mark = ' class="mark"' if number == marked else ""
            body.append(f"<tr{mark}>" + "".join(_cell(cell) for cell in row) + "</tr>")
        rows_html = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        self._parts.append(f'<div class="scroll"><table{kind}>{rows_html}</table></div>')

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and values, one a line."""
        self.table(("", ""), [(name, value) for name, value in facts.items()])

    def picture(self, svg: str, caption: str) -> None:
        """A plot, as SVG text that `lathe.report.plots` drew."""
        self._parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    def render(self) -> str:
        """The whole file."""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head><body><h1>{escape(self.title)}</h1>"
            f'<p class="lead">{escape(self.lead)}</p>{"".join(self._parts)}</body></html>\n'
        )


def _cell(text: str) -> str:
    kind = "" if _is_number(text) else ' class="text"'
    return f"<td{kind}>{escape(text)}</td>"


def _is_number(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "+-−–×") and any(c.isdigit() for c in text)
