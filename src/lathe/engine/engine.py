"""The engine: a model's passes through the native step, in place of its modules.

A decoding step of a small model is some hundred and twenty small operations, and what PyTorch spends between them is
as much as the arithmetic. Here a whole step is one call. It reads every weight once, and that is its limit: bytes over
the bandwidth of the memory.

An `Engine` is called as its model is, and answers with the same fields. It writes keys and values into the very
`Cache` that the modules would write, so whatever is done to a cache between two steps (beams that change places, rows
that come and go, a draft that is taken back) goes on working, and so does changing between the two from step to step.

Only real tokens are computed: pads take no row, and their hidden states are zeros.

Where the native step cannot serve, the modules do, and `reason` says why (the model as a whole) or `fallbacks` (single
calls).

Shape suffixes: B batch, T positions, S encoder positions, D d_model, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import torch
from torch import Tensor

from lathe.engine import layout
from lathe.engine.program import Program, Programs
from lathe.engine.stand_in import StandIn
from lathe.errors import RequestError
from lathe.model.cache import Cache, LayerCache
from lathe.model.mask import drop_if_full
from lathe.model.output import Output
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer, check_ids

PRECISIONS = ("float32", "int8", "int4")
STRETCH = 30_000_000  # nanoseconds that `go_on` takes steps for


class Engine(StandIn):
    """A model to be called without gradients: the same call and the same answer, computed by the native step.

    Args:
        model: in evaluation. Its weights are read where they are (float32) or packed once (int8), so the engine does
            not see a change that is made to them later; make a new one.
        precision: what plain linear layers and the output table are stored as; with `int8` and `int4` the rows that
            they read are rounded to int8, each by its largest magnitude. Layers that are quantised stay as they are.
        threads: how many compute; None for as many as PyTorch uses, asked at each call.
        instructions: the instruction set, for tests; None for the best of the machine.
        programs: of this model, where they are there already.

    Raises:
        RequestError: an unknown precision, or fewer than one thread.

    >>> import lathe, torch
    >>> from lathe.engine import Engine
    >>> tiny = lathe.preset("gpt2").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=64)
    >>> engine = Engine(lathe.Model(tiny, seed=0))
    >>> engine(torch.tensor([[5, 6, 1]])).logits.shape
    torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        model: Transformer,
        precision: str = "float32",
        *,
        threads: int | None = None,
        instructions: str | None = None,
        programs: Programs | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise RequestError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
        if threads is not None and threads < 1:
            raise RequestError(f"threads={threads}: expected at least 1")
        super().__init__(model)
        self.precision, self.threads = precision, threads
        self.fallbacks: Counter[str] = Counter()
        if programs is None:
            programs = Programs.of(model, precision, instructions, self._threads())
        self.reason = programs.reason
        self._encoder, self._decoder = programs.encoder, programs.decoder
        self._logits: Tensor | None = None  # that are looked at by nobody else

    @property
    def native(self) -> bool:
        """Whether the native step serves; if not, `reason` says why and the modules do."""
        return self.reason is None

    @property
    def step_bytes(self) -> int:
        """The bytes of weights that a decoding step reads; 0 where the native step does not serve."""
        return 0 if self._decoder is None else self._decoder.bytes

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Memory | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> Output:
        """One forward pass; arguments, results and errors as `Transformer.forward` has them.

        With a cache the answer holds logits and no hidden states.
        """
        why = self._cannot(attention_mask, decoder_attention_mask, encoder_outputs, past_key_values)
        if why is not None:
            if self.reason is None:
                self.fallbacks[why] += 1
            out: Output = self.model(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_position_ids=decoder_position_ids,
                encoder_outputs=encoder_outputs,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
            )
            return out
        model, memory = self.model, encoder_outputs
        if model.encoder is not None and memory is None:
            memory, logits = self._encode(input_ids, attention_mask, token_type_ids, position_ids, logits_to_keep)
        output = Output(past_key_values=past_key_values)
        if self._decoder is None:
            assert memory is not None
            output.last_hidden_state, output.logits = memory.hidden_BSD, logits
            ids_BT, mask_BT = input_ids, attention_mask
        elif model.encoder is None:
            ids_BT, mask_BT = input_ids, attention_mask
            given = _Given(input_ids, attention_mask, token_type_ids, position_ids)
            output.last_hidden_state, output.logits = self._run(
                self._decoder, given, logits_to_keep, cache=past_key_values
            )
        else:
            ids_BT = model.decoder_ids(decoder_input_ids, None, input_ids)
            mask_BT = decoder_attention_mask
            given = _Given(ids_BT, mask_BT, None, decoder_position_ids)
            output.last_hidden_state, output.logits = self._run(
                self._decoder, given, logits_to_keep, cache=past_key_values, memory=memory
            )
            assert memory is not None
            output.encoder_last_hidden_state = memory.hidden_BSD
        if past_key_values is None:
            assert output.last_hidden_state is not None
            pooled_ids = input_ids if self._encoder is not None and self._decoder is not None else ids_BT
            model.fill_pooled(output, output.last_hidden_state, pooled_ids, mask_BT)
        return output

    @torch.no_grad()
    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Memory:
        """The encoder's output, as `Transformer.encode` gives it."""
        why = self._cannot(attention_mask, None, None, None)
        if why is not None or self._encoder is None:
            if why is not None and self.reason is None:
                self.fallbacks[why] += 1
            return self.model.encode(input_ids, attention_mask, token_type_ids, position_ids)
        return self._encode(input_ids, attention_mask, token_type_ids, position_ids, None)[0]

    @torch.no_grad()
    def choose(
        self, ids_BT: Tensor, mask_BT: Tensor | None, cache: Cache, memory: Memory | None
    ) -> tuple[Tensor, Tensor] | None:
        """Read ids into the cache; each row's likeliest next token and its log-probability, B each.

        The token is -1 where a logit is no number. None, with nothing read, where the modules have to serve.

        Args:
            mask_BT: 1 for a token, 0 for a pad, none of which is in the last column; None where all are tokens.
        """
        if self._cannot(None, mask_BT, memory, cache) is not None or self._decoder is None:
            return None
        given = _Given(ids_BT, mask_BT, None, None)
        rows = len(ids_BT)
        self._row_of_logits(rows)
        chosen = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        self._run(self._decoder, given, 1, cache=cache, memory=memory, chosen=chosen)
        return chosen

    @torch.no_grad()
    def go_on(
        self,
        tokens_B: Tensor,
        ended_B: Tensor,
        cache: Cache,
        memory: Memory | None,
        *,
        most: int,
        ends: Tensor,
        filler: int,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Read a token more a row, choose the next, read that: as `choose` does, for several steps without Python.

        They stop after `most`, when every row has ended, or when `STRETCH` nanoseconds have passed, so that text
        streams and the work can be broken off.

        Args:
            tokens_B: what is read first.
            ended_B: rows that have ended already.
            ends: the tokens that end a row.
            filler: what a row goes on with that has ended.

        Returns:
            Of each step, N × B: the tokens, their log-probabilities (0 where the row had ended), and whether the row
            has ended. A token is -1, in the last step, where a logit is no number. None, with nothing read, where
            the modules have to serve.
        """
        if self._cannot(None, None, memory, cache) is not None or self._decoder is None:
            return None
        rows, before_B = len(tokens_B), cache.lengths_B
        call, ids_BT, held = self._call(self._decoder, _Given(tokens_B[:, None], None, None, None), cache, memory, most)
        logits = self._row_of_logits(rows)
        call.keep, call.logits = 1, logits.data_ptr()
        tokens_NB = torch.empty(most + 1, rows, dtype=torch.long)
        ended_NB = torch.empty(most + 1, rows, dtype=torch.bool)
        log_probs_NB, ends = torch.empty(most, rows), ends.contiguous()
        tokens_NB[0], ended_NB[0] = ids_BT[:, 0], ended_B
        steps = layout.Steps(most=most, n_ends=len(ends), nanoseconds=STRETCH, ends=ends.data_ptr(), filler=filler)
        steps.tokens, steps.ended = tokens_NB.data_ptr(), ended_NB.data_ptr()
        steps.log_probabilities = log_probs_NB.data_ptr()
        self._decoder.go_on(call, steps)
        del held  # until here the call read them
        cache.rewind(before_B + steps.done, torch.zeros_like(before_B))
        return tokens_NB[1 : steps.done + 1], log_probs_NB[: steps.done], ended_NB[1 : steps.done + 1]

    def _row_of_logits(self, rows: int) -> Tensor:
        if self._logits is None or len(self._logits) < rows:
            self._logits = torch.empty(rows, self.architecture.embedding.vocab_size)
        return self._logits

    def _cannot(
        self, mask: Tensor | None, decoder_mask: Tensor | None, memory: Memory | None, cache: Cache | None
    ) -> str | None:
        """Why this call is the modules' work; None where it is not."""
        if self.reason is not None:
            return self.reason
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on, which is PyTorch's own"
        padded = decoder_mask if self._encoder is not None and self._decoder is not None else mask
        if cache is None and padded is not None and not _unbroken(padded):
            return "a row has pads between its tokens"
        if cache is not None and cache.layers[0].read()[0].dtype != torch.float32:
            return "the cache is not float32"
        if cache is None and self.model.head.token == "first" and padded is not None and not bool(padded[:, 0].all()):
            return "a pooler reads a pad"
        if self._encoder is not None and self._decoder is not None:
            source = mask if memory is None else memory.padding_BS
            if source is not None and not (_unbroken(source) and bool(source.any(1).all())):
                return "a row of the encoder's has pads between its tokens, or no token"
        if memory is not None and memory.segments_BS is not None:
            return "the encoder's rows are packed"
        return None

    def _encode(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        types: Tensor | None,
        positions: Tensor | None,
        keep: int | None,
    ) -> tuple[Memory, Tensor | None]:
        assert self._encoder is not None
        given = _Given(ids, mask, types, positions)
        wants_logits = keep is not None and self._decoder is None
        hidden, logits = self._run(self._encoder, given, keep or 0, wants_logits=wants_logits)
        assert hidden is not None
        return Memory(hidden, drop_if_full(mask)), logits

    def _run(
        self,
        program: Program,
        given: _Given,
        keep: int,
        *,
        cache: Cache | None = None,
        memory: Memory | None = None,
        wants_logits: bool = True,
        chosen: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (without a cache) and logits (of a language head) of one stack's pass.

        Args:
            chosen: where tokens and their log-probabilities go, in place of logits that anyone sees.
        """
        call, ids_BT, held = self._call(program, given, cache, memory)
        mask_BT, (batch, columns) = given.mask, ids_BT.shape
        call.keep = keep if keep else columns
        hidden = logits = None
        if cache is None:
            n_tokens = batch * columns if mask_BT is None else int(mask_BT.sum())
            hidden = torch.empty(n_tokens, self.architecture.d_model)
            call.hidden = hidden.data_ptr()
        if chosen is not None:
            assert self._logits is not None
            call.logits, call.chosen = self._logits.data_ptr(), chosen[0].data_ptr()
            call.log_probabilities = chosen[1].data_ptr()
        elif self.model.head.language is not None and wants_logits:
            kept = batch * min(call.keep, columns) if mask_BT is None else int(mask_BT[:, -call.keep :].sum())
            logits = torch.empty(kept, self.architecture.embedding.vocab_size)
            call.logits = logits.data_ptr()
        program.run(call)
        del held  # until here the call read them
        if cache is not None:
            cache.advance()
        if hidden is not None:
            hidden = _spread(hidden, mask_BT, batch)
        if logits is not None:
            logits = _spread(logits, None if mask_BT is None else mask_BT[:, -call.keep :], batch)
        return hidden, logits

    def _call(
        self, program: Program, given: _Given, cache: Cache | None, memory: Memory | None, steps: int = 1
    ) -> tuple[layout.Call, Tensor, list[object]]:
        """What a pass reads: the call, the ids, B × T, and what has to live until it has run.

        Args:
            steps: how many passes the cache and the tables are to have room for, those after the first of one token.
        """
        ids_BT = given.checked(self.architecture.embedding.vocab_size, program)
        batch, columns = ids_BT.shape
        mask_BT = given.mask
        call = layout.Call(batch=batch, columns=columns, threads=self._threads(), ids=ids_BT.data_ptr())
        held: list[object] = [ids_BT]
        for name, tensor in (("mask", mask_BT), ("types", given.types), ("positions", given.positions)):
            if tensor is not None:
                wide = tensor.to(torch.long).expand(batch, columns).contiguous()
                held.append(wide)
                setattr(call, name, wide.data_ptr())
        reach, places_BT = columns, None  # places that a key or a query may stand at
        if cache is not None:
            before_B = cache.lengths_B
            places_BT = cache.place(mask_BT, columns + steps - 1)
            reach = cache.seen
            call.lengths = before_B.data_ptr()
            held += [before_B, *_fill_cache(call, cache)]
        given.check_positions(program, places_BT, reach)
        farthest = reach if given.positions is None else max(reach, int(given.positions.max()) + 1)
        _fill_tables(call, program, reach, farthest)
        if memory is not None:
            held += self._read_memory(call, program, memory, cache, batch)
        return call, ids_BT, held

    def _read_memory(
        self, call: layout.Call, program: Program, memory: Memory, cache: Cache | None, batch: int
    ) -> list[object]:
        """Point the call at the memory's keys and values; the first time they are computed."""
        sources, length = memory.hidden_BSD.shape[:2]
        n_layers, a = program.stack.spec.n_layers, program.stack.spec.attention
        layers = [LayerCache() for _ in range(n_layers)] if cache is None or not cache.memory else cache.memory
        if memory.padding_BS is None:
            first, count = [0] * sources, [length] * sources
        else:
            first = memory.padding_BS.long().argmax(1).tolist()
            count = memory.padding_BS.long().sum(1).tolist()
        call.memory_rows, call.memory_columns = sources, length
        call.memory_first, call.memory_count = (ctypes.c_int32 * sources)(*first), (ctypes.c_int32 * sources)(*count)
        held: list[object] = []
        if not layers[0].fixed:
            hidden_BSD = memory.hidden_BSD.detach().contiguous()
            shape = (sources, a.kv_heads, length, a.d_head)
            # The modules may read them after us, and a weight of 0 does not hide what is no number at a pad.
            fresh = torch.empty if memory.padding_BS is None else torch.zeros
            made = [(fresh(shape), fresh(shape)) for _ in layers]
            held += _fill_memory(call, made)
            call.memory, call.memory_hidden_row = hidden_BSD.data_ptr(), hidden_BSD.stride(0)
            program.run(call, reads_memory=True)
            for layer, (k, v) in zip(layers, made):
                layer.write(k, v)
            return [*held, *made]
        read = [layer.read() for layer in layers]
        call.memory_rows = len(read[0][0])
        if call.memory_rows != sources:
            raise RequestError(f"{sources} rows of the encoder's output for a cache of {call.memory_rows}")
        return [*_fill_memory(call, read), *read]


class _Given:
    """What a call was given for one stack."""

    def __init__(self, ids: Tensor | None, mask: Tensor | None, types: Tensor | None, positions: Tensor | None) -> None:
        self.ids, self.types, self.positions = ids, types, positions
        self.mask = drop_if_full(mask)

    def checked(self, vocab_size: int, program: Program) -> Tensor:
        """The ids, B × T; RequestError for what the modules refuse."""
        if self.ids is None:
            raise RequestError("give input_ids or inputs_embeds, one of the two")
        check_ids(self.ids, vocab_size)
        table = program.stack.input.token_types
        if table is None:
            self.types = None
        elif self.types is not None and not 0 <= int(self.types.min()) <= int(self.types.max()) < len(table.weight):
            raise RequestError(f"token_type_ids: expected numbers from 0 to {len(table.weight) - 1}")
        return self.ids.to(torch.long).contiguous()

    def check_positions(self, program: Program, places_BT: Tensor | None, reach: int) -> None:
        """RequestError where a position is past the model's table."""
        if program.stack.input.spec.limit is None:
            return
        if self.positions is not None:
            program.stack.input.check_length(self.positions)
        elif places_BT is not None:
            program.stack.input.check_length(places_BT.clamp(max=reach - 1))
        else:
            program.stack.input.check_length(torch.tensor([[reach - 1]]))


def _unbroken(mask_BT: Tensor) -> bool:
    """Whether each row's tokens stand side by side."""
    if mask_BT.shape[1] < 2 or bool(mask_BT.all()):
        return True
    turns_BT = mask_BT.bool()
    starts_B = turns_BT[:, 0].long() + (turns_BT[:, 1:] & ~turns_BT[:, :-1]).sum(1)
    return bool((starts_B <= 1).all())


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _fill_cache(call: layout.Call, cache: Cache) -> list[object]:
    both = [layer.read() for layer in cache.layers]
    k, v = _pointers([each[0] for each in both]), _pointers([each[1] for each in both])
    call.cache_k, call.cache_v = k, v
    call.cache_row, call.cache_head = both[0][0].stride()[:2]
    held: list[object] = [k, v]
    shared = [layer.shared for layer in cache.layers if layer.shared is not None]
    if shared:
        k, v = _pointers([each[0] for each in shared]), _pointers([each[1] for each in shared])
        call.first_k, call.first_v, call.n_first = k, v, cache.n_shared
        call.first_head = shared[0][0].stride(1)
        held += [k, v]
    return held


def _fill_memory(call: layout.Call, both: list[tuple[Tensor, Tensor]]) -> list[object]:
    k, v = _pointers([each[0] for each in both]), _pointers([each[1] for each in both])
    call.memory_k, call.memory_v = k, v
    call.memory_row, call.memory_head, call.memory_token = both[0][0].stride()[:3]
    return [k, v]


def _fill_tables(call: layout.Call, program: Program, reach: int, farthest: int) -> None:
    bias = program.relative_bias(reach)
    if bias is not None:
        call.bias, call.bias_length, call.bias_zero = bias[0].data_ptr(), bias[0].shape[1], bias[1]
    turns = program.turns(farthest)
    if turns is not None:
        call.cos, call.sin = turns[0].data_ptr(), turns[1].data_ptr()


def _spread(rows: Tensor, mask_BT: Tensor | None, batch: int) -> Tensor:
    """The tokens' rows in their places, B × T × width; zeros where there is a pad."""
    if mask_BT is None:
        return rows.view(batch, -1, rows.shape[-1])
    out = rows.new_zeros(*mask_BT.shape, rows.shape[-1])
    out[mask_BT.bool()] = rows
    return out
