"""VeRA is PEFT's, both ways, and what the paper says."""

from __future__ import annotations

import pytest
import torch

from deltaw import Vera
from deltaw.errors import AdapterError, SpecError
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter, write_adapter
from models import make_ids, make_net, randomise

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

IDS = make_ids()
ATOL = 1e-5  # float32: PEFT scales by d and b at another place; logits of order 1 to 5


def theirs(net, **settings: object):
    """PEFT's model with noise in both vectors of every map."""
    config = peft.VeraConfig(**{"r": 7, "d_initial": 0.2, "target_modules": "all-linear", **settings})
    made = peft.get_peft_model(net, config)
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in (p for p in made.parameters() if p.requires_grad):
            value += 0.3 * torch.randn(value.shape, generator=rng)
    return made.eval()


@pytest.mark.parametrize("save_projection", [True, False])
def test_pefts_file_gives_pefts_logits_and_back(net, request, save_projection, tmp_path):
    kind = request.node.callspec.params["net"]
    made = theirs(net, fan_in_fan_out=kind == "gpt2", save_projection=save_projection)
    made.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = made(input_ids=IDS).logits
    ours = Model(make_net(kind))
    base = ours.logits(IDS)
    ours.attach(tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(IDS), wanted, rtol=ATOL, atol=ATOL)
    assert float((wanted - base).abs().max()) > 0.1
    write_adapter(ours.adapter(), tmp_path / "ours")
    assert bool(read_adapter(tmp_path / "ours").shared) == save_projection
    back = peft.PeftModel.from_pretrained(make_net(kind), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=IDS).logits, wanted, rtol=ATOL, atol=ATOL)


def test_a_fresh_one_has_pefts_factors_and_gradients():
    net = make_net("llama")
    made = peft.get_peft_model(net, peft.VeraConfig(r=7, d_initial=0.2, target_modules="all-linear"))
    ours = Model(make_net("llama"))
    ours.attach(Vera(rank=7, d_initial=0.2))
    shared = ours.adapters["default"].shared
    assert torch.equal(shared["A0"], made.base_model.vera_A["default"])
    assert torch.equal(shared["B0"], made.base_model.vera_B["default"])
    randomise(ours)
    names = {"vera_lambda_d": "d", "vera_lambda_b": "b"}
    pairs = {}
    for name, value in made.named_parameters():
        if value.requires_grad:
            site, _, part = name.removeprefix("base_model.model.").removesuffix(".default").rpartition(".")
            pairs[f"{site}:{names[part]}"] = value
            with torch.no_grad():
                value.copy_(ours.adapters["default"].sites[site][names[part]])
    for logits in (made(input_ids=IDS).logits, ours.logits(IDS)):
        logits.logsumexp(-1).sum().backward()
    assert set(pairs) == set(ours.trainable())
    for name, value in ours.trainable().items():
        assert bool(value.grad.any())
        scale = max(1.0, float(value.grad.abs().max()))
        torch.testing.assert_close(value.grad, pairs[name].grad, rtol=0, atol=2e-5 * scale)  # sums over 22 tokens


def test_it_trains_r_plus_out_numbers_a_map_and_saves_no_factors_unless_asked():
    model = Model(make_net("llama"))
    model.attach(Vera(rank=7, save_projection=False))
    wanted = sum(7 + model.places.sites[name].out_features for name in model.adapters["default"].sites)
    assert sum(t.numel() for t in model.trainable().values()) == wanted
    assert model.adapter().n_parameters == wanted
    model.detach()
    model.attach(Vera(rank=7))
    assert model.adapter().n_parameters == wanted + 7 * (40 + 40)  # the widest map takes 40 and another gives 40


def test_other_seeds_give_other_factors_and_bad_settings_are_refused(tmp_path):
    sites = list(Model(make_net("llama")).places.sites.values())[1:3]
    rng = torch.Generator()
    first, again, other = (Vera(rank=3, projection_seed=s).init_shared(sites, rng)["A0"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for bad in ({"rank": 0}, {"dropout": 1.0}, {"d_initial": 0.0}, {"alpha": 3}):
        with pytest.raises(SpecError):
            Vera(**bad)
    with pytest.raises(AdapterError, match="bias='all'"):
        Vera.from_peft({"peft_type": "VERA", "bias": "all", "target_modules": ["q_proj"]})
