"""Generation: read the prompt once, then choose a token, append it and read it, until every row has ended.

`tokens` is the loop. It yields each step's tokens as they are chosen, so what streams text to a reader and
what returns it whole run the same code.

Shape suffixes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.draw import draw, numbers
from lathe.generate.filters import Progress, pipeline
from lathe.generate.prompt import Prompt, make_prompt, room, start, with_start
from lathe.generate.rows import Rows
from lathe.generate.settings import Settings
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer


def generate(
    model: Transformer,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    stored: Mapping[str, Any] | None = None,
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
        settings: the fields of `Settings`, as `max_new_tokens=40, do_sample=True, top_p=0.9, seed=0`.

    Returns:
        B · num_return_sequences rows, the copies of one prompt side by side.

    Raises:
        RequestError: a model that cannot generate, an unknown setting or a bad value, an empty prompt, ids
            outside the vocabulary, more tokens than the model has positions.

    >>> import lathe, torch
    >>> from lathe.generate import generate
    >>> tiny = lathe.preset("t5-small").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=64)
    >>> model = lathe.Model(tiny, seed=0)
    >>> generate(model, torch.tensor([[5, 6, 1]]), max_new_tokens=4, min_new_tokens=4).shape
    torch.Size([1, 5])
    """
    _check_model(model)
    resolved = Settings.resolve(model.architecture, settings, stored)
    with torch.no_grad(), _evaluating(model):
        if model.encoder is None:
            if decoder_input_ids is not None or decoder_attention_mask is not None:
                raise RequestError("decoder_input_ids: this model has no encoder; pass its prompt as input_ids")
            memory, prompt = None, _decoder_prompt(model, input_ids, attention_mask, resolved)
        else:
            memory, prompt = _encode(model, input_ids, attention_mask, resolved)
            if decoder_input_ids is not None:
                # No pads are looked for here: T5's start token is its pad.
                mask = torch.ones_like(decoder_input_ids) if decoder_attention_mask is None else decoder_attention_mask
                given = _prompt(model, "decoder_input_ids", decoder_input_ids, mask, resolved)
                if len(given.ids_BT) != len(prompt.ids_BT):
                    raise RequestError(
                        f"decoder_input_ids has {len(given.ids_BT)} rows and input_ids {len(prompt.ids_BT)}; "
                        "expected as many"
                    )
                prompt = with_start(given, resolved.decoder_start_token_id)
        max_new = room(prompt, resolved, model.architecture)
        rows = Rows(model, prompt, max_new, memory)
        new = list(tokens(rows, resolved, prompt.columns, max_new))
    ids_BT = prompt.ids_BT.repeat_interleave(resolved.num_return_sequences, dim=0)
    return torch.cat((ids_BT, torch.stack(new, dim=1)), dim=1)


def tokens(rows: Rows, settings: Settings, n_prompt: int, max_new: int) -> Iterator[Tensor]:
    """Each step's tokens, B · num_return_sequences of them, until every row has ended or `max_new` are there."""
    n_prompts, copies = len(rows.prompt.ids_BT), settings.num_return_sequences
    u_BN = numbers(settings, n_prompts, max_new, rows.model.device) if settings.do_sample else None
    logits_BV = rows.prefill()
    if copies > 1:
        each_B = torch.arange(n_prompts, device=logits_BV.device).repeat_interleave(copies)
        rows.reorder(each_B)
        logits_BV = logits_BV[each_B]
    filters = pipeline(settings)
    ends = torch.tensor(settings.eos_token_id, dtype=torch.long, device=logits_BV.device)
    ended_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
    for step in range(max_new):
        for change in filters:
            logits_BV = change(logits_BV, Progress(n_prompt, step, max_new))
        chosen_B = logits_BV.argmax(dim=-1) if u_BN is None else draw(logits_BV, u_BN[:, step])
        chosen_B = chosen_B.masked_fill(ended_B, settings.filler)
        yield chosen_B
        ended_B = ended_B | torch.isin(chosen_B, ends)
        if step == max_new - 1 or (len(ends) and bool(ended_B.all())):
            return
        logits_BV = rows.step(chosen_B)


def _check_model(model: Transformer) -> None:
    architecture = model.architecture
    if architecture.decoder is None:
        raise RequestError("this model is an encoder alone and cannot generate; expected one with a decoder")
    if architecture.head.language is None:
        raise RequestError("this model has no language head and cannot generate; load its class with one")
    if not architecture.decoder.causal:
        raise RequestError("decoder.causal=false: this decoder looks ahead and cannot generate; expected a causal one")


def _prompt(model: Transformer, name: str, ids: Tensor, mask: Tensor | None, settings: Settings) -> Prompt:
    return make_prompt(name, ids, mask, settings, model.architecture.embedding.vocab_size, model.device)


def _decoder_prompt(model: Transformer, ids: Tensor | None, mask: Tensor | None, settings: Settings) -> Prompt:
    if ids is not None:
        return _prompt(model, "input_ids", ids, mask, settings)
    return start(1, "bos_token_id", settings.bos_token_id, model.device)


def _encode(model: Transformer, ids: Tensor | None, mask: Tensor | None, settings: Settings) -> tuple[Memory, Prompt]:
    """The encoder's output and the decoder's start."""
    if ids is None:
        raise RequestError("an encoder-decoder reads input_ids and none were given; pass batch × length token ids")
    source = _prompt(model, "input_ids", ids, mask, settings)
    token = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
    prompt = start(len(source.ids_BT), "decoder_start_token_id", token, model.device)
    return model.encode(source.ids_BT, source.mask_BT), prompt


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """No dropout meanwhile; every module afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
