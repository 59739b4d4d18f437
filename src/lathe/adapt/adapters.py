"""Adapters on a model: put on, switched, mixed, merged and taken off.

`add_lora` replaces linear layers of the model by `LoraLinear`, in place, and freezes all else; training then
moves the active adapter alone. Names in `state_dict()` stay the blueprint's, with the adapters' tensors beside
them (`decoder.attention.0.q.adapters.default.down`), so a run with adapters resumes as any other.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lathe.adapt.layer import (
    Adapted,
    Adapter,
    LoraLinear,
    LoraQuantized,
    Whole,
    bias_of,
    device_of,
    dtype_of,
    weight_of,
)
from lathe.adapt.settings import LoraSettings
from lathe.adapt.targets import choose, stock_modules
from lathe.errors import RequestError
from lathe.model.quantized import Quantized, QuantizedLinear
from lathe.model.transformer import Transformer
from lathe.spec import unknown

# A linear layer as it is, or in codes.
Linear = nn.Linear | QuantizedLinear


def add_lora(
    model: Transformer, settings: LoraSettings | None = None, *, name: str = "default", seed: int = 0
) -> tuple[str, ...]:
    """Put a new adapter on `model`, in place, and make it the active one; what it computes does not change yet.

    All other parameters get `requires_grad=False`. A layer that is to be trained as well (a new classifier) is named
    in `settings.whole`.

    Args:
        settings: rank, alpha, targets and so on; `LoraSettings()` where left out.
        name: letters, digits, `_` and `-`.
        seed: of the drawn half.

    Returns:
        The names of the adapted layers.

    Raises:
        RequestError: targets or whole that match nothing, or the same layer; a rank larger than a layer; a name in
            use; a merged model.

    >>> import lathe
    >>> from lathe.adapt import LoraSettings, add_lora
    >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1)
    >>> add_lora(lathe.Model(tiny, seed=0), LoraSettings(rank=4, targets="reader:heads"))
    ('decoder.attention.0.q',)
    """
    settings = LoraSettings() if settings is None else settings
    _require_settings(settings)
    check_new_name(model, name)
    names = choose(model.architecture, settings.terms)
    whole = choose(model.architecture, settings.whole_terms, setting="whole")
    _require_apart(model, names, whole)
    for target in names:
        linear = _linear(model, target)
        least = min(linear.in_features, linear.out_features)
        if settings.rank > least:
            raise RequestError(
                f"rank={settings.rank} is larger than the layer {target}, whose smaller side is {least}: "
                f"expected {least} or less, or other targets"
            )
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Adapter | Whole] = {}
    for target in names:
        made[target] = _drawn(_linear(model, target), settings, generator)
    for target in whole:
        linear = _linear(model, target)
        bias_O = bias_of(linear)
        made[target] = Whole(copied(linear, weight_of(linear)), None if bias_O is None else copied(linear, bias_O))
    attach(model, name, made)
    return tuple(made)


def _require_apart(model: Transformer, names: list[str], whole: list[str]) -> None:
    """Refuse a layer that would be adapted and trained whole, and one that cannot be trained whole."""
    both = [target for target in names if target in whole]
    if both:
        raise RequestError(f"{both[0]} is among targets and among whole: expected each layer in one of them")
    for module in stock_modules(model.architecture):
        adapted, trained = ([each for each in module.ours if each in some] for some in (names, whole))
        if adapted and trained:
            raise RequestError(
                f"{adapted[0]} is among targets and {trained[0]} among whole, and both lie in one stock module "
                f"({module.theirs}), which an adapter's file holds in one way: expected both in one of them"
            )
    coded = [target for target in whole if isinstance(_linear(model, target), QuantizedLinear)]
    if coded:
        raise RequestError(
            f"whole: {coded[0]} is quantised here, and codes are not trained: give the model as it was before that, or "
            f"quantise it with --keep {coded[0]}"
        )


def _require_settings(given: object) -> None:
    if not isinstance(given, LoraSettings):
        kind = type(given).__name__
        raise RequestError(f"settings is a {kind}: expected LoraSettings; LoraSettings.from_dict makes them of a dict")


def _require_weights(given: object) -> None:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise RequestError(f"weights is a {kind}: expected names and weights, such as {{'a': 0.5, 'b': 0.5}}")
    for each, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise RequestError(f"the weight of {each!r} is {weight!r}: expected a number")


def _drawn(linear: Linear, settings: LoraSettings, generator: torch.Generator) -> Adapter:
    # A as the paper's code draws it: uniform within 1/√I.
    limit = 1 / math.sqrt(linear.in_features)
    down_RI = torch.empty(settings.rank, linear.in_features).uniform_(-limit, limit, generator=generator)
    magnitude_O: nn.Parameter | None = None
    if settings.dora:
        magnitude_O = placed(
            linear, torch.linalg.vector_norm(weight_of(linear).detach().to(adapter_dtype(linear)), dim=1)
        )
    return Adapter(
        placed(linear, down_RI),
        placed(linear, torch.zeros(linear.out_features, settings.rank)),
        scale=settings.scale,
        dropout=settings.dropout,
        rslora=settings.rslora,
        magnitude_O=magnitude_O,
    )


def adapter_dtype(linear: Linear) -> torch.dtype:
    """An adapter's type: float32 at least, because small updates vanish in half precision."""
    return torch.promote_types(dtype_of(linear), torch.float32)


def placed(linear: Linear, tensor: Tensor) -> nn.Parameter:
    """A tensor as an adapter's parameter, where the layer is and in an adapter's type."""
    return nn.Parameter(tensor.detach().to(device=device_of(linear), dtype=adapter_dtype(linear)))


def copied(linear: Linear, tensor: Tensor) -> nn.Parameter:
    """The same with memory of its own."""
    return placed(linear, tensor.detach().clone())


def attach(model: Transformer, name: str, adapters: Mapping[str, Adapter | Whole]) -> None:
    """Put adapters on the layers of these names, freeze all else and make them active."""
    for target, adapter in adapters.items():
        layer = _linear(model, target)
        if not isinstance(layer, Adapted):
            layer = LoraQuantized(layer) if isinstance(layer, QuantizedLinear) else LoraLinear.around(layer)
            _put(model, target, layer)
        layer.adapters[name] = adapter.train(layer.training)
    model.requires_grad_(False)
    set_active(model, name)


def _linear(model: Transformer, name: str) -> Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise RequestError(f"the layer {name} is a {type(module).__name__}: adapters go on linear layers")
    return module


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def check_new_name(model: Transformer, name: str) -> None:
    """Raise `RequestError` where no adapter of that name can be added now."""
    require_unmerged(model, f"add the adapter {name!r}")
    if not re.fullmatch("[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise RequestError(f"name={name!r}: expected letters, digits, _ and -, and no method of nn.ModuleDict")
    if name in adapter_names(model):
        raise RequestError(f"name={name!r}: the model has an adapter of that name; choose another or remove it first")


def require_unmerged(model: nn.Module, to_do: str) -> None:
    """Raise `RequestError` where an adapter is merged: the matrices are not the base's then."""
    if is_merged(model):
        raise RequestError(f"cannot {to_do}: an adapter is merged into the model; call unmerge first")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear | LoraQuantized]]:
    """Every adapted layer and its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear | LoraQuantized))


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's adapters, in the order in which layers hold them."""
    return tuple(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.adapters))


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that runs (or is merged), or None."""
    return next((layer.active for _, layer in lora_layers(model)), None)


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged into the model."""
    return any(layer.unmerged is not None for _, layer in lora_layers(model))


def known_adapter(model: nn.Module, name: str) -> str:
    """`name`, or the `RequestError` that lists the adapters there are."""
    names = adapter_names(model)
    if name not in names:
        none = "the model has no adapter; add one or load one first"
        raise RequestError(unknown("adapter", name, names) if names else f"unknown adapter {name!r}: {none}")
    return name


def set_active(model: nn.Module, name: str | None) -> None:
    """Run and train this adapter alone, or none: the base as it was.

    Raises:
        RequestError: no adapter of that name, or a merged model.
    """
    require_unmerged(model, "switch adapters")
    if name is not None:
        known_adapter(model, name)
    for _, layer in lora_layers(model):
        layer.active = name
    _train_active(model)


def _train_active(model: nn.Module) -> None:
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.adapters.requires_grad_(False)
    for layer in layers:
        if layer.running is not None:
            layer.running.requires_grad_(True)


def combine(model: Transformer, weights: Mapping[str, float], *, name: str) -> None:
    """A new adapter that adds up others, each times its weight, exactly; it becomes the active one.

    Its rank is the sum of theirs: the A's stand above each other, and the B's, scaled, side by side.

    Raises:
        RequestError: no weights, an unknown adapter, a name in use, or DoRA or whole layers, which do not add up.
    """
    check_new_name(model, name)
    if not weights:
        raise RequestError("no adapter to combine: give names and weights, such as {'a': 0.5, 'b': 0.5}")
    _require_weights(weights)
    for each in weights:
        known_adapter(model, each)
    made: dict[str, Adapter] = {}
    for target, layer in lora_layers(model):
        parts: list[tuple[Adapter, float]] = []
        for each, weight in weights.items():
            adapter = layer.adapter(each) if each in layer.adapters else None
            if isinstance(adapter, Whole):
                raise RequestError(
                    f"the adapter {each!r} trained {target} whole, which does not add up with another; "
                    "merge it into the base instead"
                )
            parts += [] if adapter is None else [(adapter, weight)]
        if any(adapter.magnitude is not None for adapter, _ in parts):
            raise RequestError(
                "a DoRA adapter among those to combine: it scales the base's rows, which does not add up; "
                "merge it into the base instead"
            )
        if parts:
            made[target] = _sum(parts)
    attach(model, name, made)


def _sum(parts: Iterable[tuple[Adapter, float]]) -> Adapter:
    parts = list(parts)
    down_RI = torch.cat([adapter.down.detach() for adapter, _ in parts])
    up_OR = torch.cat([adapter.up.detach() * (weight * adapter.scale) for adapter, weight in parts], dim=1)
    return Adapter(nn.Parameter(down_RI), nn.Parameter(up_OR), scale=1.0)


def merge(model: nn.Module) -> None:
    """Fold the active adapter into the weights: the model computes the same, at the base's speed.

    The base's matrices are kept beside the folded ones, for `unmerge`; `remove_adapters` lets go of them. Nothing
    is left to train while merged.

    Raises:
        RequestError: no active adapter, or one that is merged already.
    """
    require_unmerged(model, "merge")
    if active_adapter(model) is None:
        raise RequestError("no adapter is active, so there is nothing to merge; call set_active first")
    layers = [layer for _, layer in lora_layers(model)]
    for layer in sorted(layers, key=lambda each: isinstance(each, LoraLinear)):  # who refuses, before who does it
        layer.merge()
    _train_active(model)


def unmerge(model: nn.Module) -> None:
    """Put the base's matrices back, bit for bit; the adapter runs beside them again.

    Raises:
        RequestError: nothing is merged.
    """
    if not is_merged(model):
        raise RequestError("no adapter is merged, so there is nothing to unmerge")
    for _, layer in lora_layers(model):
        layer.unmerge()
    _train_active(model)


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Take off the adapter of that name, or all of them.

    Layers that are left without one become plain linear layers again. Without a name, a merged model keeps its
    merged weights, and every parameter is trained again.

    Raises:
        RequestError: no adapter of that name, or a merged model with a name given.
    """
    if name is not None:
        require_unmerged(model, f"remove {name!r}")
        known_adapter(model, name)
    for path, layer in list(lora_layers(model)):
        gone = list(layer.adapters) if name is None else [each for each in layer.adapters if each == name]
        for each in gone:
            del layer.adapters[each]
        if not layer.adapters:
            _put(model, path, layer.plain())
        elif layer.active == name:
            layer.active = None
    if not adapter_names(model):
        model.requires_grad_(True)


def folded_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors by the blueprint's names, detached; an active adapter is folded in, codes are made numbers.

    These are the weights of a plain model that computes what this one computes. The base's own are to be had
    with `set_active(model, None)`.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, held in model.named_modules():
        if isinstance(held, Quantized):
            coded = [f"{name}.{part}" for part, _ in held.named_buffers(recurse=False)]
            tensors = {key: tensor for key, tensor in tensors.items() if key not in coded}
            tensors[f"{name}.weight"] = held.dequantized()
    for name, layer in lora_layers(model):
        own = f"{name}.adapters."
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(own)}
        tensors[f"{name}.weight"] = layer.folded()
        bias_O = layer.folded_bias()
        if bias_O is not None:
            tensors[f"{name}.bias"] = bias_O
    return tensors
