"""Lathe cuts transformer language models to size: before, during and after training, Hugging Face in and out.

Names are imported when they are first used, so that planning never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lathe._version import __version__

if TYPE_CHECKING:
    from lathe.api.loading import load
    from lathe.api.model import Model
    from lathe.api.quantizing import quantize
    from lathe.api.resizing import heal, plan_budget, resize
    from lathe.architecture import Architecture
    from lathe.errors import LatheError, RequestError
    from lathe.generate.encode import classify, encode
    from lathe.planner import plan
    from lathe.presets import preset
    from lathe.reshape.vocabulary import Vocabulary
    from lathe.text.tokenizer import Tokenizer

# Public name -> the module that defines it.
_HOMES = {
    "Architecture": "lathe.architecture",
    "LatheError": "lathe.errors",
    "Model": "lathe.api.model",
    "RequestError": "lathe.errors",
    "Tokenizer": "lathe.text.tokenizer",
    "Vocabulary": "lathe.reshape.vocabulary",
    "classify": "lathe.generate.encode",
    "encode": "lathe.generate.encode",
    "heal": "lathe.api.resizing",
    "load": "lathe.api.loading",
    "plan": "lathe.planner",
    "plan_budget": "lathe.api.resizing",
    "preset": "lathe.presets",
    "quantize": "lathe.api.quantizing",
    "resize": "lathe.api.resizing",
}

__all__ = [
    "Architecture",
    "LatheError",
    "Model",
    "RequestError",
    "Tokenizer",
    "Vocabulary",
    "__version__",
    "classify",
    "encode",
    "heal",
    "load",
    "plan",
    "plan_budget",
    "preset",
    "quantize",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lathe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
