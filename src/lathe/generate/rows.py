"""The rows of a batch in flight: a model, its cache and the encoder's output, as tokens in and logits out.

Everything that decodes works through these calls: `prefill` reads the prompt, `step` one token a row, `spread`
makes several rows of each prompt, `swap` lets beams change places, `reorder` copies and drops rows. With the cache
a step reads one token a row and not all that came before.

Shape suffixes: B batch, T positions, S encoder positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lathe.engine import Engine
from lathe.engine.choose import Reader
from lathe.engine.graphs import Graphs
from lathe.errors import LatheError, RequestError
from lathe.generate.memory import check_room, decoding_bytes
from lathe.generate.prompt import Prompt
from lathe.model.cache import Cache
from lathe.model.output import Output
from lathe.model.stack import Memory


class Rows:
    """Rows that a model continues.

    Args:
        model: has a causal decoder and a language head; or the engine that stands in its place.
        prompt: what each row starts with.
        max_new: how many tokens are added at most.
        memory: the encoder's output, where there is one.
        copies: how many rows `spread` will make of each.

    Raises:
        RequestError: more rows or tokens than the memory holds, before any of it is taken.
        LatheError: no memory for the cache.
    """

    def __init__(
        self, model: Reader, prompt: Prompt, max_new: int, memory: Memory | None = None, copies: int = 1
    ) -> None:
        self.model, self.memory = model, memory
        self.prompt = prompt.padded_left()
        batch, columns = self.prompt.ids_BT.shape
        slots = columns + max_new - 1
        source = 0 if memory is None else memory.hidden_BSD.shape[1]
        needed = decoding_bytes(model.architecture, batch * copies, slots, batch, source, model.dtype.itemsize)
        check_room(needed, batch * copies, slots, model.device)
        try:
            self.cache = Cache(model.architecture, batch, slots, dtype=model.dtype, device=model.device)
        except RuntimeError as error:  # what torch raises on every device when memory runs out
            raise LatheError(
                f"a cache for {batch:,} rows of {slots:,} tokens does not fit into memory; "
                "ask for fewer new tokens, or for fewer rows at once"
            ) from error

    def prefill(self) -> Tensor:
        """Read the prompt; the logits of each row's next token, B × V, float32."""
        return self._read(self.prompt.ids_BT, self.prompt.mask_BT)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Read one more token a row; the logits of the one after, B × V, float32."""
        return self._read(tokens_B[:, None], None)

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """Read the prompt; each row's likeliest next token and its log-probability."""
        if isinstance(self.model, Engine):
            found = self.model.choose(self.prompt.ids_BT, self.prompt.mask_BT, self.cache, self.memory)
            if found is not None:
                self._refuse_no_numbers(found[0])
                return found
        return _likeliest(self.prefill())

    def go_on(
        self, tokens_B: Tensor, ended_B: Tensor, *, most: int, ends: Tensor, filler: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read a token more a row, take the likeliest next one, and go on with it for up to `most` steps.

        Args:
            ended_B: rows that have ended; their tokens are `filler`, with a log-probability of 0.
            ends: the tokens that end a row.

        Returns:
            The tokens, their log-probabilities and whether each row has ended, of each step that was taken, N × B.
        """
        if isinstance(self.model, Engine | Graphs):
            found = self.model.go_on(tokens_B, ended_B, self.cache, self.memory, most=most, ends=ends, filler=filler)
            if found is not None:
                self._refuse_no_numbers(found[0][-1])
                return found
        chosen_B, log_probs_B = _likeliest(self.step(tokens_B))
        chosen_B, log_probs_B = chosen_B.masked_fill(ended_B, filler), log_probs_B.masked_fill(ended_B, 0)
        return chosen_B[None], log_probs_B[None], (ended_B | torch.isin(chosen_B, ends))[None]

    def _refuse_no_numbers(self, chosen_B: Tensor) -> None:
        if bool((chosen_B < 0).any()):
            explain_no_numbers(self.model)

    def spread(self, copies: int) -> None:
        """Make each row `copies` rows side by side, which share the encoder's output."""
        if copies > 1:
            self.cache.spread(copies)

    def swap(self, rows_B: Tensor) -> None:
        """Make row i a copy of the old row `rows_B[i]`, a row of the same prompt."""
        self.cache.swap(rows_B)

    def reorder(self, rows_B: Tensor) -> None:
        """Make row i a copy of the old row `rows_B[i]`, whichever it is."""
        if self.memory is not None:
            sources_B = rows_B // (len(self.cache.lengths_B) // len(self.memory.hidden_BSD))
            padding_BS = None if self.memory.padding_BS is None else self.memory.padding_BS[sources_B]
            self.memory = replace(self.memory, hidden_BSD=self.memory.hidden_BSD[sources_B], padding_BS=padding_BS)
        self.cache.reorder(rows_B)

    def _read(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        return next_logits(self.model, ids_BT, mask_BT, self.cache, self.memory)


@torch.no_grad()
def next_logits(model: Reader, ids_BT: Tensor, mask_BT: Tensor | None, cache: Cache, memory: Memory | None) -> Tensor:
    """Read ids into the cache; the logits of each row's next token, B × V, float32.

    Args:
        mask_BT: 1 for a token, 0 for a pad, none of which is in the last column; None where all are tokens.
        memory: the encoder's output, where there is one.
    """
    if memory is None:
        out: Output = model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, logits_to_keep=1)
    else:
        out = model(
            decoder_input_ids=ids_BT,
            decoder_attention_mask=mask_BT,
            encoder_outputs=memory,
            past_key_values=cache,
            logits_to_keep=1,
        )
    assert out.logits is not None
    logits_BV = out.logits[:, -1].float()
    if not bool(logits_BV.isfinite().all()):
        explain_no_numbers(model)
    return logits_BV


def _likeliest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    chosen_B = logits_BV.argmax(dim=-1)
    return chosen_B, logits_BV.log_softmax(dim=-1).gather(1, chosen_B[:, None])[:, 0]


def explain_no_numbers(model: Reader) -> None:
    """Raise the error that says why what a model gives is no number: a damaged weight, or a type too narrow."""
    check_weights(model)
    raise LatheError(
        f"the model's results are not all numbers, though its weights are: {model.dtype} is too narrow for them; "
        "load it as torch.float32"
    )


def check_weights(model: Reader) -> None:
    """Raise RequestError where a weight holds what is no number, used by the text at hand or not."""
    for name, tensor in model.named_parameters():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise RequestError(
                f"the weight {name} holds {bad:,} values of {tensor.numel():,} that are NaN or infinite: the model is "
                "damaged; use an earlier checkpoint of it"
            )
