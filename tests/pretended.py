"""A device that is none: its tensors are computed on the CPU, and mixing them with the CPU's own is refused.

What a graphics card refuses is then seen without one. The device has a name of its own, so what is done on `cuda` alone
(16 bits by themselves, graphs) is not seen. Backward passes run on another thread there; torch gives up where they run
a layer again.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretended"
_PLACED = {"_to_copy", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
_PLACED |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
_made: list[Any] = []


def device() -> torch.device:
    """The device; it is made when it is first asked for. AttributeError where this torch has no way to make one."""
    if not _made:
        setup = backend_registration._setup_privateuseone_for_python_backend

        class Module(backend_registration._DummyBackendModule):
            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16]

        setup(NAME, backend_module=Module())
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", _empty, "PrivateUse1")
        library.impl("empty_strided", _empty_strided, "PrivateUse1")
        _made.append(library)  # what it registers ends with it
    return torch.device(f"{NAME}:0")


def _empty(size: Any, **how: Any) -> Tensor:
    return Pretended(torch.empty(size, dtype=how.get("dtype")))


def _empty_strided(size: Any, stride: Any, **how: Any) -> Tensor:
    return Pretended(torch.empty_strided(size, stride, dtype=how.get("dtype")))


class Pretended(Tensor):
    """A tensor on the device; `held` is what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        like: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: Any = Tensor._make_wrapper_subclass(cls, inner.size(), **like, dtype=inner.dtype, device=device())
        made.held = inner
        return cast(Pretended, made)

    def __init__(self, inner: Tensor) -> None:
        pass

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    @property
    def data(self) -> Any:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, Pretended) or (value.shape, value.dtype) != (self.shape, self.dtype):
            raise RuntimeError("data of another device, shape or type")
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        ours = [each for each in tensors if isinstance(each, Pretended)]
        if name == "copy_":  # from anywhere to anywhere
            _inner(args[0]).copy_(_inner(args[1]))
            return args[0]
        leaves = name in _PLACED and kwargs.get("device") is not None and not is_here(kwargs["device"])
        # Indices may be the CPU's, and so may single numbers.
        takes_any = name.startswith(("index", "_index_put_impl", "_unsafe_index")) and isinstance(args[0], Pretended)
        if name in _PLACED:
            kwargs = {**kwargs, **({"device": "cpu"} if kwargs.get("device") is not None else {})}
        elif ours and not takes_any and any(each.dim() for each in tensors if not isinstance(each, Pretended)):
            raise RuntimeError(f"two devices in {func}")
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if leaves:
            return found
        owners = {id(each.held): each for each in ours}  # what was changed in place stays the object that it was

        def outer(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return owners[id(each)] if id(each) in owners else Pretended(each)

        return tree_map(outer, found)


def _inner(each: Any) -> Any:
    return each.held if isinstance(each, Pretended) else each


def is_here(where: object) -> bool:
    """Whether a device, or its name, is this one."""
    return isinstance(where, str | torch.device) and str(where).startswith(NAME)


class _Lift(torch.autograd.Function):
    """To the device, and gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return _inner(outer[0])


class Pretence(TorchFunctionMode):
    """While it lasts, tensors can be made on the device and brought there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" and any(isinstance(each, Pretended) for each in args):
            return _attend(*args, **kwargs)
        if name == "to" and (is_here(kwargs.get("device")) or any(map(is_here, args[1:]))):
            dtypes = [each for each in (*args[1:], kwargs.get("dtype")) if isinstance(each, torch.dtype)]
            here = args[0] if isinstance(args[0], Pretended) else _Lift.apply(args[0])
            return here.to(dtypes[0]) if dtypes else here
        if name == "to" and any(isinstance(each, Pretended) for each in args[1:]):
            return args[0].to(NAME, args[1].dtype)
        if not is_here(kwargs.get("device")) or name == "_parse_to":
            return func(*args, **kwargs)
        if any(isinstance(each, Pretended) for each in tree_flatten(args)[0]):
            del kwargs["device"]
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        return tree_map(lambda each: Pretended(each) if isinstance(each, Tensor) else each, made)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *_: Any, **how: Any) -> Tensor:
    """What torch's own function computes in one, which knows its devices."""
    mask, scale = how.get("attn_mask", mask), how.get("scale")
    if how.get("enable_gqa"):
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if how.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().to(NAME)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v
