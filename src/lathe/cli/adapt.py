"""`lathe adapt merge BASE ADAPTER DESTINATION`: an adapter folded into its base, as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lathe.errors import RequestError

command = typer.Typer(add_completion=False, rich_markup_mode=None, help="LoRA adapters as files.")


@command.callback()
def _group() -> None:
    """Hold the verbs of this verb, of which there may be one."""


@command.command()
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model's directory, or a hub id.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A directory that peft or lathe train wrote.")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="Where the model is written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base: a stock checkpoint that computes the same, at the base's speed."""
    if destination.expanduser().exists():
        raise RequestError(f"{destination} exists; choose another name, or remove it")
    from lathe.adapt.opening import merge_into_base
    from lathe.cli.output import answers, emit_json, say

    saved = merge_into_base(base, adapter, destination.expanduser())
    if not saved.stock:
        say(f"stock transformers cannot open it: {'; '.join(saved.reasons) or 'the architecture names no family'}")
    if as_json:
        emit_json(
            {
                "base": base,
                "adapter": str(adapter),
                "model": str(destination),
                "stock": saved.stock,
                "reasons": list(saved.reasons),
            }
        )
    else:
        answers().print(f"{destination}: {base} with {adapter} folded in", soft_wrap=True)
