"""`lathe generate MODEL --prompt TEXT`: what a model writes after a prompt, or makes of it."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lathe.api.model import Model
    from lathe.generate.text import Completion


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or an adapter's, or a hub id.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Any setting of generation: num_beams=4, repetition_penalty=1.2, stop_strings='[\".\"]', "
            "bad_words_ids=[[5,6],[7]] …",
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to start from; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Take prompts from a UTF-8 file, one a line; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="How many tokens to add at most.")] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; else as stored.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 safer, above 1 wilder; samples.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; samples.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest with this much chance; samples.")] = None,
    num_return_sequences: Annotated[int | None, typer.Option(help="How many samples, or best beams, a prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same samples.")] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="Of --file, how many texts, or beam searches, go at once; else what half of the memory holds."
        ),
    ] = None,
    special_tokens: Annotated[bool, typer.Option("--special-tokens", help="Keep </s>, sentinels and so on.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print one prompt's text while it is written.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show each step: candidates, probabilities, filters, beams.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(metavar="DRAFT", help="A smaller model with the same tokenizer that proposes tokens, for speed."),
    ] = None,
    num_draft_tokens: Annotated[int | None, typer.Option(help="How many tokens --draft proposes at once; 4.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model: its directory.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the CPU unless given.")] = None,
    engine: Annotated[
        str, typer.Option(help="What computes: native (compiled, CPU), torch, or auto; the tokens are the same.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, log-probabilities included.")] = False,
) -> None:
    """Write text with a model that has a tokenizer beside it."""
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_return_sequences": num_return_sequences,
        "seed": seed,
    }
    settings = _settings(words or [], options)
    prompts = [*(_utf8(each) for each in prompt or []), *(_lines(file) if file is not None else [])]
    if not prompts:
        raise RequestError("there is nothing to start from: give --prompt TEXT, or --file with prompts, one a line")
    if stream and (as_json or explain or len(prompts) > 1):
        raise RequestError(
            "--stream prints one prompt's text as it is written; leave out --json and --explain and give one prompt"
        )
    if slots is not None and (file is None or explain or stream):
        raise RequestError(
            f"--slots {slots}: the prompts of --file take turns; give --file, without --explain or --stream"
        )
    if draft is None and num_draft_tokens is not None:
        raise RequestError(f"--num-draft-tokens {num_draft_tokens}: there is no draft; give --draft DRAFT")
    if draft is not None and (stream or explain or slots is not None):
        raise RequestError("--draft writes all prompts in one batch; leave out --stream, --explain and --slots")
    if draft is not None:
        drafted = 4 if num_draft_tokens is None else num_draft_tokens
        _run_drafted(model, adapter, draft, drafted, prompts, settings, special_tokens, device, engine, as_json)
        return
    turns = file is not None and not explain
    _run(model, adapter, prompts, settings, special_tokens, stream, explain, device, engine, as_json, turns, slots)


def _settings(words: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all words and options; a setting of sampling samples, unless it is said otherwise."""
    from lathe.cli.settings import parse_settings
    from lathe.generate.settings import SAMPLING

    plain: list[str] = []
    lists: dict[str, Any] = {}
    for word in words:
        field, _, value = word.partition("=")
        listed: Any = None
        if value.startswith("["):
            # What parse_settings reads as a list of words; of numbers and lists only where it is JSON.
            with suppress(ValueError):
                listed = json.loads(value)
        if listed is None:
            plain.append(word)
        elif field in lists:
            raise RequestError(f"{field} is set twice, the second time by {word!r}; set it once")
        else:
            lists[field] = listed
    settings: dict[str, Any] = dict(parse_settings(plain))
    for name, value in [*lists.items(), *((name, value) for name, value in options.items() if value is not None)]:
        if name in settings:
            raise RequestError(f"{name} is set twice; set it once")
        settings[name] = value
    # Also `top_k=none`, which keeps every token: only a draw can keep any.
    if "do_sample" not in settings and any(name in settings for name in SAMPLING):
        settings["do_sample"] = True
    return settings


def _run(
    name: str,
    adapter: Path | None,
    prompts: list[str],
    settings: dict[str, Any],
    special_tokens: bool,
    stream: bool,
    explain: bool,
    device: str | None,
    engine: str,
    as_json: bool,
    turns: bool,
    slots: int | None,
) -> None:
    from lathe.cli.output import emit_json, say, write
    from lathe.generate.explain import Explanation, lines
    from lathe.generate.text import complete, complete_in_turns

    model = _load(name, adapter, _device(device))
    if model.tokenizer is None:
        raise RequestError(f"{name} has no tokenizer; put its tokenizer's files beside its weights")
    settings = _complete_settings(model, settings)
    if stream:
        _stream(model, prompts[0], {"engine": engine, **settings}, special_tokens)
        return
    explanation = Explanation(model.tokenizer) if explain else None
    started = time.perf_counter()
    common: dict[str, Any] = {"stored": model.generation, "keep_special_tokens": special_tokens, **settings}
    common["engine"] = engine
    if turns:
        found = complete_in_turns(model, model.tokenizer, prompts, slots=slots, **common)
    else:
        found = complete(model, model.tokenizer, prompts, watch=explanation, **common)
    seconds = time.perf_counter() - started
    n_tokens = sum(len(each.ids) for each in found)
    if as_json:
        answer = _answer(name, {**model.generation, **settings}, found)
        emit_json(answer if explanation is None else {**answer, "steps": explanation.steps})
        return
    for line in lines(explanation.steps) if explanation is not None else ():
        write(line)
    _show(found, len(found) // len(prompts), model.encoder is None)
    say(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} a second")


def _complete_settings(model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a seed, and without what the model's own ask for and Lathe does not do, which is said."""
    import secrets

    from lathe.cli.output import say
    from lathe.generate.settings import turned_off

    off = {key: value for key, value in turned_off(model.generation).items() if key not in settings}
    if off:
        wanted = ", ".join(f"{key}={model.generation[key]}" for key in off)
        say(f"the model asks for {wanted}, which Lathe does not do; going on without")
    return {"seed": secrets.randbits(32), **off, **settings}


def _run_drafted(
    name: str,
    adapter: Path | None,
    draft_name: str,
    num_draft_tokens: int,
    prompts: list[str],
    settings: dict[str, Any],
    special_tokens: bool,
    device: str | None,
    engine: str,
    as_json: bool,
) -> None:
    """Write with a draft, and once more without it, so that what it saves is measured and not guessed."""
    from lathe.cli.output import emit_json, say
    from lathe.generate.text import complete

    model, draft = _load(name, adapter, _device(device)), _load(draft_name, None, _device(device))
    if model.tokenizer is None:
        raise RequestError(f"{name} has no tokenizer; put its tokenizer's files beside its weights")
    tokenizer, settings = model.tokenizer, _complete_settings(model, settings)
    common: dict[str, Any] = {"stored": model.generation, "keep_special_tokens": special_tokens, **settings}
    common["engine"] = engine

    def timed(**more: Any) -> tuple[list[Completion], float]:
        started = time.perf_counter()
        found = complete(model, tokenizer, prompts, **common, **more)
        return found, (time.perf_counter() - started) / sum(len(each.ids) for each in found)

    found, per_token = timed(draft=draft, num_draft_tokens=num_draft_tokens)
    _, per_token_plain = timed()
    speculation = found[0].speculation
    assert speculation is not None
    speed_up = per_token_plain / per_token
    proposed, accepted = int(speculation.proposed_R.sum()), int(speculation.accepted_R.sum())
    if as_json:
        counts = {"proposed": proposed, "accepted": accepted, "passes": speculation.passes, "speed_up": speed_up}
        emit_json({**_answer(name, {**model.generation, **settings}, found), "draft": {"model": draft_name, **counts}})
        return
    _show(found, len(found) // len(prompts), model.encoder is None)
    n_tokens = sum(len(each.ids) for each in found)
    say(f"{n_tokens:,} tokens in {speculation.passes:,} passes of the model, {1 / per_token:,.0f} a second")
    say(f"{accepted:,} of {proposed:,} drafted tokens accepted ({speculation.acceptance:.0%})")
    say(f"{speed_up:.2f} times as fast a token as without the draft ({1 / per_token_plain:,.0f} a second)")


def _answer(name: str, settings: Mapping[str, Any], found: list[Completion]) -> dict[str, Any]:
    return {
        "model": name,
        "sampled": bool(settings.get("do_sample", False)),
        "seed": settings["seed"],
        "texts": [_as_data(each) for each in found],
    }


def _as_data(text: Completion) -> dict[str, Any]:
    """A text as JSON holds it; what a draft was good for concerns the batch and stands beside the texts."""
    data = asdict(replace(text, speculation=None))
    del data["speculation"]
    return {**data, "tokens": len(text.ids)}


def _show(found: list[Completion], each: int, continues: bool) -> None:
    """Print each text; a decoder's follows its prompt, an encoder-decoder's stands under it if there are several.

    Several texts of one prompt stand under it, numbered, each after its score.
    """
    from lathe.cli.output import answers

    console = answers()
    for number, text in enumerate(found):
        if number and number % each == 0:
            console.print()
        if each > 1:
            if number % each == 0:
                console.print(text.prompt, soft_wrap=True)
            start = f"{number % each + 1:>3}  {text.score:>8.3f}  "
            shown = text.text.strip().replace("\n", "\n" + " " * len(start))
            console.print(f"{start}{shown}", soft_wrap=True)
            continue
        if not continues and len(found) > 1:
            console.print(f"{text.prompt}\n→ ", end="", soft_wrap=True)
        console.print(f"{text.prompt}{text.text}" if continues else text.text, soft_wrap=True)


def _stream(model: Model, prompt: str, settings: Mapping[str, Any], special_tokens: bool) -> None:
    from lathe.generate.text import stream

    assert model.tokenizer is not None
    pieces = stream(
        model, model.tokenizer, prompt, stored=model.generation, keep_special_tokens=special_tokens, **settings
    )
    if model.encoder is None:
        sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _load(name: str, adapter: Path | None, device: Any) -> Model:
    """The model, with the adapter on it that was asked for or that stands in its place."""
    import lathe
    from lathe.adapt.opening import base_of, is_adapter
    from lathe.api.loading import load_adapted
    from lathe.generate.rows import check_weights

    if is_adapter(name):
        if adapter is not None:
            raise RequestError(f"{name} is an adapter and no model: expected the base of {adapter}")
        name, adapter = base_of(name), Path(name)
    model = lathe.load(name, device=device) if adapter is None else load_adapted(name, adapter, device=device)
    check_weights(model)  # also those that this text would not use
    return model


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise RequestError(f"--device {name}: there is no such device here; leave it out for the CPU") from None
    return device


def _lines(file: Path) -> list[str]:
    """The lines of a file; of stdin without those that hold nothing visible."""
    from lathe.text.corpus import decoded, read_lines

    if str(file) != "-":
        return [line.rstrip("\r\n") for line in read_lines(file)]
    return [line.rstrip("\r\n") for line in decoded(sys.stdin.buffer, "stdin") if line.strip()]


def _utf8(prompt: str) -> str:
    """The prompt, where it is text: a byte that is no UTF-8 reaches Python as half a character."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"--prompt {prompt!r} is not UTF-8; convert it, or give it in a file") from None
    return prompt
