"""A GGUF file run by llama.cpp, through the C interface that `llama-cpp-python` binds.

Decoders give logits, encoder-decoders the logits of the decoder after the encoder has read a row, encoders their
hidden states, classifiers their labels' logits. The cache is kept in float32, so that what is measured is the file.
They are held against the model, which says what the file's type costs, and against the model with the weights as that
type holds them, which says whether the file is right: few bits move the outputs far, and a wrong tensor could hide.
The tokenizer in the file is given texts of many kinds; one that llama.cpp cuts otherwise is named.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import LatheError
from lathe.export.base import Checked, Source
from lathe.export.compare import compare, probe, reference
from lathe.model.transformer import Transformer
from lathe.text.tokenizer import Tokenizer

_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h, which the package does not name

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 3.14 was about 22/7; that's all we'll say!",
    "나는 어제 친구와 함께 영화를 보았다.",
    "Zoë's café in Málaga opens at 9:30 – naïve, déjà vu…",
    "two  spaces, and three   more",
    "first line\nsecond line\tand a tab",
    "def f(x): return x ** 2  # square",
    "漢字とかな, ελληνικά, русский",
    "emoji 🙂 and a rare sign ⟁",
)


def check(source: Source, place: Path, rounded: Mapping[str, Tensor]) -> Checked:
    """Run the file beside the model.

    Args:
        rounded: the model's tensors as the file's types hold them.

    Raises:
        LatheError: llama.cpp cannot open or run it, or cuts most texts into other ids.
    """
    import llama_cpp

    architecture, rows = source.architecture, probe(source.architecture)
    with _quietly(llama_cpp) as errors, _opened(llama_cpp, place, errors) as opened:
        found = [_theirs(llama_cpp, opened, architecture, row) for row in rows]
        same, odd = _texts(llama_cpp, opened, source.tokenizer)
    exact, as_stored = ([_ours(model, row) for row in rows] for model in _models(source, rounded))
    what = "logits" if architecture.encoder is None or architecture.head.classifier is not None else "hidden states"
    return Checked(
        runtime=f"llama.cpp ({llama_cpp.__version__})",
        what=what if architecture.decoder is None or architecture.encoder is None else "logits of the decoder",
        difference=compare(exact, found),
        running=compare(as_stored, found),
        texts=same,
        notes=tuple(f"llama.cpp's tokenizer cuts this text otherwise: {text!r}" for text in odd),
    )


def _models(source: Source, rounded: Mapping[str, Tensor]) -> Iterator[Transformer]:
    for tensors in (source.tensors, rounded):
        yield reference(source.architecture, dict(tensors))


def _ours(model: Transformer, row: Tensor) -> Tensor:
    """What the model makes of a row, as `_theirs`."""
    architecture = model.architecture
    with torch.inference_mode():
        if architecture.encoder is not None and architecture.decoder is not None:
            target = _target(row, architecture.tokens.decoder_start)
            return _known(model(row[None], decoder_input_ids=target[None]).logits)[0]
        output = model(row[None])
        if architecture.decoder is not None:
            return _known(output.logits)[0]
        return output.last_hidden_state[0] if architecture.head.classifier is None else _known(output.logits)


def _theirs(library: Any, opened: Any, architecture: Architecture, row: Tensor) -> Tensor:
    """What llama.cpp makes of a row: places × numbers, or one place for a classifier."""
    if architecture.decoder is None:
        return _states(library, opened, row, architecture.d_model, architecture.head.classifier)
    vocab_size = architecture.embedding.vocab_size
    if architecture.encoder is None:
        return _logits(library, opened, None, row, vocab_size)
    return _logits(library, opened, row, _target(row, architecture.tokens.decoder_start), vocab_size)


def _known(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


def _target(row: Tensor, start: int | None) -> Tensor:
    """Something for the decoder to read: the start token and a part of the row."""
    return torch.cat((row.new_tensor([0 if start is None else start]), row[: len(row) // 2]))


@contextmanager
def _quietly(library: Any) -> Iterator[list[str]]:
    """Without llama.cpp's account of what it loads; the errors in it are kept, and yielded."""
    errors: list[str] = []

    def keep(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    own = getattr(library, "_logger", None)
    before = library.llama_log_callback(0) if own is None else own.llama_log_callback
    callback = library.llama_log_callback(keep)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        library.llama_log_set(before, ctypes.c_void_p(0))


@contextmanager
def _opened(library: Any, place: Path, errors: list[str]) -> Iterator[Any]:
    library.llama_backend_init()
    settings = library.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = library.llama_model_load_from_file(str(place).encode(), settings)
    if not model:
        why = f": {errors[0]}" if errors else ""
        raise LatheError(f"llama.cpp ({library.__version__}) cannot open what was written{why}; nothing was kept")
    try:
        yield model
    finally:
        library.llama_model_free(model)


@contextmanager
def _context(library: Any, model: Any, length: int, pooling: int | None = None) -> Iterator[Any]:
    """A context for one row. `pooling` asks for states: 0 for each token's own, 4 for a classifier's."""
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(length, 32)
    settings.type_k = settings.type_v = library.GGML_TYPE_F32
    settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if pooling is not None:
        settings.embeddings, settings.pooling_type = True, pooling
    context = library.llama_init_from_model(model, settings)
    if not context:
        raise LatheError(f"llama.cpp ({library.__version__}) cannot run what was written; nothing was kept")
    try:
        yield context
    finally:
        library.llama_free(context)


@contextmanager
def _batch(library: Any, row: Tensor) -> Iterator[Any]:
    """One row as a batch that asks for every token's output."""
    batch = library.llama_batch_init(len(row), 0, 1)
    try:
        batch.n_tokens = len(row)
        for place, number in enumerate(row.tolist()):
            batch.token[place], batch.pos[place] = number, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        yield batch
    finally:
        library.llama_batch_free(batch)


def _run(library: Any, call: Any, context: Any, batch: Any) -> None:
    code = call(context, batch)
    if code != 0:
        raise LatheError(f"llama.cpp ({library.__version__}) cannot run what was written (code {code})")


def _logits(library: Any, model: Any, source: Tensor | None, row: Tensor, vocab_size: int) -> Tensor:
    """A decoder's logits of every place of `row`; the encoder reads `source` first, where there is one."""
    with ExitStack() as stack:
        context = stack.enter_context(_context(library, model, max(len(row), 0 if source is None else len(source))))
        if source is not None:
            _run(library, library.llama_encode, context, stack.enter_context(_batch(library, source)))
        _run(library, library.llama_decode, context, stack.enter_context(_batch(library, row)))
        rows = [library.llama_get_logits_ith(context, place)[:vocab_size] for place in range(len(row))]
        return torch.tensor(rows)


def _states(library: Any, model: Any, row: Tensor, d_model: int, classifier: Any) -> Tensor:
    """An encoder's hidden states, or its classifier's logits."""
    with ExitStack() as stack:
        context = stack.enter_context(_context(library, model, len(row), 0 if classifier is None else 4))
        _run(library, library.llama_encode, context, stack.enter_context(_batch(library, row)))
        if classifier is not None:
            return torch.tensor([library.llama_get_embeddings_seq(context, 0)[: classifier.n_labels]])
        return torch.tensor([library.llama_get_embeddings_ith(context, place)[:d_model] for place in range(len(row))])


def _texts(library: Any, model: Any, tokenizer: Tokenizer | None) -> tuple[int | None, list[str]]:
    """How many of TEXTS llama.cpp cuts into the same ids, and those that it does not.

    Raises:
        LatheError: most come out otherwise, and not for characters alone that are spelt in bytes on one side.
    """
    if tokenizer is None:
        return None, []
    words = library.llama_model_get_vocab(model)
    pairs = {text: (_cut(library, words, text), tokenizer.encode(text)) for text in TEXTS}
    odd = [text for text, (theirs, ours) in pairs.items() if theirs != ours]
    worse = [text for text in odd if len({tuple(_without_bytes(ids, tokenizer)) for ids in pairs[text]}) > 1]
    if len(worse) > len(TEXTS) // 2:
        theirs, ours = pairs[worse[0]]
        raise LatheError(
            f"llama.cpp's tokenizer makes {theirs} of {worse[0]!r}, and the model's makes {ours}; nothing was kept"
        )
    return len(TEXTS) - len(odd), odd


def _without_bytes(ids: list[int], tokenizer: Tokenizer) -> list[int | None]:
    """The ids with one None for each run of bytes and unknown tokens."""
    unknown = {tokenizer.unk_id, *(tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256))}
    marked = [None if number in unknown else number for number in ids]
    return [number for place, number in enumerate(marked) if number is not None or marked[place - 1 : place] != [None]]


def _cut(library: Any, words: Any, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    ids = (library.llama_token * room)()
    count = library.llama_tokenize(words, data, len(data), ids, room, True, True)
    return list(ids[: max(count, 0)])
