"""Build hook: compile the native kernels into the wheel, or say why not and go on without them.

With a C++ compiler the wheel carries libdeltaw.so and the platform's tag; without one, or with one that fails, it is
pure Python and the reference ops run. CXX names the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "src/deltaw/ops/native"


class NativeHook(BuildHookInterface):
    """Runs deltaw/ops/native/build.py, which needs the standard library only."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile if the library is missing or stale; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        spec = importlib.util.spec_from_file_location("build_native", Path(self.root) / NATIVE / "build.py")
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            if not native.is_current():
                native.build(compiler=os.environ.get("CXX"))
        except (native.BuildFailed, OSError) as problem:
            native.LIBRARY.unlink(missing_ok=True)  # a stale one must not travel
            self.app.display_warning(f"deltaw: built without native kernels: {problem}")
            return
        if version == "standard":
            build_data["artifacts"].append(f"{NATIVE}/{native.LIBRARY.name}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
