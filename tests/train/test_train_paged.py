"""Paged optimizer states: the same numbers bit for bit, within a budget of memory, and nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import ROWS, events_in, recipe, run
from torch import Tensor

from deltaw.errors import RecipeError, RunError, WorkFailed
from deltaw.train.loop import Loop
from deltaw.train.optim.optimizer import Optimizer
from deltaw.train.optim.pages import PAGE, Segment, cut
from deltaw.train.optimizer import make_optimizer, optimizer_state, restore_optimizer
from deltaw.train.recipe import TrainSpec, load_recipe

# odd sizes, one over several full pages, one with whole 8-bit blocks and a rest; ":B" is LoRA+'s fast group
SHAPES = {
    "one": (1,), "seven": (7,), "short:B": (63,), "over": (65,), "blocks": (4096,),
    "matrix": (61, 97), "large": (1000003,), "last:B": (5, 1013),
}  # fmt: skip
N_VALUES = sum(torch.Size(shape).numel() for shape in SHAPES.values())
SETTINGS = {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "lora_plus_ratio": 3.0}


def made(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped(optimizer: Any, parameters: dict[str, Tensor], steps: range) -> None:
    """Steps with gradients that depend on the step; "over" has none in step 1, "last:B" none before step 2."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for name, tensor in parameters.items():
            grad = torch.randn(tensor.shape, generator=generator) * 10.0 ** (step - 3)
            without = (name == "over" and step == 1) or (name == "last:B" and step < 2)
            tensor.grad = None if without else grad
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) * group["ratio"]
        optimizer.step()


def ours(parameters: dict[str, Tensor], folder: Path, **settings: Any) -> Optimizer:
    return make_optimizer(parameters, TrainSpec(optimizer={**SETTINGS, **settings}), folder)


def assert_same(mine: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert mine.keys() == wanted.keys() != set()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "workers leave the number of threads as it is"
    torch.set_num_threads(before)


@pytest.mark.parametrize("settings", [{}, {"paged": True}, {"paged": True, "resident_mb": 0.2}], ids=str)
def test_states_and_parameters_equal_torch_s_adamw_bit_for_bit(threads: int, tmp_path: Path, settings: dict) -> None:
    reference, mine = made(), made()
    slow = [t for n, t in reference.items() if not n.endswith(":B")]
    fast = [t for n, t in reference.items() if n.endswith(":B")]
    groups = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": SETTINGS["lora_plus_ratio"]}]
    adamw = {k: SETTINGS[k] for k in ("weight_decay", "betas", "eps")}
    theirs = torch.optim.AdamW(groups, fused=True, **adamw)
    optimizer = ours(mine, tmp_path, **settings)
    stepped(theirs, reference, range(5))
    stepped(optimizer, mine, range(5))
    assert_same(mine, reference)
    states = {f"{n}|{k}": s for n, t in reference.items() for k, s in theirs.state[t].items()}
    assert_same(optimizer_state(optimizer, mine), states)
    assert (optimizer.moved_bytes or 0) > (1e6 if settings else -1), "pages were streamed"


@pytest.mark.parametrize("resident_mb", [None, 0.4])
def test_paged_states_in_8_bits_equal_those_in_memory(threads: int, tmp_path: Path, resident_mb: float | None) -> None:
    mine, paged = made(), made()
    whole = ours(mine, tmp_path, bits=8)
    streamed = ours(paged, tmp_path, bits=8, paged=True, resident_mb=resident_mb)
    stepped(whole, mine, range(5))
    stepped(streamed, paged, range(5))
    assert_same(paged, mine)
    assert_same(optimizer_state(streamed, paged), optimizer_state(whole, mine))
    assert whole.moved_bytes is None
    assert streamed.moved_bytes > 1e6


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("first", [True, False])
def test_states_go_through_a_file_from_paged_to_resident_and_back(tmp_path: Path, first: bool, bits: int) -> None:
    wanted, mine = made(), made()
    stepped(ours(wanted, tmp_path, bits=bits), wanted, range(6))
    for paged, steps in ((first, range(2)), (not first, range(2, 4)), (first, range(4, 6))):
        optimizer = ours(mine, tmp_path, bits=bits, paged=paged)
        if steps.start:
            restore_optimizer(optimizer, mine, load_file(tmp_path / "state.safetensors"))
        stepped(optimizer, mine, steps)
        save_file(optimizer_state(optimizer, mine), tmp_path / "state.safetensors")
        mine = {name: tensor.clone() for name, tensor in mine.items()}
    assert_same(mine, wanted)


@pytest.mark.parametrize("paged", [True, False])
def test_a_parameter_that_a_state_lacks_begins_anew(tmp_path: Path, paged: bool) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path, paged=paged)
    stepped(optimizer, mine, range(2))
    early = {k: v.clone() for k, v in optimizer_state(optimizer, mine).items()}
    assert not [k for k in early if k.startswith("last:B|")], "it had no gradient yet"
    stepped(optimizer, mine, range(2, 4))
    assert [k for k in optimizer_state(optimizer, mine) if k.startswith("last:B|")]
    restore_optimizer(optimizer, mine, early)
    assert_same(optimizer_state(optimizer, mine), early)


def test_states_of_other_bits_are_refused(tmp_path: Path) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path)
    stepped(optimizer, mine, range(1))
    with pytest.raises(RunError, match=r"exp_avg.*and this run's are .*exp_avg_codes"):
        restore_optimizer(ours(mine, tmp_path, bits=8), mine, optimizer_state(optimizer, mine))


# Pages and the budget --------------------------------------------------------------------------------


def test_pages_hold_every_element_once_and_are_cut_at_blocks() -> None:
    sizes = list(enumerate([1, 7, 63, 65, 1000003, 0, 256, 4096, 300, 5000]))
    for most in (256, 4096, PAGE):
        pages = cut(sizes, most)
        assert all(0 < sum(s.stop - s.start for s in page) <= most for page in pages)
        assert all(
            s.start % 256 == 0 and (s.stop % 256 == 0 or s.stop == sizes[s.parameter][1]) for p in pages for s in p
        )
        found = [s for page in pages for s in page]
        assert found == sorted(found), "in the order of the parameters"
        for number, n in sizes:
            mine = [s for s in found if s.parameter == number]
            assert [s.start for s in mine] == [0, *(s.stop for s in mine)][: len(mine)]
            assert (mine[-1].stop if mine else 0) == n
    assert cut([(0, 100), (1, 500)], 512) == [(Segment(0, 0, 100), Segment(1, 0, 256)), (Segment(1, 256, 500),)]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("resident_mb", [None, 0.3, 1.0, 1.9])
def test_what_is_held_stays_within_the_budget_and_fills_it(
    threads: int, tmp_path: Path, bits: int, resident_mb: float | None
) -> None:
    mine = made()
    total = ours(mine, tmp_path, bits=bits).resident_bytes
    optimizer = ours(mine, tmp_path, bits=bits, paged=True, resident_mb=resident_mb)
    budget = total / 4 if resident_mb is None else resident_mb * 1e6
    stepped(optimizer, mine, range(2, 3))
    page = max(budget / 3 / 2, 8 * 4096)  # buffers of two pages take a third at most, or a page is the smallest
    assert budget - page <= optimizer.resident_bytes <= budget
    assert 0 < optimizer.moved_bytes <= 2 * total
    assert optimizer.moved_bytes >= 2 * (total - budget), "what does not stay is read and written once"


def test_a_budget_of_all_states_moves_nothing(tmp_path: Path) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path, paged=True, resident_mb=8 * N_VALUES / 1e6)
    stepped(optimizer, mine, range(1))
    assert optimizer.moved_bytes == 0


@pytest.mark.parametrize("bits", [32, 8])
def test_a_budget_too_small_is_refused_with_the_smallest_that_works(tmp_path: Path, bits: int) -> None:
    mine = made()
    with pytest.raises(RecipeError, match=r"train.optimizer.resident_mb is 0.01, and .* need") as caught:
        ours(mine, tmp_path, bits=bits, paged=True, resident_mb=0.01)
    smallest = float(re.search(r"need ([\d.]+\d)\.", str(caught.value))[1])
    with pytest.raises(RecipeError, match="resident_mb"):
        ours(mine, tmp_path, bits=bits, paged=True, resident_mb=smallest - 0.001)
    optimizer = ours(mine, tmp_path, bits=bits, paged=True, resident_mb=smallest)
    stepped(optimizer, mine, range(1))
    assert optimizer.moved_bytes > 0


def test_parameters_without_gradients_are_not_moved(tmp_path: Path) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path, paged=True, resident_mb=0.2)
    mine["one"].grad = torch.ones(1)
    optimizer.step()
    assert optimizer.moved_bytes < 2 * 8 * 8192
    before = mine["large"].clone()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.moved_bytes == 0
    assert torch.equal(mine["large"], before)


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def give_back() -> None:
    """Let the allocator return what it keeps free: it would be used again, and not be seen as growth."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def test_paged_states_are_no_memory_of_this_process_not_even_to_save_them(tmp_path: Path) -> None:
    mine = {"w:B": torch.zeros(6_000_000)}
    mine["w:B"].grad = torch.ones(6_000_000)
    grown = {}
    for paged in (True, False):
        give_back()
        before = anonymous_bytes()
        optimizer = ours(mine, tmp_path, paged=paged, resident_mb=4.0 if paged else None)
        optimizer.step()
        save_file(optimizer_state(optimizer, mine), tmp_path / "state.safetensors")
        restore_optimizer(optimizer, mine, load_file(tmp_path / "state.safetensors"))
        grown[paged] = anonymous_bytes() - before
        del optimizer
    assert grown[True] < 12e6  # 4 MB, and what interpreter and allocator take
    assert grown[False] > 40e6  # of 48 MB


# The file --------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_goes_with_the_optimizer(tmp_path: Path) -> None:
    def open_files() -> set[str]:
        return {os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()}

    mine = made()
    optimizer = ours(mine, tmp_path, paged=True)
    stepped(optimizer, mine, range(2))
    state = optimizer_state(optimizer, mine)
    assert list(tmp_path.iterdir()) == []
    assert [f for f in open_files() if f.startswith(str(tmp_path))], "it lies in the folder"
    del optimizer, state
    assert not [f for f in open_files() if f.startswith(str(tmp_path))]


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "No space left"), (errno.EFBIG, "files that large")])
def test_a_disk_without_room_is_found_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def full(fd: int, start: int, n: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WorkFailed, match=said) as caught:
        ours(made(), tmp_path, paged=True)
    assert f"{8 * N_VALUES / 1e6:.1f} MB" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match=rf"Cannot write the optimizer's states .* to {tmp_path / 'gone'}"):
        ours(made(), tmp_path / "gone", paged=True)


def test_a_disk_that_fails_in_a_step_is_one_sentence_and_no_update_goes_on(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path, paged=True, resident_mb=0.2)
    stepped(optimizer, mine, range(2))
    true, calls = os.pwrite, []

    def failing(fd: int, data: Any, at: int) -> int:
        calls.append(at)
        if len(calls) == 5:
            raise OSError(errno.EIO, "Input/output error")
        return true(fd, data, at)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(
        WorkFailed, match=r"cannot be read or written: Input/output error\. The last checkpoint is kept"
    ):
        stepped(optimizer, mine, range(2, 3))
    assert 5 <= len(calls) <= 5 + 3 * 20, "pages that were begun end, no other begins"


def test_short_reads_and_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, mine = made(), made()
    stepped(ours(wanted, tmp_path), wanted, range(3))
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[: len(data) // 3 + 1], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read(fd, [into[0][: len(into[0]) // 3 + 1]], at))
    stepped(ours(mine, tmp_path, paged=True), mine, range(3))
    assert_same(mine, wanted)


def test_only_parameters_on_the_cpu_are_paged(tmp_path: Path) -> None:
    elsewhere = {"w:B": torch.zeros(10000, device="meta")}
    with pytest.raises(RecipeError, match="paged is for parameters on the CPU"):
        ours(elsewhere, tmp_path, paged=True)
    with pytest.raises(RecipeError, match="bits is 8, and w:B is float32 on meta"):
        ours(elsewhere, tmp_path, bits=8)
    with pytest.raises(RecipeError, match="bits is 8, and w:B is float64 on cpu"):
        ours({"w:B": torch.zeros(10000, dtype=torch.float64)}, tmp_path, bits=8)


# Whole runs ------------------------------------------------------------------------------------------

PAGED = {"paged": True, "resident_mb": 0.1, "weight_decay": 0.1}


@pytest.mark.parametrize(("method", "bits"), [("full", 32), ("full", 8), ("lora", 32)])
def test_a_paged_run_equals_one_in_memory_and_tells_what_it_moved(
    base: Path, tmp_path: Path, method: str, bits: int
) -> None:
    changes = {"adapter": {"method": "full"}} if method == "full" else {"adapter": {"rank": 8}}
    kept = {"paged": True, "resident_mb": {("full", 32): 0.1, ("full", 8): 0.3, ("lora", 32): None}[method, bits]}
    found = {}
    for name, more in (("paged", kept), ("plain", {})):
        plain = recipe(base, train={"optimizer": {"bits": bits, **more}}, **changes)
        found[name] = run(plain, tmp_path / name)
    for mine, wanted in zip(found["paged"], found["plain"], strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            assert getattr(mine, key, None) == getattr(wanted, key, None), key
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        if (tmp_path / "plain" / part).exists():
            assert_same(load_file(tmp_path / "paged" / part), load_file(tmp_path / "plain" / part))
    moved = [e["paged_mb"] for e in events_in(tmp_path / "paged", "step")]
    assert len(moved) == 6
    assert all("paged_mb" not in e for e in events_in(tmp_path / "plain", "step"))
    if method == "full" and bits == 32:
        assert min(moved) == max(moved) > 0.1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_paged_run_killed_at_any_moment_goes_on_bit_for_bit_and_leaves_no_file(
    base: Path, tmp_path: Path, cache: Path
) -> None:
    train = {"save_every_s": 0, "optimizer": PAGED, "threads": 2}
    plain = recipe(base, adapter={"method": "full"}, train=train)
    in_memory = recipe(base, adapter={"method": "full"}, train={**train, "optimizer": {"weight_decay": 0.1}})
    run(in_memory, tmp_path / "whole")
    torch.set_num_threads(1)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    kills = ["event:3", "checkpoint:1", "state:2", "kept:2", "event:4"]
    plan = {"recipe": plain, "out": str(tmp_path / "out"), "cache": str(cache), "rows": ROWS, "valid": None}
    program = Path(__file__).with_name("killed_runs.py")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), json.dumps({**plan, "kills": kills})],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * len(kills) + [0], ended.stderr
    assert list(scratch.iterdir()) == []
    model = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert_same(model, load_file(tmp_path / "whole" / "model" / "model.safetensors"))
    steps = events_in(tmp_path / "out", "step")
    assert [e["loss"] for e in steps] == [e["loss"] for e in events_in(tmp_path / "whole", "step")]
    assert all(e["paged_mb"] > 0.1 for e in steps)
    assert events_in(tmp_path / "out", "start")[-1]["first_step"] > 0


def test_progress_counts_what_was_moved_over_all_processes(base: Path, tmp_path: Path) -> None:
    from test_train_step import loop_of

    settings = {"adapter": {"method": "full"}, "train": {"optimizer": PAGED}}
    loop: Loop = loop_of(base, **settings)
    steps = [event for _, event in zip(range(2), loop.run(), strict=False)]
    assert loop.progress.paged_mb == pytest.approx(sum(e.paged_mb for e in steps))
    assert steps[0].paged_mb == loop.optimizer.moved_bytes / 1e6 > 0


# The recipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optimizer.resident_mb=5", "resident_mb is 5, and states are not paged"),
        ("train.optimizer={paged: true, resident_mb: 0}", "resident_mb must be a finite number above 0"),
        ("train.optimizer={paged: true, resident_mb: .nan}", "resident_mb must be a finite number above 0"),
        ("train.optimizer.bits=16", "train.optimizer.bits"),
        ("train.optimizer.pagd=true", "paged"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"base": "somewhere", "adapter": {"method": "lora"}}, [override])
    assert said in str(caught.value)


def test_a_recipe_with_paged_states_reads_back() -> None:
    plain = {"base": "somewhere", "adapter": {"method": "full"}, "train": {"optimizer": {"paged": True, "bits": 8}}}
    made = load_recipe(plain, ["train.optimizer.resident_mb=2.5"])
    assert load_recipe(made.plain()) == made
    assert made.train.optimizer.resident_mb == 2.5
