"""CTranslate2: a directory with the weights (`model.bin`), the vocabulary, a small `config.json`, and the tokenizer.

CTranslate2 works on tokens as text and leaves the tokenizer to its caller, so the model's own tokenizer files lie
beside it. Rows of the table that the tokenizer does not name get names of their own, since CTranslate2 wants one for
each row. Types: the weights are stored in the one named; on a CPU that cannot compute in it (float16), CTranslate2
computes in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.errors import LatheError, RequestError
from lathe.export.base import Checked, Format, Kind, Package, Source
from lathe.export.compare import compare, probe, reference
from lathe.export.ctranslate2_spec import make, objections
from lathe.model.transformer import Transformer


def write(source: Source, kind: Kind, place: Path) -> list[str]:
    """Write CTranslate2's directory."""
    # The quantiser of CTranslate2 scales the arrays that it is given in place.
    tensors = {name: tensor.clone() for name, tensor in source.tensors.items()}
    spec = make(source.architecture, tensors)
    tokens = token_names(source)
    _set_tokens(spec.config, source, tokens)
    if source.architecture.decoder is None or source.architecture.encoder is None:
        spec.register_vocabulary(tokens)
    else:
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
    spec.validate()
    spec.optimize(quantization=kind.name)
    spec.save(str(place))
    notes = [
        f"its {name} sees {stack.attention.window} tokens at a time; CTranslate2 drops what is older as it decodes, "
        "and computes neither longer prompts nor prompts of different lengths in one batch as the model does"
        for name, stack in source.architecture.stacks
        if stack.attention.window is not None
    ]
    if len(source.architecture.tokens.eos) > 1:
        notes.append("it ends a text in several ways, and CTranslate2's config names the first; give it `end_token`")
    if source.tokenizer is None:
        return [*notes, "the model has no tokenizer: CTranslate2's tokens are the ids, as text"]
    source.tokenizer.save(place)
    return notes


def token_names(source: Source) -> list[str]:
    """A different name for each row of the token table: the tokenizer's, or one that says which row it is."""
    rows = range(source.architecture.embedding.vocab_size)
    if source.tokenizer is None:
        return [str(row) for row in rows]
    names = {number: token for token, number in source.tokenizer.vocabulary.items()}
    return [names.get(row, f"<row {row}>") for row in rows]


def _set_tokens(config: Any, source: Source, tokens: list[str]) -> None:
    """The special tokens by name. CTranslate2 adds those that its vocabulary lacks, so all of them are named."""
    ids, tokenizer = source.architecture.tokens, source.tokenizer
    end = ids.eos[0] if ids.eos else None if tokenizer is None else tokenizer.eos_id
    if end is None and source.architecture.decoder is None:
        end = _first(None if tokenizer is None else tokenizer.sep_id, ids.pad, 0)
    if end is None:
        raise RequestError(
            "the model names no end token (tokens.eos), and CTranslate2 decodes until one; name it in the config"
        )
    start = _first(ids.bos, ids.decoder_start, ids.pad, end)
    unknown = _first(None if tokenizer is None else tokenizer.unk_id, ids.pad, end)
    config.unk_token = tokens[unknown]
    config.bos_token, config.eos_token = tokens[start], tokens[end]
    if source.architecture.encoder is not None and source.architecture.decoder is not None:
        config.decoder_start_token = None if ids.decoder_start is None else tokens[ids.decoder_start]


def _first(*ids: int | None) -> int:
    return next(number for number in ids if number is not None)


def check(source: Source, kind: Kind, place: Path) -> Checked:
    """Run the directory in CTranslate2 beside the model."""
    import ctranslate2

    runtime = f"CTranslate2 {ctranslate2.__version__}"
    model = reference(source.architecture, dict(source.tensors))
    rows = probe(source.architecture)
    # What a CPU computes in either of these is float32, which CTranslate2 would choose with a warning.
    compute = "float32" if kind.name in ("float16", "bfloat16") else "default"
    try:
        if source.architecture.decoder is None:
            wanted, found, what = _hidden_states(model, rows, place, compute)
        elif source.architecture.encoder is None:
            wanted, found, what = _logits(model, rows, place, compute)
        else:
            wanted, found, what = _greedy(model, rows, token_names(source), place, compute)
    except (RuntimeError, ValueError) as error:
        raise LatheError(f"CTranslate2 cannot run what was written: {error}") from error
    return Checked(runtime, what, compare(wanted, found))


_Outputs = tuple[list[Tensor], list[Tensor], str]


def _hidden_states(model: Transformer, rows: list[Tensor], place: Path, compute: str) -> _Outputs:
    import ctranslate2

    encoder = ctranslate2.Encoder(str(place), device="cpu", compute_type=compute)
    types = model.architecture.embedding.token_types
    numbers = [[at % types for at in range(len(row))] for row in rows] if types else None
    inputs = {} if numbers is None else {"token_type_ids": numbers}
    answer = encoder.forward_batch([row.tolist() for row in rows], **inputs)
    found_BTD = torch.from_numpy(_array(answer.last_hidden_state))
    wanted, found = [], []
    with torch.inference_mode():
        for number, row in enumerate(rows):
            told = {} if numbers is None else {"token_type_ids": torch.tensor([numbers[number]])}
            output = model(row[None], **told)
            wanted.append(output.last_hidden_state[0])
            found.append(found_BTD[number, : len(row)])
            if output.pooler_output is not None and answer.pooler_output is not None:
                wanted.append(output.pooler_output)
                found.append(torch.from_numpy(_array(answer.pooler_output))[number][None])
    return wanted, found, "hidden states" if answer.pooler_output is None else "hidden states and pooled states"


def _logits(model: Transformer, rows: list[Tensor], place: Path, compute: str) -> _Outputs:
    import ctranslate2

    generator = ctranslate2.Generator(str(place), device="cpu", compute_type=compute)
    stack = model.architecture.decoder
    assert stack is not None
    # Rows of different lengths in one batch, so that padding counts; with a window CTranslate2 cannot do that.
    batches = [rows] if stack.attention.window is None else [[row] for row in rows]
    found = []
    for batch in batches:
        found_BTV = torch.from_numpy(_array(generator.forward_batch([row.tolist() for row in batch])))
        found += [found_BTV[number, : len(row)] for number, row in enumerate(batch)]
    with torch.inference_mode():
        wanted = [model(row[None]).logits[0] for row in rows]
    return wanted, found, "logits"


def _greedy(model: Transformer, rows: list[Tensor], names: list[str], place: Path, compute: str) -> _Outputs:
    """The logits of the first tokens that are decoded greedily: each step reads the encoder and the steps before."""
    import ctranslate2

    translator = ctranslate2.Translator(str(place), device="cpu", compute_type=compute)
    texts = [[names[number] for number in row.tolist()] for row in rows]
    start = model.architecture.tokens.decoder_start
    prefix = None if start is not None else [[text[-1]] for text in texts]
    results = translator.translate_batch(
        texts,
        target_prefix=prefix,
        beam_size=1,
        max_decoding_length=max(map(len, rows)) // 2,
        min_decoding_length=0,  # else the first logits have no end token
        return_logits_vocab=True,
        return_scores=True,
        return_end_token=True,
    )
    ids = {name: number for number, name in enumerate(names)}
    wanted, found = [], []
    for row, result in zip(rows, results):
        begin = row[-1] if start is None else torch.tensor(start)
        told = [ids[token] for token in result.hypotheses[0]]
        logits = torch.stack([torch.from_numpy(_array(each)).reshape(-1) for each in result.logits[0]])
        steps = len(logits)
        with torch.inference_mode():
            read = torch.cat((begin[None], torch.tensor(told, dtype=torch.long)))[None, :steps]
            wanted.append(model(row[None], decoder_input_ids=read).logits[0])
        found.append(logits)
    return wanted, found, "logits of tokens that were decoded greedily"


def _array(view: Any) -> Any:
    import numpy as np

    return np.asarray(view).astype(np.float32)


FORMAT = Format(
    name="ctranslate2",
    program="CTranslate2",
    kinds=(
        Kind("float32", 32, 2e-3),
        Kind("float16", 16, 2e-2),
        Kind("bfloat16", 16, 0.1),
        Kind("int16", 16, 5e-2),
        Kind("int8", 8, 0.3),
    ),
    directory=True,
    suffix="",
    writer=(Package("ctranslate2", "ctranslate2"),),
    runtime=(Package("ctranslate2", "ctranslate2"),),
    objections=objections,
    write=write,
    check=check,
)
