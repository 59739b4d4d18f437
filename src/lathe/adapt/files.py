"""An adapter as PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, in both directions.

PEFT names tensors by the stock model's modules (`base_model.model.encoder.block.0.….q.lora_A.weight`). The
family's entries say which of our layers a stock module holds. One to one nothing is to be done; a transposed
module (GPT-2's Conv1D) is no case of its own, because PEFT keeps A as R × I and B as O × R there too.

A fused module (GPT-2's c_attn: q, k and v) has one A and a B of all outputs. Read, it becomes an adapter on each
layer with its rows of B, and all of them hold the same A, in training too. Written, layers that still have the
same A become one A and one B again. Where they do not, the block form says the same exactly: the A's stand
above each other, so the rank is the sum of theirs, and B is block diagonal. A layer without an adapter gets rows of
zeros, and under DoRA the lengths that its rows have.

Layers that the adapter has whole are `lathe.adapt.whole_files`' to read and write. A model that no family can hold
has no stock modules; its adapters are written under Lathe's own names.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lathe.adapt.adapters import attach, check_new_name, known_adapter, placed
from lathe.adapt.layer import Adapted, Adapter, Whole, weight_of
from lathe.adapt.notes import write_notes
from lathe.adapt.peft_config import CONFIG, PeftConfig, read_peft_config, shortest_names
from lathe.adapt.targets import StockModule, stock_modules
from lathe.adapt.whole_files import modules_to_save, names_classifier, read_whole, says, whole_tensors, why_not
from lathe.architecture import Architecture
from lathe.checkpoint.atomic import atomic_directory
from lathe.checkpoint.layout import Weights
from lathe.checkpoint.tensors import TensorSource
from lathe.errors import RequestError
from lathe.families import holder
from lathe.model.quantized import QuantizedLinear
from lathe.model.transformer import Transformer

log = logging.getLogger("lathe")

WEIGHTS = "adapter_model.safetensors"
_START = "base_model.model."
_A, _B, _M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_KEY = re.compile(rf"(?:{re.escape(_START)})?(?P<module>.+)\.(?P<part>{re.escape(_A)}|{re.escape(_B)}|{_M})")

_BASE = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_CODES = 0.25  # how far a matrix in codes may be from what it was, relatively; another matrix is 1 and more away


# --- writing -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Written:
    """One stock module's adapter as it goes to the file."""

    down_RI: Tensor
    up_OR: Tensor
    magnitude_O: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        return self.down_RI.shape[0]


def save_adapter(
    model: Transformer,
    directory: str | Path,
    *,
    name: str = "default",
    base_model: str | None = None,
    replace: bool = False,
) -> Path:
    """Write one adapter as the files that `peft` and `load_adapter` open, and Lathe's notes (`lathe.adapt.notes`).

    Args:
        directory: must not exist, unless `replace`.
        base_model: what to name as the base: a directory or a hub id.

    Raises:
        RequestError: no adapter of that name, or `directory` exists.
        LatheError: the disk is full; nothing is left behind.
    """
    known_adapter(model, name)
    modules = stock_modules(model.architecture)
    written = {each.theirs: found for each in modules if (found := _fused(model, each, name)) is not None}
    first = next(adapter for _, adapter in _adapters(model, modules, name))
    whole = whole_tensors(model, name)
    saved = modules_to_save(model.architecture, whole)
    config = dataclasses.replace(_config(written, first, modules), modules_to_save=saved)
    tensors = {f"{_START}{each}": tensor.cpu().clone() for each, tensor in whole.items()}
    for module, adapter in written.items():
        parts = ((_A, adapter.down_RI), (_B, adapter.up_OR), (_M, adapter.magnitude_O))
        tensors |= {f"{_START}{module}.{part}": t.cpu().clone() for part, t in parts if t is not None}
    task = _task(model.architecture, saved)
    text = config.to_dict(base_model_name_or_path=base_model, task_type=task)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_directory(directory, replace=replace, nbytes=nbytes) as folder:
        (folder / CONFIG).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_notes(folder, model.architecture)
    if holder(model.architecture) is None:
        log.warning(
            "wrote %s under Lathe's own names: no stock model has this architecture, so peft has no use for it",
            directory,
        )
    return Path(directory)


def _adapters(model: Transformer, modules: list[StockModule], name: str) -> Iterator[tuple[str, Adapter]]:
    for ours in (each for module in modules for each in module.ours):
        layer = model.get_submodule(ours)
        adapter = layer.adapter(name) if isinstance(layer, Adapted) and name in layer.adapters else None
        if isinstance(adapter, Adapter):
            yield ours, adapter


def _fused(model: Transformer, module: StockModule, name: str) -> _Written | None:
    """The adapter of one stock module, or None where none of its layers has one."""
    found = dict(_adapters(model, [module], name))
    if not found:
        return None
    parts = list(found.values())
    # One scale for all: where theirs differ, the difference goes into B.
    scale = parts[0].scale
    downs = [adapter.down.detach() for adapter in parts]
    shared = all(torch.equal(down, downs[0]) for down in downs[1:])
    rank = downs[0].shape[0] if shared else sum(adapter.rank for adapter in parts)
    rows, start = [], 0
    for ours in module.ours:
        row_OR = downs[0].new_zeros(_base_weight(model, ours).shape[0], rank)
        if ours in found:
            adapter = found[ours]
            up_OR = adapter.up.detach()
            row_OR[:, start : start + adapter.rank] = up_OR * (adapter.scale / scale)
            start += 0 if shared else adapter.rank
        rows.append(row_OR)
    magnitude_O: Tensor | None = None
    if parts[0].magnitude is not None:
        magnitude_O = torch.cat([_lengths(_base_weight(model, ours), found.get(ours)) for ours in module.ours])
    down_RI = downs[0] if shared else torch.cat(downs)
    return _Written(down_RI, torch.cat(rows), magnitude_O, scale)


def _lengths(weight_OI: Tensor, adapter: Adapter | None) -> Tensor:
    """The lengths that a layer's rows have under DoRA: trained ones, or those of the base."""
    if adapter is not None and adapter.magnitude is not None:
        return adapter.magnitude.detach()
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    lengths_O: Tensor = torch.linalg.vector_norm(weight_OI, dim=1, dtype=wide)
    return lengths_O


def _base_weight(model: Transformer, name: str) -> Tensor:
    layer = model.get_submodule(name)
    kept = layer.unmerged if isinstance(layer, Adapted) else None
    return weight_of(layer).detach() if kept is None else kept


def _config(written: dict[str, _Written], first: Adapter, modules: list[StockModule]) -> PeftConfig:
    def alpha(adapter: _Written) -> float:
        # Rounded where a float's last digit would spoil a number that somebody typed.
        exact = adapter.scale * (adapter.rank**0.5 if first.rslora else adapter.rank)
        return round(exact) if abs(exact - round(exact)) < 1e-9 * exact else exact

    usual_rank, usual_alpha = Counter((a.rank, alpha(a)) for a in written.values()).most_common(1)[0][0]
    return PeftConfig(
        r=usual_rank,
        lora_alpha=usual_alpha,
        target_modules=shortest_names(written, {each.theirs for each in modules} - set(written)),
        lora_dropout=first.dropout,
        use_rslora=first.rslora,
        use_dora=first.magnitude is not None,
        fan_in_fan_out=all(each.transposed for each in modules if each.theirs in written),
        rank_pattern={name: a.rank for name, a in written.items() if a.rank != usual_rank},
        alpha_pattern={name: alpha(a) for name, a in written.items() if alpha(a) != usual_alpha},
    )


def _task(architecture: Architecture, saved: list[str]) -> str | None:
    head = architecture.head
    if head.language is None and head.classifier is not None and head.pooler is not None:
        # PEFT's class for classifiers expects a trained head in the file; without one there is no task to name.
        return "SEQ_CLS" if head.pooler.token != "each" and names_classifier(architecture, saved) else None
    if architecture.head.language is None or architecture.decoder is None:
        return None
    return "CAUSAL_LM" if architecture.encoder is None else "SEQ_2_SEQ_LM"


# --- reading -------------------------------------------------------------------------------------------


def load_adapter(model: Transformer, directory: str | Path, *, name: str = "default") -> tuple[str, ...]:
    """Put an adapter that `peft` or `save_adapter` wrote on `model`, in place, and make it the active one.

    It can be trained further; all else gets `requires_grad=False`. Nothing is changed where the files do not fit.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The names of the adapted layers.

    Raises:
        RequestError: files missing or damaged, a setting that Lathe does not have, an adapter of another model
            (a tensor too many, too few or of another shape), a name in use, a merged model.
    """
    check_new_name(model, name)
    folder = Path(directory)
    config = read_peft_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise RequestError(f"{folder} holds no {WEIGHTS}: expected a directory that peft or save_adapter wrote")
    adapters: dict[str, Adapter | Whole] = {}
    with TensorSource(Weights((folder / WEIGHTS,), None, None, False)) as source:
        by_module, others = _by_module(model.architecture, config, source)
        for module, stored in by_module.items():
            adapters |= _split(model, module, config, stored, source)
        others = _without_base(model, others, source)
        adapters |= read_whole(model, config.modules_to_save or [], others, source)
    attach(model, name, adapters)
    return tuple(adapters)


def _by_module(
    architecture: Architecture, config: PeftConfig, source: TensorSource
) -> tuple[dict[StockModule, dict[str, str]], dict[str, str]]:
    """For each adapted module its stored names: of A, of B and of the lengths.

    The second are the other stored names, by what they are without PEFT's beginning: of layers that are there whole.
    """
    known, prefix = _known(architecture)
    found: dict[StockModule, dict[str, str]] = {}
    stored_as: dict[StockModule, str] = {}
    others: dict[str, str] = {}
    for key in source.names():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key.removeprefix(_START)] = key
            continue
        module = known.get(match["module"].removeprefix(prefix))
        if module is None:
            raise RequestError(f"the tensor {key!r} {why_not(architecture, match['module'].removeprefix(prefix))}")
        found.setdefault(module, {})[match["part"]] = key
        stored_as[module] = match["module"]
    needed = {_A, _B, _M} if config.use_dora else {_A, _B}
    for module, stored in found.items():
        for part in sorted(needed ^ stored.keys()):
            what = "is missing from the file" if part in needed else f"does not go with use_dora={config.use_dora}"
            raise RequestError(f"the tensor {stored_as[module]}.{part} {what}; is the file whole?")
    for module in known.values():
        if says(config.modules_to_save or [], module.theirs):
            continue
        if module not in found and config.target_modules != "all-linear" and config.targets(module.theirs):
            raise RequestError(
                f"the adapter holds nothing for {module.theirs!r}, which its config targets: "
                "expected an adapter that was made for this model (is it of another depth?)"
            )
    if not found:
        raise RequestError(f"{WEIGHTS} holds no tensor of an adapter; expected one that peft or save_adapter wrote")
    return found, others


def _known(architecture: Architecture) -> tuple[dict[str, StockModule], str]:
    """The stock modules by name, without the family's prefix, which files of a class with another head lack."""
    family = holder(architecture)
    prefix = "" if family is None else family.prefix
    return {each.theirs.removeprefix(prefix): each for each in stock_modules(architecture)}, prefix


def _without_base(model: Transformer, names: dict[str, str], source: TensorSource) -> dict[str, str]:
    """The stored names but for copies of the base's own matrix, which PEFT stores of a head that has an adapter.

    Raises:
        RequestError: a copy of another matrix than the base's.
    """
    known, prefix = _known(model.architecture)
    left: dict[str, str] = {}
    for name, key in names.items():
        match = _BASE.fullmatch(name)
        module = None if match is None else known.get(match["module"].removeprefix(prefix))
        if module is None:
            left[name] = key
            continue
        own_OI = torch.cat([_base_weight(model, ours) for ours in module.ours])
        stored = source.tensor(key)
        if not _is_copy(stored.t() if module.transposed else stored, own_OI, _is_quantised(model, module)):
            raise RequestError(
                f"the tensor {key!r} is the matrix that the adapter was trained on, and this model has another one: "
                "give the base that it was trained on"
            )
    return left


def _is_quantised(model: Transformer, module: StockModule) -> bool:
    return any(isinstance(model.get_submodule(ours), QuantizedLinear) for ours in module.ours)


def _is_copy(stored_OI: Tensor, own_OI: Tensor, quantised: bool) -> bool:
    """Whether two matrices are the same, in the type of the narrower one; one in codes is near to what it was."""
    if stored_OI.shape != own_OI.shape:
        return False
    if quantised:
        wide_OI = own_OI.float()
        return float((stored_OI.float() - wide_OI).norm()) <= _CODES * float(wide_OI.norm())
    return torch.equal(stored_OI.to(own_OI), own_OI) or torch.equal(own_OI.to(stored_OI), stored_OI)


def _split(
    model: Transformer, module: StockModule, config: PeftConfig, stored: dict[str, str], source: TensorSource
) -> dict[str, Adapter]:
    """An adapter for each of our layers that the module holds; all share one A."""
    layers = [model.get_submodule(ours) for ours in module.ours]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear | QuantizedLinear)]
    assert len(linears) == len(layers)
    match = _KEY.fullmatch(stored[_A])
    assert match is not None
    named = match["module"]  # in the model that PEFT had, whose class may have no prefix: patterns are for that name
    outputs, rank = [linear.out_features for linear in linears], config.rank(named)
    expected = {_A: (rank, linears[0].in_features), _B: (sum(outputs), rank), _M: (sum(outputs),)}
    for part, key in stored.items():
        if source.shape(key) != expected[part]:
            raise RequestError(
                f"the tensor {key!r} has shape {source.shape(key)} and this model with the adapter's config says "
                f"{expected[part]}; the two belong to different models"
            )
    down_RI = placed(linears[0], source.tensor(stored[_A]).clone())
    ups = source.tensor(stored[_B]).split(outputs)
    lengths = source.tensor(stored[_M]).split(outputs) if _M in stored else [None] * len(outputs)
    return {
        ours: Adapter(
            down_RI,
            placed(linear, up_OR.clone()),
            scale=config.scale(named),
            dropout=config.lora_dropout,
            rslora=config.use_rslora,
            magnitude_O=None if magnitude_O is None else placed(linear, magnitude_O.clone()),
        )
        for ours, linear, up_OR, magnitude_O in zip(module.ours, linears, ups, lengths)
    }


__all__ = ["load_adapter", "save_adapter", "stock_modules"]
