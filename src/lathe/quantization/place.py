"""Quantised matrices in a model: put in place of linear layers and the token table, and read out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lathe.errors import RequestError
from lathe.model.codes import Codes
from lathe.model.embedding import TokenTable
from lathe.model.quantized import Quantized, QuantizedEmbedding, QuantizedLinear

_END = ".weight"


def install(model: nn.Module, codes: Mapping[str, Codes]) -> None:
    """Put matrices in codes in place of a model's own, in place and where those are; biases stay.

    Args:
        codes: by the names of the matrices that they replace, such as `decoder.attention.0.q.weight`.
    """
    for name, matrix in codes.items():
        path = name.removesuffix(_END)
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(path)
        made: Quantized
        if isinstance(module, TokenTable):
            made = QuantizedEmbedding(matrix)
        else:
            assert isinstance(module, nn.Linear)
            made = QuantizedLinear(matrix, module.bias)
        if module.weight.device.type != "meta":
            made.to(module.weight.device)
        setattr(model.get_submodule(parent), leaf, made.train(module.training))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]) -> None:
    """Give a model that stands on the meta device its weights, used as they are.

    Args:
        tensors: by the blueprint's names, all but those in codes.
        codes: the quantised matrices.
    """
    install(model, codes)
    held = {f"{name}.{key}": value for name, layer in quantized_layers(model) for key, value in layer.named_buffers()}
    model.load_state_dict({**tensors, **held}, assign=True)
    model.requires_grad_(True)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Every layer whose matrix is in codes, and its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantized))


def is_quantized(model: nn.Module) -> bool:
    """Whether any matrix of the model is in codes."""
    return next(quantized_layers(model), None) is not None


def codes_of(model: nn.Module) -> dict[str, Codes]:
    """The matrices in codes by the blueprint's names."""
    return {f"{name}{_END}": layer.matrix() for name, layer in quantized_layers(model)}


def refuse_quantized(model: nn.Module, to_do: str) -> None:
    """Raise `RequestError` for a model that is quantised already."""
    if is_quantized(model):
        raise RequestError(f"cannot {to_do}: the model is quantised already; give the model as it was before that")
