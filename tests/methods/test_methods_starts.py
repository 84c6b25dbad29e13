"""LoRA's other starts: at the base or nearer to it, and saved as plain LoRA."""

from __future__ import annotations

import pytest
import torch
from made_starts import IDS, batches, quantised_folder

from deltaw import Lora
from deltaw.core.fingerprint import set_cache_dir
from deltaw.core.site import LinearSite
from deltaw.errors import SpecError
from deltaw.methods.starts import lost, orthonormal, principal
from deltaw.model.attachment import Attachment
from deltaw.model.base import load_base
from deltaw.model.calibrate import input_directions
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter, write_adapter
from deltaw.train.run import train
from models import make_net, randomise
from train.tiny_runs import ROWS, recipe, run, save_base

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
ATOL = 1e-5  # the promise in float32


@pytest.fixture(autouse=True)
def cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


@pytest.mark.parametrize("start", ["pissa", "olora", "eva"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "gpt_neox"])
def test_it_starts_at_the_base_and_is_saved_as_plain_lora_for_it(start, kind, tmp_path):
    model = Model(make_net(kind))
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5, rslora=True, start=start), calibration=batches())
    torch.testing.assert_close(model.logits(IDS), base, rtol=0, atol=ATOL)
    assert all(bool(p["A"].any()) for p in model.adapters["default"].sites.values())
    with torch.no_grad():
        rng = torch.Generator().manual_seed(2)
        for tensor in model.trainable().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=rng)
    trained = model.logits(IDS)
    assert float((trained - base).abs().max().detach()) > 0.1
    write_adapter(model.adapter(), tmp_path / "a")
    spec = read_adapter(tmp_path / "a").spec
    assert (spec.start, spec.rank) == ("random", 3 if start == "eva" else 6)
    again = Model(make_net(kind))
    again.attach(tmp_path / "a")
    torch.testing.assert_close(again.logits(IDS), trained, rtol=0, atol=ATOL)
    theirs = peft.PeftModel.from_pretrained(make_net(kind), tmp_path / "a").eval()
    with torch.no_grad():
        wanted = trained.detach()
        # B A and B0 A0 are of the weight's size and nearly cancel: a few more roundings than in LoRA
        torch.testing.assert_close(theirs(input_ids=IDS).logits, wanted, rtol=0, atol=ATOL * float(wanted.abs().max()))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_factors_are_pefts(start):
    theirs = peft.get_peft_model(
        make_net("llama"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM"),
    )
    ours = Model(make_net("llama"))
    ours.attach(Lora(rank=3, alpha=5, start=start))
    compared = 0
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            params = ours.adapters["default"].sites[name.removeprefix("base_model.model.")]
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            # singular vectors have no sign: products are what counts; sums of 40 terms of order 1
            torch.testing.assert_close(params["B"] @ params["A"], product, rtol=0, atol=2e-5)
            compared += 1
    assert compared == 14


def test_principal_is_the_best_approximation_and_orthonormal_the_first_of_qr():
    W = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    A, B = principal(W, 5, 1.7)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    best = (U[:, :5] * S[:5]) @ Vt[:5]
    torch.testing.assert_close(1.7 * (B @ A).double(), best, rtol=0, atol=1e-5)
    A, B = orthonormal(W, 5)
    torch.testing.assert_close(B.T @ B, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(B @ (B.T @ W), B @ A, rtol=0, atol=1e-5)  # W projected on the span of B
    source, held = W, W + 0.1 * torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    A, B = lost(source, held, 5, 0.8)
    assert torch.linalg.norm(held + 0.8 * B @ A - source) < 0.85 * torch.linalg.norm(held - source)


def test_directions_are_the_right_singular_vectors_of_the_inputs():
    model = Model(make_net("llama"))
    sites = [s for s in model.places.sites.values() if s.kind == "linear"]
    seen: dict[str, list[torch.Tensor]] = {s.name: [] for s in sites}
    handles = [
        model.places.modules[s.name].register_forward_pre_hook(
            lambda m, args, name=s.name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for s in sites
    ]
    with torch.no_grad():
        for batch in batches():
            model.pack_logits(batch)
    for handle in handles:
        handle.remove()
    for most in (10**9, 5_000):  # at once, and in several passes
        found = input_directions(model, sites, batches(), 4, most)
        assert set(found) == set(seen)
        for name, rows in seen.items():
            _, _, Vt = torch.linalg.svd(torch.cat(rows), full_matrices=False)
            cosines = (found[name].double() * Vt[:4]).sum(1).abs()
            torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_loftq_starts_nearer_the_dense_model_than_nf4_does(tmp_path):
    folder = quantised_folder(tmp_path / "base")
    dense = load_base(folder).logits(IDS)
    model = load_base(folder, "nf4")
    plain = float((model.logits(IDS) - dense).norm())
    model.attach(Lora(rank=8, alpha=5, start="loftq"))
    moved = float((model.logits(IDS) - dense).norm().detach())
    assert moved < 0.8 * plain
    write_adapter(model.adapter(), tmp_path / "a")
    again = load_base(folder, "nf4")
    again.attach(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.logits(IDS), model.logits(IDS))
    weights = model.places.weights
    for name, params in model.adapters["default"].sites.items():
        lost_by = model.originals(name) - weights[name].dense()
        left = lost_by - model.adapters["default"].spec.scale_at(model.places.sites[name]) * params["B"] @ params["A"]
        assert float(left.norm().detach()) < float(lost_by.norm())


def test_what_a_start_needs_and_does_not_have_is_said():
    model = Model(make_net("llama"))
    with pytest.raises(SpecError, match="from before quantisation"):
        model.attach(Lora(rank=3, start="loftq"))
    with pytest.raises(SpecError, match="attach with rows"):
        model.attach(Lora(rank=3, start="eva"))
    with pytest.raises(SpecError, match="embed_tokens is an embedding"):
        model.attach(Lora(rank=3, start="pissa", targets=["embed_tokens"]))
    with pytest.raises(SpecError, match="at most 16 directions"):
        model.attach(Lora(rank=17, start="pissa", targets=["k_proj"]))
    with pytest.raises(SpecError, match="remove one of them"):
        Lora(start="olora", init_a="gaussian")
    assert model.adapters == {}


def test_a_bias_only_site_is_settled_as_it_is():
    model = Model(make_net("llama"))
    model.attach(Lora(rank=3, alpha=5, start="pissa", targets=["q_proj"], bias="all", alpha_pattern={"q_proj": 7}))
    randomise(model)
    made = model.adapter()
    q = next(s for s in made.places if isinstance(s, LinearSite) and s.role == "q_proj")
    assert made.spec.scale_at(q) == pytest.approx(7 / 3)
    assert set(made.sites["model.layers.0.mlp.up_proj"]) == {"bias"}
    again = Model(make_net("llama"))
    again.attach(made)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(IDS), model.logits(IDS), rtol=0, atol=ATOL)


def test_what_is_fixed_never_trains_whatever_its_place_is_called():
    # "roberta..." begins like "replace:" and "rows:", which name tensors of another kind
    params = {name: torch.zeros(2, 2) for name in ("A", "B", "A0", "B0")}
    made = Attachment(Lora(rank=2, start="pissa"), sites={"roberta.layer.0.query": params})
    made.swaps["roberta.A0"] = torch.ones(2)
    names = {"roberta.layer.0.query:A", "roberta.layer.0.query:B", "replace:roberta.A0"}
    assert set(made.parameters()) == names
    assert set(made.tensors()) - names == {"roberta.layer.0.query:A0", "roberta.layer.0.query:B0"}


@pytest.mark.parametrize("start", ["pissa", "eva"])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(start, tmp_path):
    folder = save_base(tmp_path / "base")
    adapter = {"method": "lora", "rank": 3, "alpha": 5, "start": start}
    plain = {**recipe(folder), "adapter": adapter}
    plain["train"] = {"steps": 4, "tokens_per_step": 60, "lr": 0.01, "save_every_s": 0}
    *_, whole = run(plain, tmp_path / "whole")
    events = train(plain, tmp_path / "cut", train_rows=ROWS)
    for event in events:
        if event.plain()["event"] == "saved" and event.plain()["step"] == 2:
            break
    events.close()
    *_, done = run(plain, tmp_path / "cut")
    assert read_adapter(done.adapter).id == read_adapter(whole.adapter).id
