"""The compiled library: built, checked, loaded and chosen; and everything that may be missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from made_blocks import LEVELS, blocks_of, made

from deltaw.errors import BadInput, ShapeError
from deltaw.ops import native
from deltaw.ops.blockwise import dequantise, mul, quantise
from deltaw.ops.native import build, calls, library

ROOT = Path(__file__).resolve().parents[2]
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture
def hook(monkeypatch, tmp_path):
    """The build hook on a copy of the sources, with stand-ins for hatchling: (hook, what it said, the library)."""
    folder = tmp_path / "src" / "deltaw" / "ops" / "native"
    shutil.copytree(build.HERE, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    module = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    module.BuildHookInterface = object
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    made_hook = loaded.NativeHook()
    said: list[str] = []
    made_hook.target_name, made_hook.root = "wheel", str(tmp_path)
    made_hook.app = types.SimpleNamespace(display_warning=said.append)
    return made_hook, said, folder / build.LIBRARY.name


# Build ----------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_install_goes_on_and_says_so_in_one_line(hook, monkeypatch):
    made_hook, said, made_library = hook
    made_library.write_bytes(b"made from other sources")
    monkeypatch.setenv("CXX", "no-such-compiler")
    data = {"artifacts": []}
    made_hook.initialize("standard", data)
    assert data == {"artifacts": []}, "a pure wheel"
    assert not made_library.exists(), "a stale library must not travel"
    assert len(said) == 1
    assert "no-such-compiler" in said[0]
    assert "\n" not in said[0]


def test_with_an_empty_path_the_install_goes_on(hook, monkeypatch):
    made_hook, said, _ = hook
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    made_hook.initialize("editable", {"artifacts": []})
    assert said == ["deltaw: built without native kernels: no C++ compiler: none of c++, g++, clang++ is on the PATH"]


def test_a_compiler_that_fails_is_named_with_its_first_error(hook, monkeypatch):
    made_hook, said, _ = hook
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    made_hook.initialize("standard", {"artifacts": []})
    assert "false failed: no word" in said[0]


@pytest.fixture
def hasty_compiler(monkeypatch, tmp_path):
    """A `c++` that optimises nothing: seconds instead of half a minute for a library whose products nobody asks for."""
    real = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if real is not None:
        hasty = tmp_path / "hasty" / "c++"
        hasty.parent.mkdir()
        hasty.write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
        hasty.chmod(0o755)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", f"{hasty.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_unit_that_is_wrong_is_not_left_out(monkeypatch, tmp_path):
    """Only a compiler that does not know a unit's flags goes on without its path."""
    if not HAS_COMPILER:
        return
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "build.py").touch()
    cxx, unit = build.find_compiler(None), tmp_path / "path_avx2.cpp"
    unit.write_text("#error broken here\n")
    with pytest.raises(build.BuildFailed, match="broken here"):
        build._compile(cxx, "path_avx2", tmp_path)
    unit.write_text("int one() { return 1; }\n")
    monkeypatch.setitem(build.UNITS, "path_avx2", ("-mno-such-set",))
    assert build._compile(cxx, "path_avx2", tmp_path).stat().st_size > 0


@pytest.mark.usefixtures("hasty_compiler")
def test_a_wheel_with_kernels_is_for_this_platform(hook):
    made_hook, said, made_library = hook
    data = {"artifacts": []}
    made_hook.initialize("standard", data)
    if not HAS_COMPILER:
        assert len(said) == 1
        return
    assert said == []
    assert data["artifacts"] == [f"src/deltaw/ops/native/{made_library.name}"]
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-")
    opened, problem = library.open_library(made_library)
    assert opened is not None, problem
    before = made_library.stat().st_mtime_ns
    made_hook.initialize("standard", {"artifacts": []})
    assert made_library.stat().st_mtime_ns == before, "nothing changed, nothing is built"


def test_no_symbol_but_the_interface_is_shared():
    """Units compiled for different CPUs share no inline function that the linker could take from the wrong one."""
    if not native.available() or not shutil.which("nm"):
        assert library.loaded() is None or not shutil.which("nm")
        return
    done = subprocess.run(["nm", "-D", "--defined-only", build.LIBRARY], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert {n for n in names if not n.startswith("deltaw_")} <= {"_init", "_fini"}
    assert "deltaw_product" in names


# Load -----------------------------------------------------------------------------------------------------------------


def test_a_library_of_other_sources_is_refused(tmp_path):
    if not native.available():
        assert native.paths() == ("reference",)
        return
    stale = tmp_path / "stale.so"
    own = build.sources_hash().encode()
    stale.write_bytes(build.LIBRARY.read_bytes().replace(own, own[::-1]))
    opened, problem = library.open_library(stale)
    assert opened is None
    assert "made from other sources" in problem
    assert "pip install" in problem
    assert not build.is_current(stale)


def test_a_missing_or_broken_library_is_refused(tmp_path):
    opened, problem = library.open_library(tmp_path / "none.so")
    assert opened is None
    assert "no compiled library" in problem
    (tmp_path / "text.so").write_text("not a library")
    opened, problem = library.open_library(tmp_path / "text.so")
    assert opened is None
    assert "does not load" in problem


def test_without_a_library_the_reference_runs_and_says_so_once(monkeypatch):
    blocks = blocks_of(made((40, 24), 1), LEVELS["nf4"], 32, True)
    with native.forced("reference"):
        wanted = dequantise(blocks), mul(torch.ones(2, 24), blocks)
    monkeypatch.setattr(library, "open_library", lambda: (None, "deltaw runs its reference ops: for a test"))
    library.loaded.cache_clear()
    try:
        with pytest.warns(native.SlowPath, match="for a test") as said:
            found = dequantise(blocks), mul(torch.ones(2, 24), blocks)
        assert native.path() == "reference"
        assert native.paths() == ("reference",)
        assert not native.available()
        assert len(said) == 1
    finally:
        library.loaded.cache_clear()
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


def test_the_sources_hash_changes_with_any_source(tmp_path, monkeypatch):
    shutil.copytree(build.HERE, tmp_path / "native")
    monkeypatch.setattr(build, "HERE", tmp_path / "native")
    before = build.sources_hash()
    (tmp_path / "native" / "kernels.h").write_text("//")
    assert build.sources_hash() != before


def test_there_is_one_openmp_pool_and_it_is_torchs():
    """A second pool beside torch's more than halves both."""
    maps = Path("/proc/self/maps")
    if not native.available() or not maps.is_file():
        assert native.path() in native.paths()
        return
    with_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quantise(torch.ones(1 << 20), LEVELS["nf4"], 64)
        torch.ones(1 << 22).sum()
        names = {
            line.split()[-1]
            for line in maps.read_text().splitlines()
            if line.endswith((".so", ".so.1")) or ".so." in line
        }
        pools = {name for name in names if any(word in Path(name).name for word in ("gomp", "iomp", "libomp"))}
    finally:
        torch.set_num_threads(with_threads)
    assert len(pools) == 1, pools
    assert library.torch_parallel() is not None


# Choose ---------------------------------------------------------------------------------------------------------------


def test_threads_end_when_asked_and_come_again():
    if not Path("/proc/self/task").is_dir():  # only Linux tells them
        assert library.and_end_threads(lambda: 3) == 3
        return
    program = """
import os, torch
from deltaw.ops.native import library
x = torch.randn(1 << 20)
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
before, wanted = count(), x.exp().sum()
team = count()
after = library.and_end_threads(count), count()
again = x.exp().sum()
print(team - before, after[0] - before, after[1] - before, count() - before, bool(again == wanted))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "0", "1", "True"]


def test_one_thread_computes_inside_and_as_many_as_before_behind_in_this_thread_only():
    if not Path("/proc/self/task").is_dir():
        assert library.in_one_thread(lambda: 3) == 3
        return
    program = """
import os, threading, torch
from deltaw.ops.native import library
x = torch.randn(1 << 20)
count = lambda: len(os.listdir("/proc/self/task"))
others = []
def inside():
    x.exp().sum()
    here = count()
    other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    other.start(), other.join()
    return here
before = count()
alone = library.in_one_thread(inside) - before
try:
    library.in_one_thread(lambda: 1 / 0)
except ZeroDivisionError:
    pass
x.exp().sum()
print(alone, count() - before, others[0], torch.get_num_threads())
"""
    two = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=two)
    assert done.stdout.split() == ["0", "1", "2", "2"]


def test_a_path_is_forced_inside_the_block_only():
    best = native.path()
    assert native.paths()[0] == "reference"
    for name in native.paths():
        with native.forced(name):
            assert native.path() == name
            with native.forced("reference"):
                assert native.path() == "reference"
            assert native.path() == name
    assert native.path() == best
    with pytest.raises(BadInput, match="no path 'sse9'"), native.forced("sse9"):
        pass


def test_the_kernels_refuse_what_they_could_not_read_safely():
    if not native.available():
        assert native.paths() == ("reference",)
        return
    blocks = blocks_of(made((40, 24), 1), LEVELS["nf4"], 32, True)
    s = blocks.scales
    parts = (s.absmax, s.nested, s.table, s.offset)
    table = blocks.levels.table
    good = calls.pack(blocks.codes, table, 4, 32, (40, 24), parts)
    for codes, its_table, bits, block, shape, scales in (
        (blocks.codes[:-1], table, 4, 32, (40, 24), parts),
        (blocks.codes.int(), table, 4, 32, (40, 24), parts),
        (blocks.codes[::2], table, 4, 32, (20, 24), parts),
        (blocks.codes.to("meta"), table, 4, 32, (40, 24), parts),
        (blocks.codes, table[:8], 4, 32, (40, 24), parts),
        (blocks.codes, table.double(), 4, 32, (40, 24), parts),
        (blocks.codes, table, 5, 32, (40, 24), parts),
        (blocks.codes, table, 4, 48, (40, 24), parts),
        (blocks.codes, table, 4, 8192, (40, 24), parts),
        (blocks.codes, table, 4, 32, (0, 24), parts),
        (blocks.codes, table, 4, 32, (40, 24), parts[:2]),
        (blocks.codes, table, 4, 32, (40, 24), (s.absmax,)),
        (blocks.codes, table, 4, 32, (40, 24), (s.plain()[:-1],)),
    ):
        with pytest.raises(ShapeError):
            calls.pack(codes, its_table, bits, block, shape, scales)
    with pytest.raises(ShapeError, match="do not lie in"):
        calls.dequantise(good, torch.empty(41, 24), (0, 41), (0, 24))
    with pytest.raises(ShapeError, match="needs 240"):
        calls.dequantise(good, torch.empty(10, 23), (0, 10), (0, 24))
    with pytest.raises(ShapeError, match="needs 48"):
        calls.product(torch.ones(2, 23), good, None, torch.empty(2, 40))
    with pytest.raises(ShapeError, match="bias"):
        calls.product(torch.ones(2, 24), good, torch.ones(39), torch.empty(2, 40))
    with pytest.raises(ShapeError, match="absmax"):
        calls.quantise_dynamic(
            torch.ones(9), torch.zeros(65536, dtype=torch.uint8), 4, torch.zeros(9, dtype=torch.uint8), torch.ones(2)
        )


def test_a_rectangle_is_that_part_of_the_matrix(any_path):
    if any_path == "reference":
        assert library.running() is None
        return
    for name, shape in (("nf4", (33, 65)), ("int8", (9, 1000)), ("fp4", (40, 256))):
        blocks = blocks_of(made(shape, 1), LEVELS[name], 64, False)
        packed = calls.pack(blocks.codes, blocks.levels.table, blocks.levels.bits, 64, shape, (blocks.scales.absmax,))
        for dtype in calls.DTYPES:
            whole = dequantise(blocks, dtype)
            for r0, r1, c0, c1 in ((0, 1, 0, 1), (3, 9, 7, 60), (2, 2, 0, 5), (0, shape[0], 64, shape[1])):
                out = torch.empty(r1 - r0, c1 - c0, dtype=dtype)
                calls.dequantise(packed, out, (r0, r1), (c0, c1))
                assert out.equal(whole[r0:r1, c0:c1])


def test_eight_bit_states_come_back_as_table_times_absmax(any_path):
    if any_path == "reference":
        assert library.running() is None
        return
    g = torch.Generator().manual_seed(0)
    table = torch.rand(256, generator=g)
    for n, block in ((1, 256), (1000, 256), (70_001, 2048)):
        codes = torch.randint(0, 256, (n,), generator=g).to(torch.uint8)
        absmax = torch.rand(-(-n // block), generator=g)
        values = torch.empty(n)
        calls.dequantise_dynamic(codes, absmax, table, block, values)
        assert values.equal(table[codes.long()] * absmax.repeat_interleave(block)[:n])


def test_the_bandwidth_loop_reads_every_value(any_path):
    if any_path == "reference":
        assert library.running() is None
        return
    assert calls.read_sum(torch.ones(1024)) == 1024


def test_ops_native_a_first_product_needs_no_room_of_another():
    program = (
        "import torch\nfrom deltaw.formats import QUANTISED\n"
        "w = QUANTISED['int8'].quantised(torch.randn(64, 64))\n"
        "print(list(w.mul(torch.randn(1, 64)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 64]"
