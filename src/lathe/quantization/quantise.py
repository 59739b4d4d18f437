"""A model's matrices in codes, chosen on text where there is some; and how far each layer's output is off then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lathe.adapt import folded_tensors
from lathe.model.codes import Codes
from lathe.model.transformer import Transformer
from lathe.quantization.gptq import gptq, output_error
from lathe.quantization.inputs import Batch, Moments, pass_text
from lathe.quantization.nearest import choose_grid, nearest
from lathe.quantization.place import fill, install, refuse_quantized
from lathe.quantization.settings import QuantizeSettings, Target, choose_targets
from lathe.reshape.calibrate import there


@dataclass(frozen=True)
class Chosen:
    """The matrices of a model in codes.

    Args:
        codes: by the blueprint's names.
        errors: how far each layer's output is off on the text, relative; its weights, where there is no text.
        settings: with every choice made.
    """

    codes: dict[str, Codes]
    errors: dict[str, float]
    settings: QuantizeSettings


def quantise(
    model: Transformer,
    settings: QuantizeSettings,
    batches: Sequence[Batch] = (),
    *,
    advance: Callable[[int, str], None] = lambda done, note: None,
) -> Chosen:
    """Codes of a model's matrices; the model itself is left as it is.

    Args:
        batches: calibration text, as keyword arguments of the model.
        advance: told of each matrix that is done, and its name.

    Raises:
        RequestError: a model that is quantised already, a layer to keep that is not there, or too little text.
    """
    refuse_quantized(model, "quantise it")
    settled = settings.settled(has_text=bool(batches))
    targets = choose_targets(model.architecture, settled)
    tensors = folded_tensors(model)
    done = Chosen({}, {}, settled)

    def choose(target: Target, moments_II: Tensor | None) -> None:
        weight_OI = tensors[target.name].to("cpu")
        made = _codes(weight_OI, target, settled.method, moments_II)
        done.codes[target.name] = replace(made, activations=target.activations)
        done.errors[target.layer] = output_error(weight_OI, made, moments_II)
        advance(1, target.layer)

    batches = there(batches, model.device)
    if not batches:
        for target in targets:
            choose(target, None)
        return done
    work = Transformer(model.architecture, device="meta")
    fill(work, tensors, {})
    by_layer = {target.layer: target for target in targets}
    tables = [target for target in targets if target.is_table]
    for target in tables:  # what all that follows reads
        choose(target, None)
    install(work, {target.name: done.codes[target.name] for target in tables})

    def given(moments: Moments) -> None:
        for layer, moments_II in moments.by_layer.items():
            choose(by_layer[layer], moments_II)
            install(work, {by_layer[layer].name: done.codes[by_layer[layer].name]})

    pass_text(work, batches, [target.layer for target in targets if not target.is_table], given)
    # In the model's own order, whatever the text passed first.
    return Chosen(
        {target.name: done.codes[target.name] for target in targets},
        {target.layer: done.errors[target.layer] for target in targets},
        settled,
    )


def _codes(weight_OI: Tensor, target: Target, method: str | None, moments_II: Tensor | None) -> Codes:
    loud_I = None if moments_II is None else moments_II.diagonal()
    grid = choose_grid(
        weight_OI, bits=target.bits, group_size=target.group_size, symmetric=target.symmetric, loud_I=loud_I
    )
    if method == "gptq" and moments_II is not None:
        return gptq(weight_OI, moments_II, grid)
    return nearest(weight_OI, grid)
