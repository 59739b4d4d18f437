"""ONNX: an encoder's graph, with any number of rows of any length, and the tokenizer's files beside it.

The graph is Lathe's own forward, traced by `torch.export`. So everything that an encoder can be here goes in: a
factorised embedding, shared layers (their weights are in the file once), heads of any width, any head. It stands in
`model.onnx`; weights past two gigabytes, which that file cannot hold, in `model.onnx.data`.

Inputs: `input_ids`, `attention_mask` and, where the model has them, `token_type_ids`, all int64, batch × length.
Outputs: `last_hidden_state`, and `pooler_output`, `logits` and `seq_relationship_logits` where there are any.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture
from lathe.errors import LatheError
from lathe.export.base import Checked, Format, Kind, Package, Source
from lathe.export.compare import compare, probe, reference
from lathe.model.transformer import Transformer

FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "seq_relationship_logits")
_ONE_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB


def objections(architecture: Architecture) -> list[str]:
    """Why an architecture is not exported to ONNX; nothing where it is."""
    if architecture.decoder is not None:
        kind = "decoder" if architecture.encoder is None else "decoder beside its encoder"
        return [f"it has a {kind}, which needs a cache from step to step; onnx is for encoders (gguf, ctranslate2)"]
    pooler = architecture.head.pooler
    if pooler is not None and pooler.token == "eos":
        return ["its pooler looks for the end token, and refuses a row without one, which a graph cannot"]
    return []


class _Named(nn.Module):
    """The model with its outputs as a tuple, in the order of `_OUTPUTS`, those that it has."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return tuple(_outputs(self.model(input_ids, attention_mask, token_type_ids)).values())


def _outputs(output: Any) -> dict[str, Tensor]:
    return {name: value for name in _OUTPUTS if (value := getattr(output, name)) is not None}


def write(source: Source, kind: Kind, place: Path) -> list[str]:
    """Write the graph and the tokenizer's files."""
    architecture = source.architecture
    model = reference(architecture, dict(source.tensors)).requires_grad_(False)
    rows = torch.stack([row[:2] for row in probe(architecture, (2, 2, 2))])
    example = {name: torch.ones_like(rows) for name in _inputs(architecture)} | {"input_ids": rows}
    example["token_type_ids"] = torch.zeros_like(rows)
    example = {name: example[name] for name in _inputs(architecture)}
    limit = next(architecture.stacks)[1].positions.limit
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=limit)}
    with torch.inference_mode():
        names = list(_outputs(model(**example)))
    with _quietly():
        torch.onnx.export(
            _Named(model),
            kwargs=example,
            f=place / FILE,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dict.fromkeys(example, shape),
            input_names=list(example),
            output_names=names,
            external_data=sum(tensor.nbytes for tensor in source.tensors.values()) > _ONE_FILE,
        )
    if source.tokenizer is None:
        return ["the model has no tokenizer: give the graph ids"]
    source.tokenizer.save(place)
    return []


def _inputs(architecture: Architecture) -> list[str]:
    return [name for name in INPUTS if name != "token_type_ids" or architecture.embedding.token_types]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks on its own parts; what goes wrong is raised, and the graph is run afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def check(source: Source, kind: Kind, place: Path) -> Checked:
    """Run the graph in ONNX Runtime beside the model: a padded batch, and rows alone, one of them a single token."""
    import onnxruntime

    model = reference(source.architecture, dict(source.tensors))
    rows = probe(source.architecture)
    batches = [rows, [rows[0]], [rows[1][:1]]]
    wanted: list[Tensor] = []
    found: list[Tensor] = []
    try:
        session = onnxruntime.InferenceSession(str(place / FILE), providers=["CPUExecutionProvider"])
        for batch in batches:
            told = _padded(batch, source.architecture)
            with torch.inference_mode():
                ours = _outputs(model(**told))
            theirs = session.run(list(ours), {name: tensor.numpy() for name, tensor in told.items()})
            for (name, one), other in zip(ours.items(), theirs):
                one, other = (_places(each, told["attention_mask"]) for each in (one, torch.from_numpy(other)))
                if name in ("logits", "seq_relationship_logits") or "logits" not in ours:
                    wanted.append(one)
                    found.append(other)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        raise LatheError(f"ONNX Runtime cannot run what was written: {error}") from error
    what = "logits" if source.architecture.head.language or source.architecture.head.classifier else "hidden states"
    return Checked(f"ONNX Runtime {onnxruntime.__version__}", what, compare(*_widened(wanted, found)))


def _padded(rows: list[Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A batch, padded on the right; token types alternate, so that their table counts."""
    pad = architecture.tokens.pad or 0
    lengths = torch.tensor([len(row) for row in rows])
    places_T = torch.arange(int(lengths.max()))
    mask_BT = (places_T < lengths[:, None]).long()
    told = {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad),
        "attention_mask": mask_BT,
    }
    if architecture.embedding.token_types:
        told["token_type_ids"] = (places_T % architecture.embedding.token_types).expand_as(mask_BT).contiguous()
    return told


def _places(output: Tensor, mask_BT: Tensor) -> Tensor:
    """An output as places × numbers, without what stands at pads."""
    if output.shape[: mask_BT.ndim] == mask_BT.shape and output.ndim >= mask_BT.ndim:
        output = output[mask_BT.bool()]
    return output if output.ndim == 2 else output[:, None]


def _widened(wanted: list[Tensor], found: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of different widths (a token head's beside a sentence head's) in one table, the widest's."""
    width = max(each.shape[-1] for each in wanted)

    def padded(rows: list[Tensor]) -> list[Tensor]:
        return [nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows]

    return padded(wanted), padded(found)


FORMAT = Format(
    name="onnx",
    program="ONNX Runtime",
    kinds=(Kind("float32", 32, 1e-3),),
    directory=True,
    suffix="",
    writer=(Package("onnx", "onnx"), Package("onnxscript", "onnxscript")),
    runtime=(Package("onnxruntime", "onnxruntime"),),
    objections=objections,
    write=write,
    check=check,
)
