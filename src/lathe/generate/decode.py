"""Generation from ids to ids: read the prompt, decode, and lay the result out.

`generate` gives ids, `decode` also what they are worth, `steps` each step's as they are chosen. One token a step
is `lathe.generate.single`'s to choose, and `lathe.generate.beams` searches.

Shape suffixes: B batch, T positions, R returned rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lathe.engine import Engine
from lathe.engine.choose import Reader, reader
from lathe.errors import RequestError
from lathe.generate.beams import search
from lathe.generate.prompt import Prompt, make_prompt, room, start, with_start
from lathe.generate.rows import Rows
from lathe.generate.settings import Settings
from lathe.generate.single import Step, Task, tokens
from lathe.generate.speculative import Speculation, check_pair, speculate
from lathe.generate.stops import StopStrings
from lathe.generate.watch import Watch
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer
from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Decoded:
    """What was decoded, R rows: `num_return_sequences` of each prompt side by side.

    Args:
        sequences_RT: the ids, laid out as `generate` says.
        n_prompt: how many columns of them are the prompt.
        lengths_R: how many of the columns after it are new tokens; padding tokens fill the rest.
        ended_R: whether an end-of-sequence token or a stop string ended the row, and not the length.
        log_probs_RT: of each new token under the model, before temperature and any filter; 0 for what fills up.
        scores_R: the sum of these; for beams what they are ranked by, which filters and `length_penalty` change.
        speculation: what a draft was good for; None without one.
    """

    sequences_RT: Tensor
    n_prompt: int
    lengths_R: Tensor
    ended_R: Tensor
    log_probs_RT: Tensor
    scores_R: Tensor
    speculation: Speculation | None = None


def generate(
    model: Transformer,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    stored: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    draft: Transformer | None = None,
    num_draft_tokens: int = 4,
    engine: str | Engine = "auto",
    **settings: Any,
) -> Tensor:
    """Token ids, laid out as `transformers` lays them out.

    A decoder's are the prompt as given and the new tokens after it; an encoder-decoder's are the start token
    (or `decoder_input_ids`) and the new ones. Rows that end early are filled with the padding token.

    Args:
        model: a decoder or an encoder-decoder with a language head.
        input_ids: B × T, the prompts; the encoder's input where there is one. A decoder without a prompt
            starts one row from `bos_token_id`.
        attention_mask: B × T, 1 for a token, 0 for a pad, which may stand on either side; made from the
            padding token where left out.
        decoder_input_ids, decoder_attention_mask: what an encoder-decoder's output starts with.
        stored: the settings that came with the model; `settings` go before them.
        tokenizer: what `stop_strings` are looked for with; the model's own where it has one.
        draft: a smaller model with the same vocabulary that proposes tokens; it changes the speed and not the
            distribution of the text (`lathe.generate.speculative`).
        num_draft_tokens: how many it proposes at once.
        engine: what computes the passes: `auto`, `native`, `torch`, or an `Engine` of the model
            (`lathe.engine.choose`); the tokens are the same.
        settings: the fields of `Settings`, as `max_new_tokens=40, num_beams=4` or `do_sample=True, top_p=0.9, seed=0`.

    Returns:
        B · num_return_sequences rows, those of one prompt side by side, beams from the best down.

    Raises:
        RequestError: a model that cannot generate, an unknown setting or a bad value, an empty prompt, ids
            outside the vocabulary, more tokens than the model has positions, more rows than the memory holds.

    >>> import lathe, torch
    >>> from lathe.generate import generate
    >>> tiny = lathe.preset("t5-small").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=64)
    >>> model = lathe.Model(tiny, seed=0)
    >>> generate(model, torch.tensor([[5, 6, 1]]), max_new_tokens=4, min_new_tokens=4).shape
    torch.Size([1, 5])
    """
    found = decode(
        model,
        input_ids,
        attention_mask,
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=decoder_attention_mask,
        stored=stored,
        tokenizer=tokenizer,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        engine=engine,
        **settings,
    )
    return found.sequences_RT


def decode(
    model: Transformer,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    stored: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    draft: Transformer | None = None,
    num_draft_tokens: int = 4,
    watch: Watch | None = None,
    engine: str | Engine = "auto",
    **settings: Any,
) -> Decoded:
    """What `generate` does, with the log-probabilities and the scores beside the ids.

    Args and errors are `generate`'s; `watch` is told of each step (`lathe.generate.watch`).

    >>> import lathe, torch
    >>> from lathe.generate import decode
    >>> tiny = lathe.preset("gpt2").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=64)
    >>> model = lathe.Model(tiny.with_({"tokens.eos": [], "tokens.bos": None}), seed=0)
    >>> found = decode(model, torch.tensor([[5, 6, 1]]), max_new_tokens=4, num_beams=3, num_return_sequences=2)
    >>> found.sequences_RT.shape, bool(found.scores_R[0] >= found.scores_R[1])
    (torch.Size([2, 7]), True)
    """
    resolved = resolve_settings(model, settings, stored)
    given = (input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
    if draft is not None:
        resolve_settings(draft, {}, None)  # refuses a model that cannot generate
        check_pair(model, draft, resolved, num_draft_tokens)
        if watch is not None:
            raise RequestError("a draft's steps cannot be watched: rows are at different tokens; leave one of them out")
    with torch.no_grad(), evaluating(model):
        task, prompt = _prepare(model, engine, *given, resolved, tokenizer)
        if draft is not None:
            with evaluating(draft):
                # Where a row ends is the parent's to say; a draft need not have a tokenizer.
                same = replace(resolved, max_new_tokens=task.max_new, max_length=None, stop_strings=None)
                own = "auto" if isinstance(engine, Engine) else engine
                drafting = _prepare(draft, own, *given, same, tokenizer)[0]
                found = speculate(task, drafting, num_draft_tokens)
            return Decoded(
                _after(prompt, found.tokens_RT),
                prompt.columns,
                found.lengths_R,
                found.ended_R,
                found.log_probs_RT,
                found.log_probs_RT.sum(1),
                found.speculation,
            )
        task = replace(task, watch=watch)
        return _searched(task, prompt) if task.settings.num_beams > 1 else _followed(task, prompt)


def steps(
    model: Transformer,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    stored: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    engine: str | Engine = "auto",
    **settings: Any,
) -> Iterator[Step]:
    """What `generate` does, each step's tokens as they are chosen; closing the iterator ends it.

    Args and errors are `generate`'s; beams are refused, of which none is the text before the end.

    >>> import lathe, torch
    >>> from lathe.generate import steps
    >>> tiny = lathe.preset("gpt2").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=64)
    >>> model = lathe.Model(tiny.with_({"tokens.eos": [], "tokens.bos": None}), seed=0)
    >>> sum(len(step.tokens_B) for step in steps(model, torch.tensor([[5, 6, 1]]), max_new_tokens=4))
    4
    """
    resolved = resolve_settings(model, settings, stored)
    if resolved.num_beams > 1:
        raise RequestError(f"num_beams={resolved.num_beams}: beams have no text before they end; pass num_beams=1")
    with evaluating(model):
        with torch.no_grad():  # not around a yield: the caller's own work may need gradients
            task, _ = _prepare(model, engine, input_ids, attention_mask, None, None, resolved, tokenizer)
        yield from tokens(task)


def _prepare(
    model: Transformer,
    engine: str | Engine,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
    settings: Settings,
    tokenizer: Tokenizer | None,
) -> tuple[Task, Prompt]:
    """What there is to do, the encoder's part done, and the prompt as it was given."""
    stops = stop_strings(model, tokenizer, settings)
    through = reader(model, engine)
    memory, source = None, None
    if model.encoder is None:
        if decoder_input_ids is not None or decoder_attention_mask is not None:
            raise RequestError("decoder_input_ids: this model has no encoder; pass its prompt as input_ids")
        prompt = _decoder_prompt(model, input_ids, attention_mask, settings)
    else:
        memory, source, prompt = _encode(through, input_ids, attention_mask, settings)
        if decoder_input_ids is not None:
            # No pads are looked for here: T5's start token is its pad.
            mask = torch.ones_like(decoder_input_ids) if decoder_attention_mask is None else decoder_attention_mask
            given = _prompt(model, "decoder_input_ids", decoder_input_ids, mask, settings)
            if len(given.ids_BT) != len(prompt.ids_BT):
                raise RequestError(
                    f"decoder_input_ids has {len(given.ids_BT)} rows and input_ids {len(prompt.ids_BT)}; "
                    "expected as many"
                )
            prompt = with_start(given, settings.decoder_start_token_id)
    max_new = room(prompt, settings, model.architecture)
    rows = Rows(through, prompt, max_new, memory, max(settings.num_beams, settings.num_return_sequences))
    return Task(rows, settings, prompt.columns, max_new, source, stops), prompt


def _followed(task: Task, prompt: Prompt) -> Decoded:
    """One token a step, to the end."""
    found = list(tokens(task))
    ended_RT = torch.stack([step.ended_B for step in found], dim=1)
    log_probs_RT = torch.stack([step.log_probs_B for step in found], dim=1)
    return Decoded(
        _after(prompt, torch.stack([step.tokens_B for step in found], dim=1)),
        prompt.columns,
        (len(found) - ended_RT.sum(1) + 1).clamp(max=len(found)),  # the token that ends a row is one of it
        ended_RT[:, -1],
        log_probs_RT,
        log_probs_RT.sum(1),
    )


def _searched(task: Task, prompt: Prompt) -> Decoded:
    """The best of the beams, as long as the longest of them."""
    found = search(task)
    lengths_R = found.lengths_PN.flatten()
    longest = int(lengths_R.max())
    return Decoded(
        _after(prompt, found.ids_PNT.flatten(0, 1)[:, :longest]),
        prompt.columns,
        lengths_R,
        found.ended_PN.flatten(),
        found.log_probs_PNT.flatten(0, 1)[:, :longest],
        found.scores_PN.flatten(),
    )


def _after(prompt: Prompt, new_RT: Tensor) -> Tensor:
    ids_RT = prompt.ids_BT.repeat_interleave(len(new_RT) // len(prompt.ids_BT), dim=0)
    return torch.cat((ids_RT, new_RT), dim=1)


def stop_strings(model: Transformer, tokenizer: Tokenizer | None, settings: Settings) -> StopStrings | None:
    """What looks for the settings' stop strings; RequestError where there is no tokenizer to look with."""
    if not settings.stop_strings:
        return None
    tokenizer = tokenizer or getattr(model, "tokenizer", None)  # `lathe.Model` carries its own
    if tokenizer is None:
        raise RequestError(
            f"stop_strings={list(settings.stop_strings)}: texts are found with a tokenizer and this model has none; "
            "pass tokenizer=, or eos_token_id for a token"
        )
    return StopStrings(tokenizer, settings.stop_strings)


def resolve_settings(model: Transformer, settings: Mapping[str, Any], stored: Mapping[str, Any] | None) -> Settings:
    """The settings, after refusing a model that cannot generate."""
    architecture = model.architecture
    if architecture.decoder is None:
        raise RequestError("this model is an encoder alone and cannot generate; expected one with a decoder")
    if architecture.head.language is None:
        raise RequestError("this model has no language head and cannot generate; load its class with one")
    if not architecture.decoder.causal:
        raise RequestError("decoder.causal=false: this decoder looks ahead and cannot generate; expected a causal one")
    return Settings.resolve(architecture, settings, stored)


def _prompt(model: Reader, name: str, ids: Tensor, mask: Tensor | None, settings: Settings) -> Prompt:
    return make_prompt(name, ids, mask, settings, model.architecture.embedding.vocab_size, model.device)


def _decoder_prompt(model: Transformer, ids: Tensor | None, mask: Tensor | None, settings: Settings) -> Prompt:
    if ids is not None:
        return _prompt(model, "input_ids", ids, mask, settings)
    return start(1, "bos_token_id", settings.bos_token_id, model.device)


def _encode(
    model: Reader, ids: Tensor | None, mask: Tensor | None, settings: Settings
) -> tuple[Memory, Prompt, Prompt]:
    """The encoder's output, what it read, and the decoder's start."""
    if ids is None:
        raise RequestError("an encoder-decoder reads input_ids and none were given; pass batch × length token ids")
    source = _prompt(model, "input_ids", ids, mask, settings)
    token = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
    prompt = start(len(source.ids_BT), "decoder_start_token_id", token, model.device)
    return model.encode(source.ids_BT, source.mask_BT), source, prompt


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """No dropout meanwhile; every module afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
