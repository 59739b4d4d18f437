"""The engine: whole passes of a model in one native call (`lathe.engine.engine`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lathe.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    # The build hook imports `lathe.engine.build` where there is no torch.
    if name != "Engine":
        raise AttributeError(f"module 'lathe.engine' has no attribute {name!r}")
    from lathe.engine.engine import Engine

    return Engine
