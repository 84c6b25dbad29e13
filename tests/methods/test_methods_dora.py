"""DoRA is PEFT's, both ways, and what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltaw import Dora
from deltaw.core.affine import Affine
from deltaw.merge.bake import bake
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.store.peft import read_adapter, write_adapter
from models import EMBEDDING, make_ids, make_net, make_tokenizer, randomise

IDS = make_ids()
ATOL = RTOL = 1e-5  # float32: PEFT sums in another order and takes the norm of the whole matrix; logits of order 1 to 5
ALL = {"bias": "all", "targets": r".*(_proj|embed_tokens|lm_head|c_attn|c_fc|wte)"}


def quiet(test):
    """PEFT says what it does of its own accord: none of it concerns us."""
    for said in ("fan_in_fan_out is set to", ".*tie_word_embeddings", ".*tied", "Setting `save_embedding_layers`"):
        test = pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")(test)
    return pytest.mark.parity(test)


def theirs(kind: str, **settings: object) -> nn.Module:
    """PEFT's model with noise in A, B, the magnitudes and what else trains."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_dora": True, **settings},
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(make_net(kind), config)
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in (p for p in made.parameters() if p.requires_grad):
            value += 0.3 * torch.randn(value.shape, generator=rng)
    return made.eval()


def worn(kind: str, dtype: torch.dtype = torch.float32, **settings: object) -> Model:
    """Our model with a fresh adapter and noise in every tensor of it."""
    model = Model(make_net(kind, dtype=dtype))
    model.attach(Dora(**{"rank": 3, "alpha": 5, **settings}))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.trainable().values():
            value += 0.3 * torch.randn(value.shape, generator=rng)
    return model


def compare_with_peft(kind: str, made: nn.Module, folder: Path) -> Model:
    """PEFT's file gives PEFT's logits here; the same adapter, saved by us, gives them there."""
    peft = pytest.importorskip("peft")
    made.save_pretrained(folder / "theirs")
    with torch.no_grad():
        wanted = made(input_ids=IDS).logits
        ours = Model(make_net(kind))
        base = ours.logits(IDS)
        ours.attach(folder / "theirs")
        torch.testing.assert_close(ours.logits(IDS), wanted, rtol=RTOL, atol=ATOL)
        assert float((wanted - base).abs().max()) > 0.1
        write_adapter(ours.adapter(), folder / "ours")
        back = peft.PeftModel.from_pretrained(make_net(kind), folder / "ours").eval()
        torch.testing.assert_close(back(input_ids=IDS).logits, wanted, rtol=RTOL, atol=ATOL)
        again = Model(make_net(kind))
        again.attach(folder / "ours")
        assert torch.equal(again.logits(IDS), ours.logits(IDS))
    return ours


VARIANTS = {
    "plain": {},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 11}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "saved norms": {"modules_to_save": ["norm"], "target_modules": ["down_proj"]},
}


@quiet
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_gives_pefts_logits_both_ways(variant, tmp_path):
    ours = compare_with_peft("llama", theirs("llama", **VARIANTS[variant]), tmp_path)
    assert type(ours.adapters["default"].spec) is Dora


@quiet
@pytest.mark.parametrize("kind", ["gpt2", "gemma", "phi", "gpt_neox"])
def test_other_architectures_give_pefts_logits_both_ways(kind, tmp_path):
    extra = {} if kind == "gpt2" else {"bias": "all"}
    compare_with_peft(kind, theirs(kind, **extra), tmp_path)


@quiet
@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_an_embedding_of_another_architecture_gives_pefts_logits_both_ways(kind, tmp_path):
    inner = "c_attn" if kind == "gpt2" else "q_proj"
    compare_with_peft(kind, theirs(kind, target_modules=[EMBEDDING.get(kind, "embed_tokens"), inner]), tmp_path)


@quiet
def test_an_adapter_that_we_made_gives_our_logits_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = worn("llama", rslora=True, bias="all", targets=["embed_tokens", "q_proj", "down_proj"])
    write_adapter(model.adapter(), tmp_path)
    back = peft.PeftModel.from_pretrained(make_net("llama"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=IDS).logits, model.logits(IDS), rtol=RTOL, atol=ATOL)


@quiet
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["all-linear", "embedding"])
def test_gradients_of_factors_and_magnitudes_equal_pefts(kind, where):
    targets = "all-linear" if where == "all-linear" else [EMBEDDING.get(kind, "embed_tokens")]
    made = theirs(kind, target_modules=targets)
    ours = Model(make_net(kind))
    ours.attach(Dora(rank=3, alpha=5, targets=targets))
    names = {}
    for name, value in made.named_parameters():
        if value.requires_grad:
            site, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            part = "m" if part.startswith("magnitude") else part.removeprefix("embedding_")[0]
            names[f"{site}:{part}"] = value
            with torch.no_grad():
                ours.adapters["default"].sites[site][part].copy_(value)
    labels = make_ids(seed=6)
    for logits in (made(input_ids=IDS).logits, ours.logits(IDS)):
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert set(names) == set(ours.trainable())
    assert any(name.endswith(":m") for name in names)
    for name, value in ours.trainable().items():
        assert bool(value.grad.any())
        torch.testing.assert_close(value.grad, names[name].grad, rtol=RTOL, atol=ATOL, msg=name)  # sums over 22 tokens


@quiet
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fresh_magnitudes_are_pefts(kind):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "up_proj", "embed_tokens"] if kind == "llama" else ["c_attn", "c_proj", "wte"]
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    made = peft.get_peft_model(make_net(kind), config)
    ours = Model(make_net(kind))
    ours.attach(Dora(rank=3, targets=targets))
    found = {}
    for name, module in made.named_modules():
        if getattr(module, "lora_magnitude_vector", None):
            found[name.removeprefix("base_model.model.")] = module.lora_magnitude_vector["default"].weight
    assert set(found) == set(ours.adapters["default"].sites)
    for site, params in ours.adapters["default"].sites.items():
        torch.testing.assert_close(params["m"], found[site].detach(), rtol=1e-6, atol=0)  # sums of up to 53 squares
        assert params["m"].shape == (ours.places.sites[site].out_features,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_it_starts_at_its_base_bit_for_bit(kind, dtype):
    model = Model(make_net(kind, dtype=dtype))
    base = model.logits(IDS)
    model.attach(Dora(rank=3, alpha=5, **ALL))
    assert torch.equal(model.logits(IDS), base)
    made = model.adapters["default"]
    gains = [made.lowered(name, model.places).out_gain for name, params in made.sites.items() if "m" in params]
    assert all(bool((gain == 1).all()) for gain in gains)
    assert any(model.places.sites[name].has_bias for name in made.sites)


def test_it_starts_at_a_quantised_base_bit_for_bit():
    model = Model(quantise_network(make_net("llama"), Format("nf4", 32, True)))
    base = model.logits(IDS)
    model.attach(Dora(rank=3, alpha=5))
    assert torch.equal(model.logits(IDS), base)


def test_a_row_of_zeros_in_the_base_stays_finite_and_learns():
    net = make_net("llama")
    with torch.no_grad():
        net.lm_head.weight[[4, 50]] = 0  # as rows that pad a vocabulary are
    model = Model(net)
    base = model.logits(IDS)
    model.attach(Dora(rank=3, alpha=5, targets=["lm_head"]))
    assert torch.equal(model.logits(IDS), base)
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    for _ in range(3):
        nn.functional.cross_entropy(model.logits(IDS).flatten(0, 1), torch.full((22,), 4)).backward()
        optimizer.step()
    assert bool(torch.isfinite(model.logits(IDS)).all())
    assert all(bool(torch.isfinite(t).all()) for t in model.trainable().values())
    assert bool(model.trainable()["lm_head:B"][4].any())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_lowers_to_the_papers_equation(kind):
    """Each site as a whole matrix in float64: m times the direction of W + s B A."""
    model = worn(kind)
    made = model.adapters["default"]
    for name, params in made.sites.items():
        form = made.lowered(name, model.places)
        assert isinstance(form, Affine)
        A, B, m = (params[key].detach().double() for key in ("A", "B", "m"))
        whole = model.places.weights[name].dense(torch.float64) + 5 / 3 * B @ A
        direction = whole / whole.norm(dim=1, keepdim=True)
        got = form.out_gain.detach().double().unsqueeze(1) * whole
        torch.testing.assert_close(got, m.unsqueeze(1) * direction, rtol=3e-6, atol=1e-6)  # float32 sums of 40 terms


def test_its_norm_gets_no_gradient():
    """Section 4.3: the derivative is that of the formula with the norm held, not the whole one."""
    model = worn("llama", targets=["q_proj"], layers=[0])
    ((name, params),) = model.adapters["default"].sites.items()
    W = model.places.weights[name].dense()
    bias = model.places.biases[name]
    x = torch.randn(5, W.shape[1], generator=torch.Generator().manual_seed(7))
    weights = torch.randn(5, W.shape[0], generator=torch.Generator().manual_seed(8))

    def by_hand(held: bool) -> list[Tensor]:
        A, B, m = (params[key].detach().clone().requires_grad_() for key in ("A", "B", "m"))
        whole = W + 5 / 3 * B @ A
        norm = whole.norm(dim=1)
        y = x @ (m / (norm.detach() if held else norm)).unsqueeze(1).mul(whole).T + bias
        return list(torch.autograd.grad((y * weights).sum(), [A, B, m]))

    y = model.net.get_submodule(name)(x)
    got = torch.autograd.grad((y * weights).sum(), [params["A"], params["B"], params["m"]])
    whole = by_hand(False)
    for found, held in zip(got, by_hand(True), strict=True):
        torch.testing.assert_close(found, held, rtol=1e-4, atol=1e-5)  # float32 sums of 32 terms of order 1
    assert all(float((found - w).abs().max()) > 0.01 for found, w in zip(got[:2], whole[:2], strict=True))  # A and B


def test_dropout_reaches_the_input_of_a_alone():
    model = worn("llama", targets=["up_proj"], layers=[0], dropout=0.4)
    ((name, params),) = model.adapters["default"].sites.items()
    host = model.net.get_submodule(name)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(7))
    model.run.seed = 5
    got = host(x)
    keep = host._keep(x, 0.4)
    model.run.seed = None
    assert 0 < int((keep == 0).sum()) < keep.numel()
    gain = model.adapters["default"].lowered(name, model.places).out_gain
    W, bias = model.places.weights[name].dense(), model.places.biases[name]
    wanted = gain * (x @ W.T + 5 / 3 * (x * keep) @ params["A"].T @ params["B"].T) + bias
    torch.testing.assert_close(got, wanted, rtol=RTOL, atol=ATOL)


# After training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_equals_applied(kind, dtype, tmp_path):
    folder = tmp_path / "base"
    make_net(kind, dtype=getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = load_base(folder, dtype="float32")
    base = model.logits(IDS)
    model.attach(Dora(rank=3, alpha=5, **ALL))
    randomise(model, size=0.2)
    bake(folder, model.adapter(), tmp_path / "out", dtype="float32", measure=False)
    found = load_base(tmp_path / "out", dtype="float32").logits(IDS)
    torch.testing.assert_close(found, model.logits(IDS), rtol=0, atol=1e-4)  # the project's promise for float32
    assert float((found - base).abs().max()) > 0.1


def test_a_saved_adapter_with_an_embedding_is_read_back_bit_for_bit(tmp_path):
    adapter = worn("llama", **ALL).adapter()
    write_adapter(adapter, tmp_path)
    back = read_adapter(tmp_path)
    assert back.id == adapter.id
    assert sorted(back.places, key=str) == sorted(adapter.places, key=str)
    assert all(torch.equal(t, adapter.tensors()[n]) for n, t in back.tensors().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_nf4_it_computes_what_it_does_on_the_dequantised_base(kind):
    quantised = Model(quantise_network(make_net(kind), Format("nf4", 32, True)))
    quantised.attach(Dora(rank=3, alpha=5))
    randomise(quantised)
    dense = make_net(kind)
    with torch.no_grad():
        for name, site in quantised.places.sites.items():
            w = quantised.places.weights[name].dense()
            dense.get_submodule(name).weight.copy_(w if site.kind == "linear" else w.T)
    plain = Model(dense)
    plain.attach(quantised.adapter())
    torch.testing.assert_close(quantised.logits(IDS), plain.logits(IDS), rtol=RTOL, atol=ATOL)


def test_two_of_them_add_up_as_the_sum_of_their_changes():
    model = worn("llama", targets=["q_proj", "up_proj"])
    model.attach(Dora(rank=2, alpha=3, targets=["up_proj"]), name="other", seed=4)
    randomise(model, "other")
    host = model.net.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(7))
    found = {}
    for use in (None, "default", "other", {"default": 1.0, "other": 0.5}):
        model.use(use)
        found[str(use)] = host(x)
    base, first, second, both = found.values()
    torch.testing.assert_close(both, base + (first - base) + 0.5 * (second - base), rtol=RTOL, atol=ATOL)
