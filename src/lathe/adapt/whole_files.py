"""Layers that an adapter has whole (a classifier that is new), in PEFT's files: its `modules_to_save`.

The file holds them under the stock model's own names (`base_model.model.classifier.weight`), and the config names
their modules. PEFT compares plain ends of names: `classifier` also says `pre_classifier`, and a module that holds
others says all of them. Lathe has linear layers whole and nothing else; an adapter with a whole embedding or norm is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lathe.adapt.adapters import copied, lora_layers, placed
from lathe.adapt.layer import Whole
from lathe.adapt.targets import linear_layers
from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.tensors import TensorSource
from lathe.errors import RequestError
from lathe.families import holder
from lathe.families.adapter import fuse, tied_names
from lathe.families.base import Entry
from lathe.model.quantized import QuantizedLinear
from lathe.model.transformer import Transformer


def stock_tensors(architecture: Architecture) -> list[Entry]:
    """Every tensor of the stock model; Lathe's own where no family can hold the architecture."""
    source = holder(architecture)
    if source is None:
        return [Entry(p.name, (p.name,)) for p in stored(architecture)]
    return list(source.entries(architecture))


def whole_tensors(model: Transformer, name: str) -> dict[str, Tensor]:
    """The tensors of the layers that the adapter of that name has whole, by their stock names."""
    found = {
        f"{path}.{leaf}": tensor.detach()
        for path, layer in lora_layers(model)
        if name in layer.adapters and isinstance(layer.adapter(name), Whole)
        for leaf, tensor in layer.adapter(name).named_parameters()
    }
    made: dict[str, Tensor] = {}
    for entry in stock_tensors(model.architecture):
        if any(ours in found for ours in entry.ours):
            # A stock module may hold layers of which others are the base's.
            parts = [found[ours] if ours in found else model.get_parameter(ours).detach() for ours in entry.ours]
            made[entry.theirs] = fuse(entry, parts)
    return made


def modules_to_save(architecture: Architecture, tensors: Iterable[str]) -> list[str]:
    """The shortest ends of names that say, to PEFT, the modules of these tensors and no other.

    A module that holds nothing else is named itself, not what is in it: PEFT wraps each module that is named, and a
    wrapped one inside a wrapped one does not load.
    """
    chosen = set(tensors)
    inside: dict[str, set[str]] = {}
    for entry in stock_tensors(architecture):
        for part in _parents(_module(entry.theirs)):
            inside.setdefault(part, set()).add(entry.theirs)
    whole = [module for module, held in inside.items() if held <= chosen]
    outermost = [module for module in whole if not any(part in whole for part in _parents(module)[:-1])]
    others = [module for module, held in inside.items() if not held & chosen]
    found = []
    for module in sorted(outermost):
        parts = module.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        found.append(next((end for end in ends if not any(other.endswith(end) for other in others)), module))
    return sorted(set(found))


def names_classifier(architecture: Architecture, saved: list[str]) -> bool:
    """Whether `saved` names a classifier as PEFT's own class for them does, which adds these names to every adapter."""
    modules = {part for entry in stock_tensors(architecture) for part in _parents(_module(entry.theirs))}
    theirs = [module for module in modules if module.endswith(("classifier", "score"))]
    return bool(saved) and all(any(module.endswith(each) for each in saved) for module in theirs)


def read_whole(
    model: Transformer, patterns: list[str], keys: Mapping[str, str], source: TensorSource
) -> dict[str, Whole]:
    """The whole layers of a file.

    Args:
        patterns: the config's `modules_to_save`.
        keys: stored names without PEFT's beginning -> stored names; those that are no adapter's A, B or lengths.

    Raises:
        RequestError: a tensor that belongs to no linear layer, has another shape, or is missing.
    """
    family = holder(model.architecture)
    prefix = "" if family is None else family.prefix
    layers = linear_layers(model.architecture)
    known = {entry.theirs.removeprefix(prefix): entry for entry in stock_tensors(model.architecture)}
    found: dict[str, Tensor] = {}
    for name, entry in known.items():
        if not says(patterns, _module(entry.theirs)):
            continue
        owners = [ours.rpartition(".")[0] for ours in entry.ours]
        if not all(owner in layers for owner in owners):
            raise RequestError(
                f"modules_to_save={patterns} names {_module(entry.theirs)!r}, which is no linear layer: Lathe has only "
                "linear layers whole; merge the adapter with peft instead"
            )
        stored_name = next((keys[each] for each in (name, prefix + name) if each in keys), None)
        if stored_name is None:
            raise RequestError(
                f"modules_to_save={patterns} names {_module(entry.theirs)!r} and the file holds no {entry.theirs!r}; "
                "is the file whole?"
            )
        found |= _parts(model, entry, stored_name, source)
    tables = [name for name in keys if name.removeprefix(prefix) in known]  # told first, where several are no adapter's
    for name in dict.fromkeys([*tables, *keys]):
        each = known.get(name.removeprefix(prefix))
        if each is None or not says(patterns, _module(each.theirs)):
            raise RequestError(
                f"the tensor {keys[name]!r} {why_not(model.architecture, _module(name).removeprefix(prefix))}"
            )
    return _whole(model, found)


def why_not(architecture: Architecture, module: str) -> str:
    """Why a module that a file adapts, or has whole, is none that Lathe does so here, and what to do."""
    family = holder(architecture)
    prefix, tied = ("", set()) if family is None else (family.prefix, tied_names(family, architecture))
    if tied & {f"{module}.weight", f"{prefix}{module}.weight"}:
        return (
            "belongs to an output matrix of its own, and this model's is its token table: an adapter on it, or one "
            "that has it whole, parts the two; merge the adapter with peft instead"
        )
    known = [each for each in stock_tensors(architecture) if _module(each.theirs).removeprefix(prefix) == module]
    layers = linear_layers(architecture)
    if any(ours.rpartition(".")[0] not in layers for each in known for ours in each.ours):
        return (
            f"belongs to {module}, which is no linear layer (peft's save_embedding_layers writes tables): Lathe has "
            "adapters on linear layers alone; merge the adapter with peft instead"
        )
    if known:
        return f"belongs to {module}, which modules_to_save does not name; is the config the adapter's own?"
    return "belongs to no linear layer of this model; expected a LoRA adapter that was made for it"


def _parts(model: Transformer, entry: Entry, stored_name: str, source: TensorSource) -> dict[str, Tensor]:
    """What a stock tensor holds, by our names."""
    for name in entry.ours:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
            raise RequestError(
                f"the adapter has {name} whole, which is quantised here; load the model as it was before"
            )
    ours = [model.get_parameter(name) for name in entry.ours]
    expected = fuse(entry, [each.detach().to("meta") for each in ours]).shape
    if source.shape(stored_name) != tuple(expected):
        raise RequestError(
            f"the tensor {stored_name!r} has shape {source.shape(stored_name)} and this model says "
            f"{tuple(expected)}; the two belong to different models"
        )
    tensor = source.tensor(stored_name)
    tensor = tensor.reshape(-1) if entry.row else tensor.t() if entry.transposed else tensor
    return dict(zip(entry.ours, tensor.split([each.shape[0] for each in ours]), strict=True))


def _whole(model: Transformer, found: Mapping[str, Tensor]) -> dict[str, Whole]:
    made: dict[str, Whole] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in found):
        linear = model.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        weight, bias = (found.get(f"{owner}.{leaf}") for leaf in ("weight", "bias"))
        # The config names modules, so a weight comes with its bias.
        assert weight is not None
        assert (bias is None) == (linear.bias is None)
        made[owner] = Whole(placed(linear, weight.contiguous().clone()), None if bias is None else copied(linear, bias))
    return made


def says(patterns: list[str], module: str) -> bool:
    """Whether PEFT would have that module whole, or one that it is in."""
    return any(part.endswith(pattern) for part in _parents(module) for pattern in patterns)


def _parents(module: str) -> list[str]:
    """The module's name and those of the modules that it is in."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
