"""Adapters: a trained model learns something new in a few small matrices, and its own stay as they are (LoRA)."""

from lathe.adapt.adapters import (
    active_adapter,
    adapter_names,
    add_lora,
    combine,
    folded_tensors,
    is_merged,
    merge,
    remove_adapters,
    set_active,
    unmerge,
)
from lathe.adapt.files import load_adapter, save_adapter
from lathe.adapt.layer import Adapter, LoraLinear, LoraQuantized, Whole
from lathe.adapt.settings import LoraSettings

__all__ = [
    "Adapter",
    "LoraLinear",
    "LoraQuantized",
    "LoraSettings",
    "Whole",
    "active_adapter",
    "adapter_names",
    "add_lora",
    "combine",
    "folded_tensors",
    "is_merged",
    "load_adapter",
    "merge",
    "remove_adapters",
    "save_adapter",
    "set_active",
    "unmerge",
]
