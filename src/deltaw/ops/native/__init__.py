"""Compiled kernels behind the operations: optional at run time, one shared library, every instruction set in it.

`path()` says which set runs, `paths()` which ones this machine can run, `forced(name)` picks one for tests and
benches. docs/native.md describes the layout; docs/adr/0007-native-layer.md says why it is so.
"""

from deltaw.ops.native.library import SlowPath, available, forced, path, paths

__all__ = ["SlowPath", "available", "forced", "path", "paths"]
