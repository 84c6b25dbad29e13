"""Compile the C++ sources of this folder into one shared library beside them. Standard library only.

The build hook (hatch_build.py) runs it when deltaw is installed; by hand: `python -m deltaw.ops.native.build [CXX]`.
Each instruction set is a unit with its own flags, and which one runs is decided when it is loaded (dispatch.cpp). A
flag that the compiler does not know, or another architecture, costs that path and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libdeltaw.so"

_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
UNITS = {
    "dispatch": (),
    "pool": (),
    "path_scalar": (),
    "path_avx2": _AVX2,
    "path_avx512": _AVX512,
    "path_avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "path_amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
"""Source files and the instruction sets that each is compiled for, on x86-64."""


class BuildFailed(RuntimeError):
    """There is no C++ compiler, or it did not compile the sources; the message says which."""


def sources_hash() -> str:
    """What the library is made from, as 16 hex digits: the sources and this file."""
    found = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), HERE / "build.py"]):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def is_current(library: Path = LIBRARY) -> bool:
    """Whether `library` is there and made from the sources as they are now."""
    return library.is_file() and b"deltaw-sources:" + sources_hash().encode() in library.read_bytes()


def find_compiler(wanted: str | None = None) -> str:
    """The path of a C++ compiler: `wanted`, or the first of c++, g++ and clang++. Raises BuildFailed."""
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildFailed(f"no C++ compiler: none of {', '.join(names)} is on the PATH")
    return found


def build(library: Path = LIBRARY, compiler: str | None = None, extra: tuple[str, ...] = ()) -> Path:
    """Compile and link `library`, whole or not at all; seconds. `extra`: more flags. Raises BuildFailed."""
    if sys.platform == "win32":
        raise BuildFailed("not written for Windows")
    cxx = find_compiler(compiler)
    with tempfile.TemporaryDirectory() as made:
        with ThreadPoolExecutor(2) as pool:
            units = list(pool.map(lambda name: _compile(cxx, name, Path(made), extra), UNITS))
        linked = Path(made) / library.name
        _run([cxx, "-shared", "-o", str(linked), *map(str, units)])
        beside = library.with_name(library.name + ".new")
        shutil.copyfile(linked, beside)
        beside.replace(library)
    return library


def _compile(cxx: str, name: str, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    out = folder / f"{name}.o"
    own = UNITS[name] if platform.machine().lower() in ("x86_64", "amd64") else ()
    sources = f'-DDELTAW_SOURCES="{sources_hash()}"'
    command = [cxx, *_COMMON, *extra, sources, "-c", str(HERE / f"{name}.cpp"), "-o", str(out)]
    try:
        _run([*command, *own])
    except BuildFailed:
        if not own or _knows(cxx, own):
            raise
        _run(command)  # without its flags the file says that it has no such path
    return out


def _knows(cxx: str, flags: tuple[str, ...]) -> bool:
    """Whether a compiler takes `flags`: a unit that fails all the same is wrong."""
    try:
        _run([cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildFailed:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as problem:
        raise BuildFailed(f"{command[0]} cannot be run: {problem}") from problem
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no word"]
        )
        raise BuildFailed(f"{command[0]} failed: {lines[0]}")


if __name__ == "__main__":
    try:
        print(build(compiler=sys.argv[1] if len(sys.argv) > 1 else None))
    except BuildFailed as problem:
        sys.exit(f"not built: {problem}")
