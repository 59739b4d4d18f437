"""GGUF: one file with a model's sizes, its tokenizer and its weights, which llama.cpp maps into memory and runs.

Matrices are stored in the type that is asked for; vectors, position tables and norms stay float32. `q8_0` and `q4_0`
store 32 neighbours of a row as whole numbers of 8 or 4 bits with one float16 scale (34 and 18 bytes for 32 weights); a
matrix whose rows are no multiple of 32 long is float16. With `q4_0` the token table and the head are `q8_0`: they
lose most by it, and llama.cpp's own tool gives the head more bits as well.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.blueprint import stored
from lathe.export.base import Checked, Format, Kind, Package, Source
from lathe.export.gguf_layouts import layout_of, notes, objections, placed, sizes
from lathe.export.gguf_vocabulary import Vocabulary, vocabulary, without

_BLOCK = 32  # weights that share a scale
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
# Looked up or added, not multiplied with: llama.cpp wants them as they are.
_KEPT = ("position_embd.", "token_types.", "rope_freqs.", "attn_rel_b.")
_TABLES = ("token_embd.weight", "output.weight")
_OUR_TABLES = ("embedding.tokens.weight", "head.language.output.weight")


def write(source: Source, kind: Kind, place: Path) -> list[str]:
    """Write the file."""
    import gguf

    layout = layout_of(source.architecture)
    assert layout is not None
    words = _vocabulary(source)
    writer = gguf.GGUFWriter(place, layout.name)
    writer.add_string("general.name", source.name)
    writer.add_uint32("general.file_type", _FILE_TYPES[kind.name])
    writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
    for key, value in sizes(source.architecture).items():
        _add(writer, f"{layout.name}.{key}", value)
    for key, value in words.keys.items():
        _add(writer, key, value)
    if source.architecture.decoder is None:
        _add(writer, "tokenizer.ggml.token_type_count", max(source.architecture.embedding.token_types, 1))
    short = False
    for name, tensor in placed(source.architecture, source.tensors):
        chosen = _type(name, tensor.shape, kind.name)
        short |= chosen == "f16" and kind.name.startswith("q")
        qtype = gguf.GGMLQuantizationType[chosen.upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), qtype), raw_dtype=qtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.errno is None:  # how numpy says that the disk took a part of an array
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error
        raise
    said = [*notes(source.architecture), *words.notes]
    if kind.name == "q4_0":
        said.append("the token table and the head are q8_0: they lose most by four bits")
    if short:
        said.append(f"matrices whose rows are no multiple of {_BLOCK} long are float16")
    return said


def _vocabulary(source: Source) -> Vocabulary:
    tokens = source.architecture.tokens
    rows = source.architecture.embedding.vocab_size
    if source.tokenizer is None:
        return without(rows)
    return vocabulary(source.tokenizer, rows, tokens.eos)


def _type(name: str, shape: Any, kind: str) -> str:
    """The type in which a tensor is stored."""
    if len(shape) < 2 or any(kept in name for kept in _KEPT):
        return "f32"
    if kind.startswith("q") and shape[-1] % _BLOCK:
        return "f16"
    return "q8_0" if kind == "q4_0" and name in _TABLES else kind


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with the GGUF type of its value: numbers are 32 bits wide, bytes an array of them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bytes | list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key} is {type(value).__name__}, for which GGUF has no type here")


def check(source: Source, kind: Kind, place: Path) -> Checked:
    """Run the file in llama.cpp beside the model."""
    from lathe.export.gguf_check import check as run

    return run(source, place, rounded(source, kind))


def rounded(source: Source, kind: Kind) -> dict[str, Tensor]:
    """The model's tensors as a file of that type holds them, as numbers again."""
    import gguf

    tensors = dict(source.tensors)
    for parameter in stored(source.architecture):
        is_table = parameter.name in _OUR_TABLES
        if parameter.role == "table" and not is_table:
            continue
        chosen = _type(_TABLES[0] if is_table else "", parameter.shape, kind.name)
        qtype = gguf.GGMLQuantizationType[chosen.upper()]
        codes = gguf.quants.quantize(tensors[parameter.name].numpy(), qtype)
        tensors[parameter.name] = torch.from_numpy(gguf.quants.dequantize(codes, qtype))
    return tensors


FORMAT = Format(
    name="gguf",
    program="llama.cpp",
    kinds=(Kind("f16", 16, 2e-2), Kind("f32", 32, 1e-2), Kind("q8_0", 8.5, 0.3), Kind("q4_0", 4.5, 0.3)),
    directory=False,
    suffix=".gguf",
    writer=(Package("gguf", "gguf"),),
    runtime=(Package("llama_cpp", "llama-cpp-python"),),
    objections=objections,
    write=write,
    check=check,
)
