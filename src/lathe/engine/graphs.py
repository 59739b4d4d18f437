"""Decoding steps on a GPU, recorded once and replayed: CUDA graphs.

A decoding step of a small model is hundreds of kernels of a few microseconds each, and starting them from Python takes
longer than they run. A graph holds the kernels and their arguments; the processor starts it once and the GPU goes
through it alone. What stands in it is fixed: the same tensors at the same addresses, the same shapes.

So a step that is recorded reads its tokens from a tensor of its own and leaves what it finds in others. It chooses the
likeliest token and puts it where the next step reads, so several steps can follow each other without the processor. Of
the cache it reads not the filled slots, which grow, but the next power of two; the mask hides what is not filled. Each
of those lengths (64, 128, …) is a recording.

A recording belongs to one cache. It is thrown away when the cache's tensors are others than they were, as when rows
come or go; beams that change places move what the tensors hold and keep it. The first two steps of each length run
unrecorded: libraries choose their kernels there, which a recording must not see.

Everything but single steps with a cache is the modules': prompts, encoders, whole sequences.

Shape suffixes: B batch, N steps, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lathe.engine.stand_in import StandIn
from lathe.model.cache import Cache
from lathe.model.output import Output
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer

log = logging.getLogger("lathe")

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""What records: it is given a step and returns what replays it. The step itself need not run meanwhile."""

LEAST_SLOTS = 64  # that a recording reads; a recording for every few would cost more than it saves
UNRECORDED = 2  # steps of each length
STRETCH = 16  # steps that `go_on` takes before anyone looks at what was chosen


class Graphs(StandIn):
    """A model to be called without gradients, whose single steps are recorded and replayed.

    Called as the model is, with the same answer. Its weights are read where they are, changes made in place included.

    Args:
        model: on a GPU, in evaluation.
        record: what records a step; CUDA's graphs where left out.
    """

    def __init__(self, model: Transformer, record: Recorder | None = None) -> None:
        super().__init__(model)
        self._record = CudaRecorder() if record is None else record
        self._steps: _Steps | None = None

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

        A recorded step's answer holds logits and no hidden states.
        """
        ids_BT = input_ids if self.model.encoder is None else decoder_input_ids
        others = (attention_mask, token_type_ids, position_ids, decoder_attention_mask, decoder_position_ids)
        if ids_BT is not None and past_key_values is not None and all(each is None for each in others):
            steps = self._ready(ids_BT, past_key_values, encoder_outputs)
            if steps is not None:
                logits_BV = steps.read(ids_BT[:, 0])
                return Output(logits=logits_BV[:, None], past_key_values=past_key_values)
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

    @torch.no_grad()
    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Memory:
        """The encoder's output, as `Transformer.encode` gives it."""
        return self.model.encode(input_ids, attention_mask, token_type_ids, position_ids)

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
        """Read a token more a row, choose the next, read that, for up to `STRETCH` steps; as `Engine.go_on`.

        Whether every row has ended is asked once they are taken: to ask is to wait for the GPU.
        """
        steps = self._ready(tokens_B[:, None], cache, memory)
        if steps is None:
            return None
        return steps.go_on(tokens_B, ended_B, min(most, STRETCH, cache.capacity - cache.filled), ends, filler)

    def _ready(self, ids_BT: Tensor, cache: Cache, memory: Memory | None) -> _Steps | None:
        """The recordings that serve this step; None where the modules have to."""
        if ids_BT.shape[1] != 1 or self.model.training or torch.is_autocast_enabled("cuda"):
            return None
        if cache.filled == 0 or cache.filled == cache.capacity or not all(layer.fixed for layer in cache.memory):
            return None  # the first pass computes a memory's keys; a full cache is refused by the modules
        if self._steps is None or not self._steps.serve(cache, memory):
            self._steps = _Steps(self.model, cache, memory, self._record)
        return self._steps


class _Steps:
    """One cache's recordings, and the tensors that they read and write. Where one fails, its steps go on unrecorded."""

    def __init__(self, model: Transformer, cache: Cache, memory: Memory | None, record: Recorder) -> None:
        rows, device = len(cache.lengths_B), cache.lengths_B.device
        self._model = model
        self._record: Recorder | None = record  # None once it has failed
        self._cache, self._memory = cache, memory
        self._tensors = _tensors(cache, memory)  # held, so that their addresses stay theirs
        self._replays: dict[int, Callable[[], None]] = {}
        self._unrecorded: dict[int, int] = {}
        self._lengths_B = cache.lengths_B.clone()
        self._tokens_B = torch.zeros(rows, dtype=torch.long, device=device)
        self._chosen_B = torch.zeros_like(self._tokens_B)
        self._filler = torch.zeros((), dtype=torch.long, device=device)
        self._ended_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self._ends: Tensor | None = None
        self._log_probs_B = torch.zeros(rows, device=device)
        self._logits_BV = torch.zeros(rows, model.architecture.embedding.vocab_size, device=device)

    def serve(self, cache: Cache, memory: Memory | None) -> bool:
        """Whether the recordings are of this cache as it is."""
        found = _tensors(cache, memory)
        return (
            cache is self._cache
            and len(found) == len(self._tensors)
            and all(a is b for a, b in zip(found, self._tensors))
        )

    def read(self, tokens_B: Tensor) -> Tensor:
        """Read a token of each row; the logits of the next, B × V."""
        self._tokens_B.copy_(tokens_B)
        self._lengths_B.copy_(self._cache.lengths_B)
        self._step()
        self._cache.lengths_B = self._lengths_B.clone()
        return self._logits_BV.to(self._model.dtype, copy=True)

    def go_on(
        self, tokens_B: Tensor, ended_B: Tensor, most: int, ends: Tensor, filler: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Graphs.go_on` says, `most` steps."""
        if self._ends is None or len(self._ends) != len(ends):
            self._ends = ends.clone()
            self._replays.clear()  # a number of ends is a shape
        self._ends.copy_(ends)
        self._filler.fill_(filler)
        self._tokens_B.copy_(tokens_B)
        self._ended_B.copy_(ended_B)
        self._lengths_B.copy_(self._cache.lengths_B)
        tokens, log_probs, ended = [], [], []
        for _ in range(most):
            self._step()
            tokens.append(self._chosen_B.clone())
            log_probs.append(self._log_probs_B.clone())
            ended.append(self._ended_B.clone())
        self._cache.lengths_B = self._lengths_B.clone()
        ended_NB = torch.stack(ended)
        # The one time that the GPU is waited for; steps past the end were taken in vain and are not told of.
        done = most - max(0, int(ended_NB.all(dim=1).sum()) - 1)
        return torch.stack(tokens)[:done], torch.stack(log_probs)[:done], ended_NB[:done]

    def _step(self) -> None:
        """One step for the tokens and lengths that stand ready, recorded or not."""
        filled = self._cache.filled
        slots = min(max(LEAST_SLOTS, 1 << filled.bit_length()), self._cache.capacity)
        self._replay(slots)
        self._cache.filled = filled + 1

    def _replay(self, slots: int) -> None:
        replay = self._replays.get(slots)
        if replay is not None:
            replay()
            return
        compute = partial(self._compute, slots)
        done = self._unrecorded[slots] = self._unrecorded.get(slots, 0) + 1
        if done > UNRECORDED and self._record is not None:
            try:
                replay = self._replays[slots] = self._record(compute)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self._record = None
                log.warning("a decoding step could not be recorded, PyTorch's modules compute: %s", reason)
        if replay is None:
            compute()
        else:
            replay()

    def _compute(self, slots: int) -> None:
        """The step: from the tokens and lengths to the logits, the choice, and what the next step begins with."""
        cache, model = self._cache, self._model
        # Its own token counts as the last slot that is read, wherever it goes.
        cache.lengths_B, cache.filled = self._lengths_B, slots - 1
        ids_B1 = self._tokens_B[:, None]
        if model.encoder is None:
            out = model(ids_B1, past_key_values=cache, logits_to_keep=1)
        else:
            out = model(decoder_input_ids=ids_B1, encoder_outputs=self._memory, past_key_values=cache, logits_to_keep=1)
        self._logits_BV.copy_(out.logits[:, -1])
        self._lengths_B.copy_(cache.lengths_B)
        if self._ends is None:
            return
        best_B = self._logits_BV.argmax(dim=-1)
        log_probs_B = self._logits_BV.log_softmax(dim=-1).gather(1, best_B[:, None])[:, 0]
        # −1 says that a logit is no number; a row reads on with a token that there is.
        chosen_B = best_B.masked_fill(~self._logits_BV.isfinite().all(dim=-1), -1)
        self._chosen_B.copy_(torch.where(self._ended_B, self._filler, chosen_B))
        self._log_probs_B.copy_(log_probs_B.masked_fill(self._ended_B, 0))
        self._ended_B.logical_or_(torch.isin(self._chosen_B, self._ends))
        self._tokens_B.copy_(self._chosen_B.clamp(min=0))


class CudaRecorder:
    """Records with `torch.cuda.graph`; the graphs share the memory that their steps need meanwhile."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record one step and return what replays it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


def _tensors(cache: Cache, memory: Memory | None) -> list[Tensor]:
    """All that a step reads of a cache and an encoder's output, but for the lengths."""
    found = [cache.rows_B1]
    found += [tensor for layer in (*cache.layers, *cache.memory) for tensor in layer.read()]
    found += [tensor for layer in cache.layers if layer.shared is not None for tensor in layer.shared]
    if memory is not None:
        found += [each for each in (memory.hidden_BSD, memory.padding_BS) if each is not None]
    return found
