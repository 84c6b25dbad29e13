"""GaLore: the official algorithm's numbers, few states, in pages and in 8 bits; and LoRA+ by its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import ROWS, events_in, recipe, run
from torch import Tensor

from deltaw.core.site import LinearSite
from deltaw.errors import RecipeError, RunError
from deltaw.model.base import load_base
from deltaw.train.loop import Loop
from deltaw.train.optim.galore import leading_vectors
from deltaw.train.optim.optimizer import Optimizer
from deltaw.train.optimizer import make_optimizer, optimizer_state, restore_optimizer
from deltaw.train.planning import Planner, Work, optimizer_bytes
from deltaw.train.recipe import TrainSpec, load_recipe

RANK = 5
MATRICES = {"tall.weight": (40, 24), "wide.weight": (17, 90), "square.weight": (31, 31)}
OTHERS = {"flat.weight": (RANK, 70), "norm.weight": (24,), "embed.weight": (61, 24), "lm_head.weight": (61, 24)}
SHAPES = {**MATRICES, **OTHERS}


def sites_of(shapes: dict[str, tuple[int, ...]]) -> list[LinearSite]:
    return [
        LinearSite(n.removesuffix(".weight"), s[1], s[0], "embedding" if "embed" in n else "linear", False, "head" in n)
        for n, s in shapes.items()
        if len(s) == 2
    ]


SITES = sites_of(SHAPES)
GALORE = {"name": "galore", "rank": RANK, "update_every": 4, "scale": 0.25}


def made(shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=rng) for n, s in shapes.items()}


@cache
def gradient(shape: tuple[int, ...], step: int, name: str) -> Tensor:
    """Random directions with singular values 0.7 apart: leading vectors that float32 finds to its last digits."""
    rng = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    raw = torch.randn(shape, generator=rng)
    if len(shape) < 2:
        return raw
    U, S, Vh = torch.linalg.svd(raw, full_matrices=False)
    return (U * (3.0 * 0.7 ** torch.arange(len(S)))) @ Vh


def stepped(optimizer: Any, parameters: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        for name, tensor in parameters.items():
            tensor.grad = gradient(tuple(tensor.shape), step, name).clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + step % 3)
        optimizer.step()


def ours(parameters: dict[str, Tensor], folder: Path, sites: list[LinearSite] = SITES, **settings: Any) -> Optimizer:
    return make_optimizer(parameters, TrainSpec(optimizer={**GALORE, **settings}), folder, sites)


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
    torch.set_num_threads(before)


# The official algorithm, written the slow way ----------------------------------------------------------


class Projector:
    """galore_torch's GaLoreProjector of type std; with `signs`, each vector's largest entry is made positive."""

    def __init__(self, rank: int, update_every: int, scale: float, signs: bool) -> None:
        self.rank, self.update_every, self.scale, self.signs = rank, update_every, scale, signs
        self.matrix: Tensor | None = None

    def project(self, grad: Tensor, step: int) -> Tensor:
        tall = grad.shape[0] >= grad.shape[1]
        if self.matrix is None or step % self.update_every == 0:
            U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
            vectors = Vh[: self.rank] if tall else U[:, : self.rank].t()
            if self.signs:
                vectors = torch.stack([v * v[v.abs().argmax()].sign() for v in vectors])
            self.matrix = vectors if tall else vectors.t()
        return grad @ self.matrix.t() if tall else self.matrix.t() @ grad

    def project_back(self, low: Tensor) -> Tensor:
        full = low @ self.matrix if low.shape[0] >= low.shape[1] else self.matrix @ low
        return full * self.scale


class Official:
    """galore_torch's AdamW in float64, for every parameter; those with a projector in few dimensions."""

    def __init__(self, parameters: dict[str, Tensor], projected: set[str], signs: bool, **settings: Any) -> None:
        self.values = {n: t.double() for n, t in parameters.items()}
        self.state: dict[str, dict[str, Any]] = {n: {"step": 0, "m": 0.0, "v": 0.0} for n in parameters}
        self.projectors = {n: Projector(RANK, settings["update_every"], settings["scale"], signs) for n in projected}

    def step(self, step: int, lr: float, eps: float, b1: float = 0.9, b2: float = 0.999) -> None:
        for name, p in self.values.items():
            s, projector = self.state[name], self.projectors.get(name)
            grad = gradient(tuple(p.shape), step, name).double()
            if projector:
                grad = projector.project(grad, s["step"])
            s["step"] += 1
            s["m"] = b1 * s["m"] + (1 - b1) * grad
            s["v"] = b2 * s["v"] + (1 - b2) * grad * grad
            size = lr * (1 - b2 ** s["step"]) ** 0.5 / (1 - b1 ** s["step"])
            normed = s["m"] / (s["v"].sqrt() + eps)
            p -= size * (projector.project_back(normed) if projector else normed)


@pytest.mark.parametrize(("update_every", "signs"), [(4, True), (1, True), (100, False)])
def test_twelve_steps_equal_the_official_algorithm(tmp_path: Path, update_every: int, signs: bool) -> None:
    """Signs of singular vectors matter only to moments that outlive a projection: with one, LAPACK's are as good.

    eps is next to nothing: the official code adds it before the bias correction, AdamW after it.
    """
    mine, reference = made(), Official(made(), set(MATRICES), signs, update_every=update_every, scale=0.25)
    optimizer = ours(mine, tmp_path, update_every=update_every, eps=1e-12)
    for step in range(12):
        reference.step(step, 0.01 * (1 + step % 3), eps=1e-12)
        stepped(optimizer, mine, range(step, step + 1))
    for name, tensor in mine.items():
        # values of 2 to 4 are rounded twelve times, by 2^-23 each at most; seen: 7.6e-7
        torch.testing.assert_close(tensor.double(), reference.values[name], rtol=0, atol=1e-6)
        assert float((tensor - made()[name]).abs().max()) > 0.01, f"{name} moved"


def test_weight_decay_is_decoupled_and_of_the_whole_weight(tmp_path: Path) -> None:
    mine, plain = made(), made()
    stepped(ours(mine, tmp_path, weight_decay=0.3), mine, range(1))
    stepped(ours(plain, tmp_path), plain, range(1))
    for name, start in made().items():
        wanted = plain[name] - 0.01 * 0.3 * start
        torch.testing.assert_close(mine[name], wanted, rtol=0, atol=4 * 2**-23)  # values up to 4, rounded twice


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33), (300, 7)])
def test_vectors_are_the_leading_ones_with_a_sign_of_their_own(shape: tuple[int, int]) -> None:
    G = gradient(shape, 1, "vectors")
    found = leading_vectors(G, 4)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    wanted = Vh[:4].T if shape[0] >= shape[1] else U[:, :4]
    assert (found.dtype, found.shape) == (torch.float32, (min(shape), 4))
    torch.testing.assert_close((found.double() * wanted).sum(0).abs(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found.T @ found, torch.eye(4), rtol=0, atol=1e-6)
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.equal(leading_vectors(-G, 4), found), "a sign of the gradient's cannot show"


def test_vectors_of_singular_values_four_decades_below_the_first_are_found_too() -> None:
    """float32's Gram matrix would lose them: its squares end at 1e-7 of the largest."""
    rng = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0] for n in (80, 48))
    S = torch.logspace(0, -4.7, 48, dtype=torch.float64)
    found = leading_vectors(((U[:, :48] * S) @ V.T).float(), 40).double()
    projector = V[:, :40] @ V[:, :40].T
    # float32 changes G by 3e-8 of its norm; the 40th value is 1.2e-4 and the next one 2.6e-5 less
    torch.testing.assert_close(found @ found.T, projector, rtol=0, atol=2e-3)


def test_a_gradient_of_zeros_changes_nothing(tmp_path: Path) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path)
    for tensor in mine.values():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert_same(mine, made())


# What it keeps -----------------------------------------------------------------------------------------


def states_of(optimizer: Optimizer, parameters: dict[str, Tensor]) -> dict[str, dict[str, tuple]]:
    found: dict[str, dict[str, tuple]] = {n: {} for n in parameters}
    for key, value in optimizer_state(optimizer, parameters).items():
        name, _, kind = key.rpartition("|")
        found[name][kind] = (value.dtype, value.numel())
    return found


@pytest.mark.parametrize("bits", [32, 8])
def test_states_are_two_moments_of_r_by_the_longer_side_and_a_projection(tmp_path: Path, bits: int) -> None:
    shapes = {"long.weight": (900, 40), "short.weight": (40, 60), "lm_head.weight": (100, 41)}
    sites = sites_of(shapes)
    mine = made(shapes)
    optimizer = ours(mine, tmp_path, sites, bits=bits)
    stepped(optimizer, mine, range(1))
    found = states_of(optimizer, mine)
    f32, u8 = torch.float32, torch.uint8
    for name, (m, n) in list(shapes.items())[:2]:
        small = RANK * max(m, n)
        moments = {"exp_avg": (f32, small), "exp_avg_sq": (f32, small)}
        if bits == 8 and small >= 4096:
            blocks = -(-small // 256)
            moments = {
                f"{k}_{part}": of for k in moments for part, of in (("codes", (u8, small)), ("absmax", (f32, blocks)))
            }
        assert found[name] == {"step": (f32, 1), "projection": (f32, RANK * min(m, n)), **moments}
    assert "projection" not in found["lm_head.weight"]
    total = sum(d.itemsize * n for of_one in found.values() for k, (d, n) in of_one.items() if k != "step")
    assert optimizer.resident_bytes == total
    if bits == 32:
        assert total == 4 * RANK * (2 * 900 + 40 + 2 * 60 + 40) + 8 * 4100


def test_only_weights_of_linear_maps_above_the_rank_are_projected_and_targets_choose_others(tmp_path: Path) -> None:
    def projected(**settings: Any) -> set[str]:
        mine = made()
        optimizer = ours(mine, tmp_path, **settings)
        stepped(optimizer, mine, range(1))
        return {n.removesuffix(".weight") for n, kinds in states_of(optimizer, mine).items() if "projection" in kinds}

    assert projected() == {"tall", "wide", "square"}
    assert projected(rank=20) == {"tall", "square"}
    assert projected(targets=["embed", "tall"]) == {"embed", "tall"}
    assert projected(targets=".*(head|a.*)") == {"tall", "square", "lm_head"}
    with pytest.raises(RecipeError, match=r"'squar' matches no weight of this model. Did you mean 'square'.*lm_head"):
        projected(targets=["tall", "squar"])
    with pytest.raises(RecipeError, match=r"'up_.*' matches no weight"):
        projected(targets="up_.*")
    with pytest.raises(RecipeError, match=r"rank is 31, and no matrix .* \(the largest shorter side is 31\)"):
        projected(rank=31)


SETTINGS = [
    {"bits": 32},
    {"bits": 8},
    {"bits": 32, "paged": True},
    {"bits": 8, "paged": True},
    {"bits": 32, "paged": True, "resident_mb": 1.7},
    {"name": "adamw", "bits": 8, "paged": True},
    {"name": "adamw", "paged": True, "resident_mb": 3},
    {"name": "adamw", "bits": 8},
]


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its states do not fit the buffers of their pages, in 8 bits too."""
    from tiny_runs import save_base

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 4000}
    return save_base(tmp_path_factory.mktemp("bases") / "wide", **sizes)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_planned_bytes_are_the_real_ones(threads: int, wide_base: Path, tmp_path: Path, settings: dict) -> None:
    only = {} if settings.get("name") == "adamw" else {"name": "galore", "rank": 40}
    loaded = load_recipe(recipe(wide_base, adapter={"method": "full"}, train={"optimizer": {**only, **settings}}))
    model = load_base(wide_base, dtype="float32")
    model.attach(loaded.adapter)
    optimizer = make_optimizer(model.trainable(), loaded.train, tmp_path, model.places.sites.values())
    planned = Planner(loaded, Work.of_rows(1, 8)).plan().counts.optimizer
    assert planned == optimizer.resident_bytes > 0
    parameters = list(model.trainable().values())
    for tensor in parameters:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    if settings.get("paged"):
        assert optimizer.moved_bytes > 0, "states are in pages"
        limit = settings.get("resident_mb", 1e9) * 1e6
        whole = optimizer_bytes(model.trainable(), _unpaged(loaded.train), model.places.sites.values())
        assert planned < min(limit, whole)


def _unpaged(train: TrainSpec) -> TrainSpec:
    return train.model_copy(update={"optimizer": train.optimizer.model_copy(update=UNPAGED)})


def test_states_shrink_as_rank_over_width(wide_base: Path) -> None:
    """Of the projected matrices: 2 r max(m, n) + r min(m, n) numbers instead of 2 m n."""
    full = {"adapter": {"method": "full"}}
    found = {}
    for rank in (None, 8, 12):
        optimizer = {"name": "galore", "rank": rank} if rank else {}
        loaded = load_recipe(recipe(wide_base, train={"optimizer": optimizer}, **full))
        found[rank] = Planner(loaded, Work.of_rows(1, 8)).plan().counts.optimizer
    shapes = 6 * ([(32, 96)] * 2 + [(16, 96)] * 2 + [(160, 96)] * 3)  # heads stay at 8 numbers
    for rank in (8, 12):
        saved = sum(2 * m * n - rank * (2 * max(m, n) + min(m, n)) for m, n in shapes)
        assert found[None] - found[rank] == 4 * saved


@pytest.mark.parametrize("name", ["galore", "galore8", "adamw8"])
def test_deltaw_plan_takes_the_optimizer_by_name(base: Path, name: str) -> None:
    from typer.testing import CliRunner

    from deltaw.cli.main import app

    words = ["plan", "--base", str(base), "--method", "full", "--batch", "1", "--length", "8", "--optimizer", name]
    rank = ["train.optimizer.rank=8"] if name != "adamw8" else []
    done = CliRunner().invoke(app, [*words, "--json", *rank], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    plain = json.loads(done.output)
    model = load_base(base, dtype="float32")
    settings = {"bits": 8 if name[-1] == "8" else 32, **({"name": "galore", "rank": 8} if rank else {})}
    spec = TrainSpec(optimizer=settings)
    model.attach(load_recipe(recipe(base, adapter={"method": "full"})).adapter)
    real = make_optimizer(model.trainable(), spec, None, model.places.sites.values()).resident_bytes
    assert plain["bytes"]["optimizer"] == real > 0


# Pages, threads, checkpoints ---------------------------------------------------------------------------

LARGE = {"a.weight": (64, 300), "b.weight": (280, 70), "c.weight": (90, 90), "embed.weight": (9001, 96), "norm": (13,)}
LARGE_SITES = sites_of(LARGE)
IN_PAGES = {"paged": True, "resident_mb": 1.4, "rank": 20, "weight_decay": 0.1}


@pytest.mark.parametrize("bits", [32, 8])
def test_paged_states_and_any_number_of_threads_give_the_same_bits(tmp_path: Path, bits: int) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            for more in ({"rank": 20, "weight_decay": 0.1}, IN_PAGES):
                mine = made(LARGE)
                optimizer = ours(mine, tmp_path, LARGE_SITES, bits=bits, **more)
                stepped(optimizer, mine, range(6))
                found.append((mine, optimizer_state(optimizer, mine)))
                assert (optimizer.moved_bytes or 0) > (1e5 if more is IN_PAGES else -1), "pages were streamed"
                if more is IN_PAGES:
                    assert optimizer.resident_bytes <= 1.4e6
    finally:
        torch.set_num_threads(before)
    for values, states in found[1:]:
        assert_same(values, found[0][0])
        assert_same(states, found[0][1])


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("first", [True, False])
def test_states_go_through_a_file_in_mid_period_from_paged_to_resident_and_back(
    tmp_path: Path, first: bool, bits: int
) -> None:
    kept, paged = {"bits": bits, "rank": 20, "weight_decay": 0.1}, {"bits": bits, **IN_PAGES}
    wanted, mine = made(LARGE), made(LARGE)
    stepped(ours(wanted, tmp_path, LARGE_SITES, **kept), wanted, range(10))
    for in_pages, steps in ((first, range(3)), (not first, range(3, 6)), (first, range(6, 10))):  # anew at 4 and 8
        optimizer = ours(mine, tmp_path, LARGE_SITES, **(paged if in_pages else kept))
        if steps.start:
            restore_optimizer(optimizer, mine, load_file(tmp_path / "state.safetensors"))
        stepped(optimizer, mine, steps)
        save_file(optimizer_state(optimizer, mine), tmp_path / "state.safetensors")
        mine = {name: tensor.clone() for name, tensor in mine.items()}
    assert_same(mine, wanted)


def test_states_of_another_rank_are_refused(tmp_path: Path) -> None:
    mine = made()
    optimizer = ours(mine, tmp_path)
    stepped(optimizer, mine, range(1))
    with pytest.raises(RunError, match=r"checkpoint's optimizer states are .*projection.*this run's are"):
        restore_optimizer(ours(mine, tmp_path, rank=6), mine, optimizer_state(optimizer, mine))


# Whole runs --------------------------------------------------------------------------------------------

UNPAGED = {"paged": False, "resident_mb": None}
TINY = {"name": "galore", "rank": 8, "update_every": 4, "scale": 1.0}


def test_a_run_learns_and_projects_the_linear_maps_of_the_model(base: Path, tmp_path: Path) -> None:
    settings = {"steps": 40, "lr": 0.003, "optimizer": {**TINY, "update_every": 10}}
    events = run(recipe(base, adapter={"method": "full"}, train=settings), tmp_path / "run", rows=ROWS[:4])
    losses = [e.loss for e in events if e.kind == "step"]
    assert losses[-1] < 0.2 * losses[0]
    from test_train_step import loop_of

    loop: Loop = loop_of(base, adapter={"method": "full"}, train={"optimizer": TINY})
    next(iter(loop.run()))
    projected = {n.split("|")[1] for n in loop.state() if n.endswith("|projection")}
    assert len(projected) == 2 * 7
    assert all(".layers." in n and n.endswith("_proj.weight") for n in projected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("more", [{"bits": 8}, {"paged": True}], ids=str)
def test_a_killed_run_goes_on_bit_for_bit(base: Path, tmp_path: Path, cache: Path, more: dict) -> None:
    train = {"save_every_s": 0, "optimizer": {**TINY, "weight_decay": 0.1, **more}}
    plain = recipe(base, adapter={"method": "full"}, train=train)
    in_memory = recipe(
        base, adapter={"method": "full"}, train={**train, "optimizer": {**train["optimizer"], **UNPAGED}}
    )
    run(in_memory, tmp_path / "whole")
    kills = ["event:3", "checkpoint:1", "state:2", "event:4"]
    plan = {"recipe": plain, "out": str(tmp_path / "out"), "cache": str(cache), "rows": ROWS, "valid": None}
    program = Path(__file__).with_name("killed_runs.py")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), json.dumps({**plan, "kills": kills})],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * len(kills) + [0], ended.stderr
    model = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert_same(model, load_file(tmp_path / "whole" / "model" / "model.safetensors"))
    steps = events_in(tmp_path / "out", "step")
    assert [e["loss"] for e in steps] == [e["loss"] for e in events_in(tmp_path / "whole", "step")]
    assert events_in(tmp_path / "out", "start")[-1]["first_step"] > 0
    assert all((e.get("paged_mb") or 0) > (0.1 if "paged" in more else -1) for e in steps)


# Recipes -----------------------------------------------------------------------------------------------


def refused(method: str, override: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"base": "somewhere", "adapter": {"method": method}}, [override])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("{name: galore, lora_plus_ratio: 4}", "lora_plus_ratio is 4, and galore trains the base's own weights"),
        ("{name: galore, rank: 0}", "rank must be at least 1, not 0"),
        ("{name: galore, update_every: 0}", "update_every must be at least 1, not 0"),
        ("{name: galore, scale: 0}", "scale must be a finite number above 0, not 0"),
        ("{name: galore, scale: .nan}", "scale must be a finite number above 0"),
        ("{name: galore, rank: 2.5}", "train.optimizer.rank"),
        ("{name: galore, targets: []}", "targets names nothing"),
        ("{name: galore, targets: '(a'}", "targets is no regular expression"),
        ("{name: galore, bits: 16}", "train.optimizer.bits"),
        ("{name: galore, resident_mb: 5}", "resident_mb is 5, and states are not paged"),
        ("{name: galore, update_gap: 5}", "unknown key 'train.optimizer.update_gap'"),
        ("{name: adamw, rank: 8, scale: 1.0}", "rank, scale belongs to galore; write name: galore"),
        ("{lora_plus_ratio: 16}", "method 'full' trains the base's own weights, which have no A and B"),
        ("lora_plus", "lora_plus_ratio is 16, and method 'full'"),
        ("galor", "'galore'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, said: str) -> None:
    assert said in refused("full", f"train.optimizer={override}")


def test_galore_is_for_full_alone() -> None:
    message = refused("lora", "train.optimizer=galore")
    assert message.startswith("recipe: train.optimizer is galore, and adapter.method is 'lora'")
    assert "method: full" in message


def test_recipes_with_each_optimizer_read_back() -> None:
    for method, optimizer in (("full", {**GALORE, "targets": ["embed_tokens"], "bits": 8}), ("lora", "lora_plus")):
        first = load_recipe({"base": "somewhere", "adapter": {"method": method}, "train": {"optimizer": optimizer}})
        assert load_recipe(first.plain()) == first
    assert first.train.optimizer.lora_plus_ratio == 16
    assert load_recipe(first, ["train.optimizer.lora_plus_ratio=4"]).train.optimizer.lora_plus_ratio == 4
    assert load_recipe({"base": "b", "adapter": {"method": "lora"}}).train.optimizer.lora_plus_ratio == 1


# LoRA+ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "ratio"), [("lora_plus", 16), ({"name": "lora_plus", "lora_plus_ratio": 5}, 5)])
def test_lora_plus_by_name_moves_b_by_its_ratio_and_a_as_before(base: Path, optimizer: Any, ratio: float) -> None:
    from test_train_step import loop_of

    moved = {}
    for how in ("adamw", optimizer):
        loop = loop_of(base, train={"optimizer": how, "lr": 1e-3, "warmup_ratio": 0})
        with torch.no_grad():
            for name, tensor in loop.parameters.items():
                if name.endswith(":B"):
                    tensor.fill_(0.125)  # at zero, A would have no gradient
        before = {n: t.detach().clone() for n, t in loop.parameters.items()}
        next(iter(loop.run()))
        moved[str(how)] = {n: t.detach() - before[n] for n, t in loop.parameters.items()}
    assert any(n.endswith(":B") for n in moved["adamw"])
    for name, by_one in moved["adamw"].items():
        times = ratio if name.endswith(":B") else 1
        # an update of 1e-3 on a value of 0.1 to 0.5 is known to float32's spacing there, 2^-25
        torch.testing.assert_close(moved[str(optimizer)][name], times * by_one, rtol=0, atol=(ratio + 2) * 2**-25)
        assert float(by_one.abs().max()) > 5e-4


def test_lora_plus_is_refused_where_there_is_no_b(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lora_plus, and this method has no matrices A and B"):
        make_optimizer({"site:vector": torch.zeros(3)}, TrainSpec(optimizer={"name": "lora_plus"}), tmp_path)
    with pytest.raises(RecipeError, match="has lora_plus_ratio 4, and this method has no matrices A and B"):
        make_optimizer({"site:vector": torch.zeros(3)}, TrainSpec(optimizer={"lora_plus_ratio": 4}), tmp_path)
