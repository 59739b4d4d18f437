"""llama.cpp through llama-cpp-python's low-level functions, which alone decode several rows at once.

Lathe exports the model to GGUF in float32, and llama.cpp's own quantiser makes Q8_0 and Q4_0 of that, by its own
recipe. Rows are sequences of one context with a place for each; a step is one `llama_decode` of one token a row, and
the likeliest token is taken with numpy, which is faster than llama.cpp's sampler. Keys and values are float16, its
default, and its attention is what it picks; but for F32, which is there to compute the same as everyone.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.base import Ids, Unfit, log_probs, versions

PLACES = 256  # a sequence's places come in multiples of this
F32 = 0  # ggml_type
POOLING_NONE = 0


def version() -> str:
    """The binding's."""
    return versions("llama-cpp-python", missing="pip install llama-cpp-python (it is compiled)")


def prepare(model: Path, files: Path, kind: str, precision: str) -> None:
    """Export in float32, and quantise that."""
    import llama_cpp

    exported = files.with_name("f32.gguf")
    _export(model, exported)
    if precision == "F32":
        exported.rename(files)
        return
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[precision]
    if llama_cpp.llama_model_quantize(os.fsencode(exported), os.fsencode(files), ctypes.byref(asked)):
        raise Unfit(f"llama.cpp could not make {precision} of the float32 file")
    exported.unlink()


def _export(model: Path, path: Path) -> None:
    import lathe
    from lathe.errors import RequestError

    try:
        lathe.load(model).export(path, to="gguf", kind="f32")
    except RequestError as error:
        raise Unfit(str(error)) from None


class Runner:
    """A model, and a context that is made anew for another number of rows or places."""

    def __init__(self, files: Path, kind: str, threads: int, precision: str) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.kind, self.threads, self.precision = kind, threads, precision
        self.lib.llama_backend_init()
        asked = self.lib.llama_model_default_params()
        asked.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(os.fsencode(files), asked)
        if not self.model:
            raise Unfit("llama.cpp cannot open the file (its reason is in the log)")
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self._context: Any = None
        self._made_for = (0, 0, 0)

    def generate(self, prompts: Ids, new: int) -> Ids:
        """Greedy, a step of all rows at once."""
        batch, length = len(prompts), len(prompts[0])
        self._ready(batch, length + new, length)
        places = length
        if self.kind == "seq2seq":
            self._run(self.lib.llama_encode, prompts, 0)
            start = self.lib.llama_model_decoder_start_token(self.model)
            prompts, places = [[start]] * batch, 1
        self._run(self.lib.llama_decode, prompts, 0)
        steps = [self._likeliest(batch)]
        for step in range(1, new):
            self._run(self.lib.llama_decode, [[token] for token in steps[-1]], places + step - 1)
            steps.append(self._likeliest(batch))
        return [list(row) for row in zip(*steps)]

    def encode(self, rows: Ids) -> np.ndarray:
        """The hidden states, which it calls embeddings without pooling."""
        batch, length = len(rows), len(rows[0])
        self._ready(batch, length, length)
        self._run(self.lib.llama_encode, rows, 0, every=True)
        width = self.lib.llama_model_n_embd(self.model)
        found = np.ctypeslib.as_array(self.lib.llama_get_embeddings(self._context), (batch * length, width))
        return found.reshape(batch, length, width).copy()

    def score(self, prompt: list[int], target: list[int]) -> dict[str, np.ndarray]:
        """One pass over the text, logits of every position."""
        self._ready(1, len(prompt) + len(target), len(prompt) + len(target))
        if self.kind == "seq2seq":
            self._run(self.lib.llama_encode, [prompt], 0)
            text = [self.lib.llama_model_decoder_start_token(self.model), *target[:-1]]
        else:
            text = prompt + target[:-1]
        self._run(self.lib.llama_decode, [text], 0, every=True)
        logits_TV = self._logits(len(text))[-len(target) :].copy()
        return {"logits": logits_TV, "log_probs": log_probs(logits_TV, target)}

    def _ready(self, batch: int, length: int, longest: int) -> None:
        """An empty context with places for so many rows of so many tokens, of which a call reads up to `longest`."""
        places = -(-length // PLACES) * PLACES
        if self._made_for == (batch, places, longest):
            memory = self.lib.llama_get_memory(self._context)
            if memory:  # an encoder alone keeps nothing
                self.lib.llama_memory_clear(memory, False)
            return
        if self._context is not None:
            self.lib.llama_free(self._context)
        asked = self.lib.llama_context_default_params()
        asked.n_seq_max, asked.n_ctx, asked.n_batch = batch, batch * places, batch * longest
        asked.n_threads = asked.n_threads_batch = self.threads
        if self.kind != "causal":
            asked.n_ubatch = batch * longest  # an encoder reads its rows at once
        if self.kind == "seq2seq":
            asked.kv_unified = True  # its relative positions know one stream of places only
        if self.kind == "encoder":
            asked.embeddings, asked.pooling_type = True, POOLING_NONE
        if self.precision == "F32":
            asked.type_k = asked.type_v = F32
            asked.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds on its way
        self._context = self.lib.llama_init_from_model(self.model, asked)
        if not self._context:
            raise Unfit(f"llama.cpp makes no context of {batch} rows with {places} places (its reason is in the log)")
        self._made_for = (batch, places, longest)

    def _run(self, function: Any, rows: Ids, place: int, every: bool = False) -> None:
        """Read rows of one length, the first token of each at `place`; logits of the last one, or of every one."""
        length = len(rows[0])
        batch = self.lib.llama_batch_init(len(rows) * length, 0, 1)
        try:
            batch.n_tokens = len(rows) * length
            at = 0
            for sequence, row in enumerate(rows):
                for column, token in enumerate(row):
                    batch.token[at], batch.pos[at] = token, place + column
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                    batch.logits[at] = every or column == length - 1
                    at += 1
            code = function(self._context, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"{function.__name__} of {len(rows)} x {length} tokens answered {code}")

    def _logits(self, rows: int) -> np.ndarray:
        """Those of the last call, R × V, where it left them."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self._context), (rows, self.vocab_size))

    def _likeliest(self, batch: int) -> list[int]:
        found: list[int] = self._logits(batch).argmax(axis=1).tolist()
        return found
