"""What every method declares is so: each registered method, on networks with and without biases and with Conv1D."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract_cases import CASES, NEEDS, TRAINS_BASE, Case, cases, randomise
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import deltaw
from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.core.fingerprint import set_cache_dir
from deltaw.core.prefix import Prefix
from deltaw.data.pack import collate
from deltaw.data.template import Example
from deltaw.errors import AdapterError, NotMergeable
from deltaw.formats import QUANTISED
from deltaw.merge.bake import bake
from deltaw.methods import METHODS
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.store.describe import describe_adapter
from deltaw.store.peft import read_adapter, write_adapter
from deltaw.train.loss import sft
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from deltaw.train.step import step_gradient
from models import VOCAB, make_ids, make_net
from train.tiny_runs import save_base

IDS = make_ids()
ATOL = 1e-5  # float32 sums through two blocks in another order; logits of order 1 to 5
EVERY = cases()
ROWS = [  # three documents, one with a single target: an empty completion learns its end token alone
    Example(tuple(range(5, 16)), (False,) * 4 + (True,) * 7, "one"),
    Example((7, 9, 11, 2), (False, False, False, True), "an empty completion"),
    Example((8, 3, 21, 30, 44, 2), (False, False, True, True, True, True), "three"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


@pytest.fixture(params=EVERY, ids=str)
def case(request) -> Case:
    return request.param


def bare(case: Case, dtype: torch.dtype = torch.float32) -> Model:
    return Model(make_net(case.kind, dtype=dtype, **case.changes))


def worn(case: Case, dtype: torch.dtype = torch.float32, noise: float = 0.3) -> Model:
    """The model with a fresh adapter, and noise in every tensor of it."""
    model = bare(case, dtype)
    model.attach(case.spec)
    if dtype == torch.float64:
        for tensor in model.adapters["default"].tensors().values():
            tensor.data = tensor.data.double()
    randomise(model, size=noise)
    return model


def tree(net: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in net.named_modules(remove_duplicate=False)]


def test_every_registered_method_has_cases():
    assert {m.name for m in METHODS} == set(CASES) | TRAINS_BASE
    assert all(getattr(deltaw, m.__name__) is m for m in METHODS)
    assert len({m.name for m in METHODS}) == len(METHODS)


def test_it_starts_at_the_base_or_says_that_it_does_not(case):
    model = bare(case)
    base = model.logits(IDS)
    model.attach(case.spec)
    moved = float((model.logits(IDS) - base).abs().max().detach())
    assert (moved <= ATOL) == case.spec.starts_at_base, moved


def test_only_its_own_parameters_get_gradients(case):
    model = worn(case)
    step_gradient(model, ROWS, sft)
    trainable = model.trainable()
    fixed = {n: t for n, t in model.adapters["default"].tensors().items() if n not in trainable}
    assert trainable
    assert all(bool(t.grad is not None and t.grad.any()) for t in trainable.values())
    assert {n.rpartition(":")[2] for n in fixed} <= set(type(case.spec).fixed)
    assert all(t.grad is None for t in fixed.values())
    assert all(p.grad is None and not p.requires_grad for p in model.net.parameters() if not _is_among(p, trainable))


def _is_among(tensor: Tensor, trainable: dict[str, Tensor]) -> bool:
    return any(tensor is t for t in trainable.values())


def test_gradients_are_those_of_the_formula(case, monkeypatch):
    """The derivative along a random direction against central differences, in float64 throughout."""

    def exact_norm(self: nn.Module, x: Tensor) -> Tensor:  # transformers' own goes through float32
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = worn(case, torch.float64)
    batch = collate(ROWS)  # attention over packs is ours, and stays in float64
    parameters = list(model.trainable().values())
    rng = torch.Generator().manual_seed(4)
    weights = torch.randn(batch.n_targets, VOCAB, generator=rng, dtype=torch.float64)
    directions = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]

    def value() -> Tensor:
        return (model.pack_logits(batch) * weights).sum()

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            return float(value())

    step = 1e-6
    ahead, behind = moved(step), moved(-2 * step)
    moved(step)
    numeric = (ahead - behind) / (2 * step)
    value().backward()
    analytic = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    near = abs(numeric - analytic) <= 1e-5 * max(abs(numeric), 1.0)  # step^2, and rounding over the step
    assert near != type(case.spec).detaches, (numeric, analytic)


def test_a_pack_computes_what_its_documents_compute_alone(case):
    model = worn(case)
    step_gradient(model, ROWS, sft)
    packed = {n: t.grad.clone() for n, t in model.trainable().items()}
    for tensor in model.trainable().values():
        tensor.grad = None
    targets = [row.n_targets for row in ROWS]
    for row, n in zip(ROWS, targets, strict=True):
        weighed = {k: None if t.grad is None else t.grad.clone() for k, t in model.trainable().items()}
        for tensor in model.trainable().values():
            tensor.grad = None
        loss, _, _ = step_gradient(model, [row], sft)
        assert loss == loss  # a single row of one target has a finite loss
        for k, tensor in model.trainable().items():
            part = tensor.grad * n / sum(targets)
            tensor.grad = part if weighed[k] is None else weighed[k] + part
    for name, tensor in model.trainable().items():
        scale = float(packed[name].abs().max())
        apart = float((tensor.grad - packed[name]).abs().max())
        # PiSSA's factors are large: in float32 either way is 2e-5 from float64's gradient, in float64 both agree
        assert apart <= 5e-5 * max(scale, 1.0), f"{name}: {apart} of {scale}"


def test_checkpointing_gives_the_same_gradients(case):
    found = []
    for checkpointing in (False, True):
        model = worn(case)
        step_gradient(model, ROWS, sft, checkpointing=checkpointing)
        found.append({n: t.grad for n, t in model.trainable().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_merged_equals_applied_or_is_refused(case, tmp_path):
    folder = save_base(tmp_path / "base", kind=case.kind, **case.changes)
    model = load_base(folder)
    model.attach(case.spec)
    randomise(model, size=0.1)
    adapter = model.adapter()
    if not case.spec.mergeable:
        with pytest.raises(NotMergeable, match=case.method):
            bake(folder, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    places = model.places.sites
    if any("bias" in params and not places[name].has_bias for name, params in adapter.sites.items()):
        with pytest.raises(NotMergeable, match="adds a bias"):
            bake(folder, adapter, tmp_path / "out", measure=False)
        return
    bake(folder, adapter, tmp_path / "out", measure=False)
    wanted = model.logits(IDS)
    found = load_base(tmp_path / "out").logits(IDS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # the project's promise for float32
    assert float((found - load_base(folder).logits(IDS)).abs().max()) > 1e-3


def test_saved_and_read_back_it_is_the_same_bit_for_bit(case, tmp_path):
    model = worn(case)
    adapter = model.adapter()
    write_adapter(adapter, tmp_path / "saved")
    back = read_adapter(tmp_path / "saved")
    assert back.id == adapter.id
    assert back.spec == adapter.spec
    assert {n: t.tolist() for n, t in back.tensors().items()} == {n: t.tolist() for n, t in adapter.tensors().items()}
    again = bare(case)
    again.attach(back)
    with torch.no_grad():
        assert torch.equal(again.logits(IDS), model.logits(IDS))
    shown = describe_adapter(tmp_path / "saved")
    assert shown["method"] == adapter.spec.name
    assert shown["n_parameters"] == adapter.n_parameters == sum(t.numel() for t in adapter.tensors().values())


def test_detach_gives_the_base_back_bit_for_bit(case):
    model = bare(case)
    base, before, config = model.logits(IDS), tree(model.net), model.net.config.to_dict()
    values = {n: t.clone() for n, t in model.net.state_dict().items()}
    model.attach(case.spec)
    randomise(model)
    changed = model.logits(IDS)
    assert float((changed - base).abs().max().detach()) > 1e-3
    model.use(None)
    assert torch.equal(model.logits(IDS), base)
    model.use("default")
    assert torch.equal(model.logits(IDS), changed)
    model.detach()
    assert torch.equal(model.logits(IDS), base)
    assert tree(model.net) == before
    assert model.net.config.to_dict() == config
    assert all(torch.equal(t, values[n]) for n, t in model.net.state_dict().items())


def test_planned_bytes_are_the_stored_bytes(case, tmp_path):
    folder = save_base(tmp_path / "base", kind=case.kind, **case.changes)
    settings = {"base": {"path": str(folder), "dtype": "float32"}, "adapter": {"method": case.method, **case.settings}}
    if "rank_pattern" in case.settings:
        settings["adapter"]["rank_pattern"] = case.spec.rank_pattern
    counts = Planner(load_recipe(settings), Work.of_rows(2, 12)).plan().counts
    model = load_base(folder)
    model.attach(case.spec)
    held = model.adapters["default"].tensors()
    assert counts.adapter == sum(t.nbytes for t in held.values())
    assert counts.trainable == sum(t.numel() for t in model.trainable().values())
    write_adapter(model.adapter(), tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert counts.stored == file.stat().st_size - header


def test_a_batch_of_one_is_a_row_of_a_batch(case):
    model = worn(case)
    with torch.no_grad():
        both, first = model.logits(IDS), model.logits(IDS[:1])
    torch.testing.assert_close(both[:1], first, rtol=0, atol=ATOL)


def test_its_normal_form_is_one_of_the_four_and_batchable_says_so(case):
    model = worn(case)
    made = model.adapters["default"]
    forms = [made.lowered(name, model.places) for name in made.sites]
    assert all(isinstance(form, Affine | Bottleneck | Prefix) for form in forms)
    alone = bool(made.overrides) or any("norm" not in n and not n.endswith("bias") for n in made.swaps)
    # what replaces tensors or settings of the base cannot share a batch with other adapters; all else can
    assert case.spec.batchable == (not alone)


@pytest.mark.parametrize("format", sorted(QUANTISED))
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_it_takes_the_formats_that_it_declares(method, format):
    settings = (CASES.get(method.name) or [{}])[0]
    spec = Case(method.name, {k: v for k, v in settings.items() if k not in NEEDS}, "llama").spec
    model = Model(quantise_network(make_net("llama"), Format(format, 32, True)))
    if method.formats is not None and format not in method.formats:
        with pytest.raises(AdapterError, match=f"{format} is only read"):
            model.attach(spec)
        return
    model.attach(spec)
    randomise(model)
    dense = make_net("llama")
    with torch.no_grad():
        for name, weight in model.places.weights.items():
            dense.get_submodule(name).weight.copy_(weight.dense() if "embed" not in name else weight.dense().T)
    plain = Model(dense)
    plain.attach(model.adapter())
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), plain.logits(IDS), rtol=1e-5, atol=ATOL)


def test_a_recipe_trains_it(case, tmp_path):
    from train.tiny_runs import ROWS as TEXT
    from train.tiny_runs import recipe, run

    folder = save_base(tmp_path / "base", kind=case.kind, **case.changes)
    adapter = {"method": case.method, **case.settings}
    if "rank_pattern" in case.settings:
        adapter["rank_pattern"] = case.spec.rank_pattern
    plain = {**recipe(folder), "adapter": adapter}
    plain["train"] = {"steps": 2, "tokens_per_step": 60, "save_every_s": 1000}
    *_, done = run(plain, tmp_path / "run", TEXT)
    adapter_id = read_adapter(Path(done.adapter)).id
    fresh = load_base(folder)
    fresh.attach(case.spec)
    assert adapter_id != fresh.adapter().id  # it learned something
