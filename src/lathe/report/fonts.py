"""Fonts for the names in a picture: matplotlib's own writes no Korean, and a row of boxes tells no two models apart.

What it lacks is written in other fonts of this machine. Where there is none, a picture of pixels numbers the names; a
drawing for a page leaves them as text, which the reader's browser sets in a font of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lathe.report.labels import as_written


def fonts_for(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Matplotlib's own font and others of this machine that write the characters it lacks; and the texts left."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    default = findfont(FontProperties())
    families = [get_font(default).family_name]
    missing = {ord(c) for text in texts for c in text} - get_font(default).get_charmap().keys()
    # In the order of their names, so that the same machine draws the same picture.
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        if not missing:
            break
        if font.style != "normal" or font.weight not in (400, "normal", "regular") or font.name in families:
            continue
        if font.name.startswith("Last Resort"):  # it comes with matplotlib and draws a box for everything
            continue
        known = missing & get_font(font.fname).get_charmap().keys()
        if known:
            families.append(font.name)
            missing -= known
    return families, [text for text in texts if missing & set(map(ord, text))]


@contextmanager
def writing(names: Sequence[str], settings: Mapping[str, Any], *, svg: bool) -> Iterator[Callable[[str], str]]:
    """Matplotlib with `settings`, and fonts for `names`; a figure is made and saved inside the block.

    Yields:
        A function from one of the names to the label that stands for it.
    """
    import matplotlib

    families, unwritten = fonts_for(names)
    places = {name: place for place, name in enumerate(dict.fromkeys(names), start=1)}

    def label(name: str) -> str:
        return f"no. {places[name]}" if name in unwritten and not svg else as_written(name)

    chosen: Any = dict(settings)
    if len(families) > 1:
        chosen["font.family"] = families
    if svg and unwritten:
        chosen["svg.fonttype"] = "none"
    with matplotlib.rc_context(chosen), warnings.catch_warnings():
        if svg and unwritten:  # their widths are guessed from the font that lacks them
            warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield label
