"""Compiles the native step when Lathe is installed, where there is a C++ compiler; without one it goes on."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeStepHook(BuildHookInterface[Any]):
    """Puts the library beside its sources, and so into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, an editable one included; a source distribution carries sources alone."""
        if self.target_name != "wheel":
            return
        # By its file: Lathe itself is not installed yet, and neither is what it imports.
        file = Path(self.root, "src", "lathe", "engine", "build.py")
        spec = importlib.util.spec_from_file_location("lathe_engine_build", file)
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        why = build.build_or_say_why()
        if why is not None:
            self.app.display_warning(f"native step not built: {why}")
            # The reason goes with the wheel, so that the engine can give it.
            build_data["artifacts"].append("src/lathe/engine/_step.txt")
            return
        build_data["artifacts"].append("src/lathe/engine/_step.so")
        # The library is called through ctypes: it fits every Python of this platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
