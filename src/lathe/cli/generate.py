"""`lathe generate MODEL --prompt TEXT`: what a model writes after a prompt, or makes of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lathe.api import Model
    from lathe.generate.text import Completion


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or an adapter's, or a hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to start from; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Take prompts from a UTF-8 file, one a line.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="How many tokens to add at most.")] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; else as stored.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 safer, above 1 wilder; samples.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; samples.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest with this much chance; samples.")] = None,
    num_return_sequences: Annotated[int | None, typer.Option(help="How many samples of each prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same samples.")] = None,
    special_tokens: Annotated[bool, typer.Option("--special-tokens", help="Keep </s>, sentinels and so on.")] = False,
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model: its directory.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the CPU unless given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write text with a model that has a tokenizer beside it."""
    asked = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_return_sequences": num_return_sequences,
    }
    settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if sample is None and settings.keys() & {"temperature", "top_k", "top_p"}:
        sample = True
    if sample is not None:
        settings["do_sample"] = sample
    prompts = [*(prompt or []), *(_lines(file) if file is not None else [])]
    if not prompts:
        raise RequestError("there is nothing to start from: give --prompt TEXT, or --file with prompts, one a line")
    _run(model, adapter, prompts, settings, seed, special_tokens, device, as_json)


def _run(
    name: str,
    adapter: Path | None,
    prompts: list[str],
    settings: dict[str, Any],
    seed: int | None,
    special_tokens: bool,
    device: str | None,
    as_json: bool,
) -> None:
    import secrets

    from lathe.cli.output import emit_json, say
    from lathe.generate.settings import turned_off
    from lathe.generate.text import complete

    model = _load(name, adapter, _device(device))
    if model.tokenizer is None:
        raise RequestError(f"{name} has no tokenizer; put its tokenizer's files beside its weights")
    off = turned_off(model.generation)
    if off:
        wanted = ", ".join(f"{key}={model.generation[key]}" for key in off)
        say(f"the model asks for {wanted}, which Lathe does not do; going on without")
    chosen = secrets.randbits(32) if seed is None else seed
    started = time.perf_counter()
    found = complete(
        model,
        model.tokenizer,
        prompts,
        stored=model.generation,
        keep_special_tokens=special_tokens,
        seed=chosen,
        **off,
        **settings,
    )
    seconds = time.perf_counter() - started
    n_tokens = sum(len(each.ids) for each in found)
    if as_json:
        emit_json(_answer(name, {**model.generation, **settings}, chosen, found))
        return
    _show(found, model.encoder is None)
    say(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} a second")


def _load(name: str, adapter: Path | None, device: Any) -> Model:
    """The model, with the adapter on it that was asked for or that stands in its place."""
    import lathe
    from lathe.adapt import load_adapter
    from lathe.adapt.opening import base_of, is_adapter

    if is_adapter(name):
        if adapter is not None:
            raise RequestError(f"{name} is an adapter and no model: expected the base of {adapter}")
        name, adapter = base_of(name), Path(name)
    model = lathe.load(name, device=device)
    if adapter is not None:
        load_adapter(model, adapter.expanduser())
        if lathe.Tokenizer.is_in(adapter.expanduser()):
            model.tokenizer = lathe.Tokenizer.load(adapter.expanduser())
    return model


def _answer(name: str, settings: Mapping[str, Any], seed: int, found: list[Completion]) -> dict[str, Any]:
    return {
        "model": name,
        "sampled": bool(settings.get("do_sample", False)),
        "seed": seed,
        "texts": [{**asdict(each), "tokens": len(each.ids)} for each in found],
    }


def _show(found: list[Completion], continues: bool) -> None:
    """Print each text; a decoder's follows its prompt, an encoder-decoder's stands under it if there are several."""
    from lathe.cli.output import answers

    console = answers()
    for number, each in enumerate(found):
        if number:
            console.print()
        if not continues and len(found) > 1:
            console.print(f"{each.prompt}\n→ ", end="", soft_wrap=True)
        console.print(f"{each.prompt}{each.text}" if continues else each.text, soft_wrap=True)


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise RequestError(f"--device {name}: there is no such device here; leave it out for the CPU") from None
    return device


def _lines(file: Path) -> list[str]:
    from lathe.text.corpus import read_lines

    return [line.rstrip("\r\n") for line in read_lines(file)]
