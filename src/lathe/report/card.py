"""What every model card has: the header that the Hugging Face hub reads, tables, and how the files opened again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lathe.reshape.outcome import Reload


def header(fields: Mapping[str, Any], *, made: str, family: str | None, base: str | None) -> list[str]:
    """The lines of the header.

    Args:
        fields: what the source's card said and still holds.
        made: a tag that says what was done.
        family: whose stock class opens the files; None: none does.
        base: the hub id of the source; None where it has none.
    """
    named = dict(fields)
    if family is not None:
        named["library_name"] = "transformers"
    if base is not None:
        named["base_model"] = base
    named["tags"] = ["lathe", made, *([family] if family else [])]
    return ["---", yaml.safe_dump(named, sort_keys=True, allow_unicode=True).rstrip(), "---"]


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def reload_sentences(found: Reload, reasons: Sequence[str]) -> list[str]:
    """What was found when the files were opened again.

    Args:
        reasons: why no stock file can hold the model, where none can.
    """
    lines = [f"Lathe: the largest difference of a logit over {found.tokens} positions is {found.largest:.2g}."]
    if found.stock is None:
        reason = "; ".join(reasons)
        return [*lines, f"Stock transformers: not compared ({found.note}{': ' + reason if reason else ''})."]
    return [*lines, f"Stock transformers: the largest difference is {found.stock:.2g}; {_tensors(found)}."]


def _tensors(found: Reload) -> str:
    if not found.missing and not found.unexpected:
        return "no tensor is missing, none is unexpected"
    parts = []
    for what, names in (("missing", found.missing), ("unexpected", found.unexpected)):
        if names:
            parts.append(f"{what}: {', '.join(names[:4])}{'…' if len(names) > 4 else ''}")
    return "; ".join(parts)
