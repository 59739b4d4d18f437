"""Quantised matrices in a checkpoint: the layout of `compressed-tensors`, in both directions.

The config says under `quantization_config` which modules are quantised and how (`Scheme`), in groups of modules that
are quantised alike. The file holds a few tensors in place of a module's `weight`:

    int-quantized     weight (int8), weight_scale, weight_zero_point (int8)
    pack-quantized    weight_packed (int32), weight_scale, weight_zero_point (int32, packed along the outputs),
                      weight_shape

`weight_zero_point` is there only where codes are asymmetric. Scales are O × 1, or O × G for groups, in the model's
type. `transformers` opens such a directory when `compressed-tensors` is installed, and vLLM does.

A token table that serves as the output matrix too is stored once. `transformers` gives both modules the same int8
`weight`, but wants a `weight_scale` for each, so the scales are written under every name that the table has. It shares
no packed weights, and opens no packed codes with zero points (compressed-tensors 0.20 makes room for them unpacked).

`CompressedSource` shows a file as if its matrices were still there: whoever maps names and checks shapes need not know.

Shape suffixes: O outputs, I inputs, G groups in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lathe.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from lathe.model.codes import Codes

KEY = "quantization_config"
METHOD = "compressed-tensors"
INT, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"

_WEIGHT, _PACKED, _SCALE = "weight", "weight_packed", "weight_scale"
_ZERO, _SHAPE = "weight_zero_point", "weight_shape"
_PARTS = (_WEIGHT, _PACKED, _SCALE, _ZERO, _SHAPE)
_ONLY = (_PACKED, _SCALE, _ZERO, _SHAPE)  # what no other module has


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised.

    Args:
        bits: 8 or 4.
        group_size: weights of a row that share a scale; 0 where all do.
        symmetric: whether codes have no zero point.
        activations: `none`, or `int8` where inputs are rounded too, each token to its own scale.
        format: `int-quantized` or `pack-quantized`.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    activations: str = "none"
    format: str = PACKED

    def to_config(self, targets: Iterable[str]) -> dict[str, Any]:
        """One of `config_groups`."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group_size else "channel",
            "dynamic": False,
        }
        if self.group_size:
            weights["group_size"] = self.group_size
        group: dict[str, Any] = {"targets": list(targets), "weights": weights, "format": self.format}
        if self.activations == "int8":
            group["input_activations"] = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            }
        return group


def to_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of modules and their schemes."""
    alike: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        alike.setdefault(scheme, []).append(module)
    formats = {scheme.format for scheme in alike}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": scheme.to_config(modules) for number, (scheme, modules) in enumerate(alike.items())
        },
        "ignore": [],
    }


# --- reading the config ---------------------------------------------------------------------------------


class Schemes:
    """Which scheme each module has, from a `quantization_config`.

    Raises:
        RequestError: another method, or a scheme that Lathe does not have.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        method = config.get("quant_method")
        if method != METHOD:
            raise RequestError(
                f"the model is quantised with {method}: Lathe reads {METHOD}; give the model unquantised"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise RequestError(f"{KEY} has no config_groups: expected a model that {METHOD} or Lathe wrote")
        if config.get("kv_cache_scheme"):
            raise RequestError(
                f"{KEY} quantises the cache of keys and values, which Lathe does not; set kv_cache_scheme"
            )
        general = config.get("format")
        self._groups = [
            ([str(target) for target in group.get("targets", ())], _scheme(group, general)) for group in groups.values()
        ]

    def of(self, module: str) -> Scheme | None:
        """The scheme of a module by its name in the file; None where no group targets it."""
        return next((scheme for targets, scheme in self._groups if _targeted(module, targets)), None)


def _targeted(module: str, targets: list[str]) -> bool:
    for target in targets:
        if target.startswith("re:"):
            if re.match(target[3:], module):
                return True
        # A class name stands for every module of that class; which ones were quantised, the file shows.
        elif target in (module, "Linear", "Embedding"):
            return True
    return False


def _scheme(group: Mapping[str, Any], general: Any) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    form = group.get("format") or general
    bits, strategy = weights.get("num_bits", 0), weights.get("strategy")
    allowed = {
        "format": (form, (INT, PACKED)),
        "weights.type": (weights.get("type", "int"), ("int",)),
        "weights.num_bits": (bits, (4, 8)),
        "weights.strategy": (strategy, ("channel", "group")),
        "weights.dynamic": (weights.get("dynamic", False), (False,)),
        "output_activations": (group.get("output_activations"), (None,)),
    }
    if inputs is not None:
        allowed |= {
            "input_activations.num_bits": (inputs.get("num_bits"), (8,)),
            "input_activations.type": (inputs.get("type", "int"), ("int",)),
            "input_activations.strategy": (inputs.get("strategy"), ("token",)),
            "input_activations.dynamic": (inputs.get("dynamic"), (True,)),
            "input_activations.symmetric": (inputs.get("symmetric", True), (True,)),
            "weights.strategy": (strategy, ("channel",)),
            "weights.symmetric": (weights.get("symmetric", True), (True,)),
            "weights.num_bits": (bits, (8,)),
        }
    for name, (found, wanted) in allowed.items():
        if found not in wanted:
            listed = " or ".join(str(value) for value in wanted)
            raise RequestError(f"{name}={found!r} in the config's {KEY}: Lathe reads {listed}")
    size = weights.get("group_size") if strategy == "group" else 0
    if type(size) is not int or size < 0:
        raise RequestError(f"weights.group_size={size!r} in the config's {KEY}: expected a whole number")
    return Scheme(
        int(bits), size, bool(weights.get("symmetric", True)), "none" if inputs is None else "int8", str(form)
    )


# --- a file -----------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where stored tensors are read from, one at a time."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


class CompressedSource:
    """A file with quantised matrices, as if they were still there: `X.weight` has its shape and, read, its numbers.

    Raises:
        RequestError: tensors that do not go together, or with the config.
    """

    def __init__(self, source: Source, config: Mapping[str, Any]) -> None:
        self._source = source
        self._schemes = Schemes(config)
        stored = list(source.names())
        self._stored = frozenset(stored)
        scaled = [name.removesuffix(f".{_SCALE}") for name in stored if name.endswith(f".{_SCALE}")]
        self._modules = {name: self._scheme_of(name) for name in scaled if self._code_name(name) is not None}
        # Second names of a table that is stored once: they have scales alone.
        self.again = {name: self._scheme_of(name) for name in scaled if name not in self._modules}
        for name in stored:
            module, _, part = name.rpartition(".")
            if part in _ONLY and module not in self._modules and module not in self.again:
                raise RequestError(f"the tensor {name!r} has no {module}.{_SCALE} beside it; is the file whole?")

    def _scheme_of(self, module: str) -> Scheme:
        scheme = self._schemes.of(module)
        if scheme is None:
            raise RequestError(f"the file holds scales of {module!r}, which the config's {KEY} does not name")
        return scheme

    def _code_name(self, module: str) -> str | None:
        return next((f"{module}.{part}" for part in (_PACKED, _WEIGHT) if f"{module}.{part}" in self._stored), None)

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a tensor, `X.weight`; None where it is stored as it is."""
        return self._modules.get(name.removesuffix(f".{_WEIGHT}")) if name.endswith(f".{_WEIGHT}") else None

    def names(self) -> Iterator[str]:
        """Every tensor's name, a quantised matrix under the name that it had before."""
        for name in self._source.names():
            module, _, part = name.rpartition(".")
            if module in self._modules and part in _PARTS:
                if part == _SCALE:
                    yield f"{module}.{_WEIGHT}"
            elif module not in self.again or part not in _PARTS:
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a quantised one, that of the matrix."""
        if self.scheme(name) is None:
            return self._source.shape(name)
        module = name.removesuffix(f".{_WEIGHT}")
        if f"{module}.{_PACKED}" not in self._stored:
            return self._source.shape(name)
        if f"{module}.{_SHAPE}" not in self._stored:
            raise RequestError(f"the tensor {module}.{_SHAPE} is missing from the file; is it whole?")
        rows, columns = (int(size) for size in self._source.tensor(f"{module}.{_SHAPE}").tolist())
        return rows, columns

    def tensor(self, name: str) -> Tensor:
        """A tensor; of a quantised one, the matrix that its codes stand for."""
        codes = self.codes(name)
        return self._source.tensor(name) if codes is None else codes.dequantized()

    def codes(self, name: str) -> Codes | None:
        """A quantised matrix's codes, `X.weight`; None where it is stored as it is."""
        from lathe.model.codes import Codes, unpack

        scheme = self.scheme(name)
        if scheme is None:
            return None
        module = name.removesuffix(f".{_WEIGHT}")
        (rows, columns), bits = self.shape(name), scheme.bits
        packed = f"{module}.{_PACKED}" in self._stored
        codes_OI = self._source.tensor(f"{module}.{_PACKED}" if packed else name)
        if packed:
            codes_OI = unpack(self._whole(module, _PACKED, codes_OI, (rows, -(-columns * bits // 32))), columns, bits)
        if scheme.group_size and columns % scheme.group_size:
            raise RequestError(
                f"{module} has rows of {columns}, which groups of {scheme.group_size} do not fill; is it whole?"
            )
        groups = columns // scheme.group_size if scheme.group_size else 1
        scales_OG = self._source.tensor(f"{module}.{_SCALE}")
        self._whole(module, _SCALE, scales_OG, (rows, groups))
        zeros_OG: Tensor | None = None
        if not scheme.symmetric:
            if f"{module}.{_ZERO}" not in self._stored:
                raise RequestError(
                    f"the tensor {module}.{_ZERO} is missing from the file, and its codes are asymmetric"
                )
            zeros_OG = self._source.tensor(f"{module}.{_ZERO}")
            if packed:  # along the outputs
                self._whole(module, _ZERO, zeros_OG, (-(-rows * bits // 32), groups))
                zeros_OG = unpack(zeros_OG.t(), rows, bits).t().contiguous()
            self._whole(module, _ZERO, zeros_OG, (rows, groups))
        return Codes(codes_OI, scales_OG, zeros_OG, bits, scheme.activations)

    def _whole(self, module: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise RequestError(
                f"the tensor {module}.{part} has shape {tuple(tensor.shape)} and the config's {KEY} says {shape}; "
                "the two belong to different models"
            )
        return tensor


def to_tensors(module: str, codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that hold one quantised matrix, under the names of `module`."""
    import torch

    from lathe.model.codes import pack

    out = {f"{module}.{_SCALE}": codes.scales_OG}
    zeros_OG = codes.zeros_OG
    if scheme.format == INT:
        out[f"{module}.{_WEIGHT}"] = codes.codes_OI
    else:
        out[f"{module}.{_PACKED}"] = pack(codes.codes_OI, codes.bits)
        out[f"{module}.{_SHAPE}"] = torch.tensor(codes.codes_OI.shape)
        zeros_OG = None if zeros_OG is None else pack(zeros_OG.t(), codes.bits).t().contiguous()
    if zeros_OG is not None:
        out[f"{module}.{_ZERO}"] = zeros_OG
    return out


def scales_again(module: str, codes: Codes) -> dict[str, Tensor]:
    """The scales of a table under another of its names."""
    return {f"{module}.{_SCALE}": codes.scales_OG.clone()}
