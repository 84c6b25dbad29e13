"""Bottleneck adapters stand where the papers put them: compared with hooks on transformers' own modules."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from made_runs import trained_and_inspected
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaw import Houlsby, Lora
from deltaw.core.fingerprint import set_cache_dir
from deltaw.core.site import find_blocks
from deltaw.data.template import Example
from deltaw.errors import AdapterError, NotMergeable, SpecError, TargetError
from deltaw.merge.bake import bake
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.model.sites import find_sites
from deltaw.store.peft import read_adapter, write_adapter
from deltaw.train.loss import sft
from deltaw.train.step import step_gradient
from models import ARCHITECTURES, make_ids, make_net, randomise
from train.tiny_runs import save_base

IDS = make_ids()
ATOL = RTOL = 1e-5  # float32 sums through two blocks, in the same order; logits of order 1 to 5
WIDE = {"hidden_size": 768, "intermediate_size": 832}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh
}  # fmt: skip
EXITS = {  # of attention and of the feed-forward
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), ("self_attn.o_proj", "mlp.down_proj")),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


def blocks(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The two transformer blocks of a causal model, by path."""
    stack, layers = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    return [(f"{stack}.{n}", block) for n, block in layers.named_children()]


class Oracle:
    """transformers' own network with small networks hooked behind or beside its attention and feed-forward modules."""

    def __init__(self, kind: str, spec: Houlsby, sites: dict[str, dict[str, Tensor]]) -> None:
        self.net = make_net(kind)
        self.spec = spec
        self.leaves = {n: {p: t.detach().clone().requires_grad_() for p, t in ps.items()} for n, ps in sites.items()}
        attention, ffn = EXITS[kind]
        placed = set()
        for path, block in blocks(self.net):
            halves = {f"{path}.{ffn}": self._ffn(block)}
            if spec.placement == "houlsby":
                halves[f"{path}.{attention}"] = (block.get_submodule(attention.split(".")[0]), None)
            for name, (module, first) in halves.items():
                self._hook(self.leaves[name], module, first)
                placed.add(name)
        assert placed == set(sites)

    @staticmethod
    def _ffn(block: nn.Module) -> tuple[nn.Module, nn.Module | None]:
        return (block.mlp, None) if hasattr(block, "mlp") else (block.fc2, block.fc1)  # OPT has no such module

    def _hook(self, p: dict[str, Tensor], module: nn.Module, first: nn.Module | None) -> None:
        heard: list[Tensor] = []
        if first is not None:
            first.register_forward_pre_hook(lambda _, args: heard.append(args[0]))

        def behind(_: nn.Module, args: tuple, kwargs: dict, out: object) -> object:
            h = out[0] if isinstance(out, tuple) else out
            u = heard.pop() if heard else args[0] if args else kwargs["hidden_states"]
            x = u if self.spec.placement == "parallel" else h
            inner = ACTS[self.spec.act](x @ p["down"].T + p["down_bias"])
            y = h + self.spec.scale * (inner @ p["up"].T + p["up_bias"])
            return (y, *out[1:]) if isinstance(out, tuple) else y

        module.register_forward_hook(behind, with_kwargs=True)


def pair(kind: str, **settings: object) -> tuple[Model, Oracle]:
    model = Model(make_net(kind))
    model.attach(Houlsby(**{"bottleneck": 5, "act": "silu", "scale": 0.7, **settings}))
    randomise(model)
    made = model.adapters["default"]
    return model, Oracle(kind, made.spec, made.sites)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_hooks_on_transformers_own_modules(kind, placement):
    model, oracle = pair(kind, placement=placement)
    with torch.no_grad():
        base = make_net(kind)(IDS).logits
    labels, all_logits = make_ids(seed=6), []
    for logits in (oracle.net(IDS).logits, model.logits(IDS)):
        all_logits.append(logits.detach())
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(*reversed(all_logits), rtol=RTOL, atol=ATOL)
    assert float((all_logits[0] - base).abs().max()) > 0.1
    for name, value in model.trainable().items():
        site, _, part = name.partition(":")
        wanted = oracle.leaves[site][part].grad
        assert bool(wanted.any())
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(value.grad, wanted, rtol=0, atol=ATOL * scale)  # sums over 22 tokens
    assert model.run.heard == {}


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_is_the_one_that_it_is_called(act):
    model, oracle = pair("llama", act=act, scale=-1.5)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), oracle.net(IDS).logits, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "nf4"])
def test_it_starts_at_the_base_bit_for_bit(kind, dtype, placement):
    wide = {"n_embd": 768, "n_inner": 832} if kind == "gpt2" else WIDE
    net = make_net("llama" if kind == "nf4" else kind, dtype=dtype, **wide)
    model = Model(quantise_network(net, Format("nf4", 64, True)) if kind == "nf4" else net)
    with torch.no_grad():
        base = model.logits(IDS)
        model.attach(Houlsby(bottleneck=5, placement=placement))
        assert torch.equal(model.logits(IDS), base)
        made = model.adapters["default"].tensors()
        assert all(bool(t.any()) == n.endswith(":down") for n, t in made.items())
        down = torch.cat([t.flatten() for n, t in made.items() if n.endswith(":down")])
        assert float(down.std()) == pytest.approx(0.01, rel=0.05)
        randomise(model)
        assert not torch.equal(model.logits(IDS), base)


# Where halves end -----------------------------------------------------------------------------------------------------


def found(net: nn.Module) -> dict[str, tuple[str, str]]:
    return {b.name: (b.entry, b.part) for b in find_blocks(find_sites(net).values()).values()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_half_ends_where_the_residual_sum_begins(kind):
    net = make_net(kind)
    attention, ffn = EXITS[kind]
    wanted = {f"{path}.{attention}": "attention" for path, _ in blocks(net)}
    wanted |= {f"{path}.{ffn}": "ffn" for path, _ in blocks(net)}
    halves = find_blocks(find_sites(net).values())
    assert {b.name: b.part for b in halves.values()} == wanted
    for half in halves.values():
        assert half.width == 32
        assert half.name.startswith(blocks(net)[half.layer][0] + ".")


def test_halves_of_encoders_and_cross_attention():
    sizes = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertLMHeadModel(BertConfig(**sizes, intermediate_size=40, is_decoder=True, add_cross_attention=True))
    layer = "bert.encoder.layer.0"
    assert found(bert) == {
        f"{layer}.attention.output.dense": (f"{layer}.attention.self.query", "attention"),
        f"{layer}.crossattention.output.dense": (f"{layer}.crossattention.self.query", "attention"),
        f"{layer}.output.dense": (f"{layer}.intermediate.dense", "ffn"),
    }
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=53, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    )
    own = {"SelfAttention": ("o", "q", "attention"), "EncDecAttention": ("o", "q", "attention")}
    own["DenseReluDense"] = ("wo", "wi_0", "ffn")
    wanted = {}
    for stack, parts in {"encoder": (0, 2), "decoder": (0, 1, 2)}.items():
        for i, key in enumerate(list(own)[p] for p in parts):
            path, (last, first, part) = f"{stack}.block.0.layer.{i}.{key}", own[key]
            wanted[f"{path}.{last}"] = (f"{path}.{first}", part)
    assert found(t5) == wanted
    stack = {"layers": 1, "ffn_dim": 40, "attention_heads": 4}
    both = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in stack.items()}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=53, d_model=32, **both))
    ends = {n.removeprefix("model.").replace(".layers.0", "") for n in found(bart)}
    assert ends == {"encoder.self_attn.out_proj", "encoder.fc2", "decoder.fc2"} | {
        f"decoder.{a}_attn.out_proj" for a in ("self", "encoder")
    }


def test_a_last_map_that_is_defined_first_is_found_by_its_name():
    sizes = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "pad_token_id": 0}
    phi3 = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2))
    layer = "model.layers.0"
    assert next(m for m, _ in phi3.model.layers[0].self_attn.named_children()) == "o_proj"
    assert found(phi3) == {
        f"{layer}.self_attn.o_proj": (f"{layer}.self_attn.qkv_proj", "attention"),
        f"{layer}.mlp.down_proj": (f"{layer}.mlp.gate_up_proj", "ffn"),
    }


# Several, and none ----------------------------------------------------------------------------------------------------


def halves_output(model: Model, use: object, x: Tensor) -> Tensor:
    model.use(use)
    return model.net.model.layers[0].mlp(x).detach()


@pytest.mark.parametrize("second", ["parallel", "pfeiffer", "lora"])
@pytest.mark.parametrize("first", ["parallel", "houlsby"])
def test_a_set_is_the_base_and_the_weighted_sum_of_its_deltas(first, second):
    model = Model(make_net("llama"))
    lora = Lora(rank=3, alpha=5, targets=("down_proj",))
    model.attach(Houlsby(bottleneck=5, placement=first, act="gelu"), "one")
    model.attach(lora if second == "lora" else Houlsby(bottleneck=3, placement=second), "two")
    randomise(model, "one", 1)
    randomise(model, "two", 2)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    base, one, two = (halves_output(model, use, x) for use in (None, "one", "two"))
    both = halves_output(model, {"one": 0.5, "two": -2.0}, x)
    assert min(float((t - base).abs().max()) for t in (one, two)) > 0.1
    torch.testing.assert_close(both, base + 0.5 * (one - base) - 2 * (two - base), rtol=RTOL, atol=ATOL)
    assert model.run.heard == {}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_detach_gives_back_modules_and_bits(placement):
    net = make_net("gpt2")
    before = {n: id(m) for n, m in net.named_modules()}
    model = Model(net)
    base = model.logits(IDS)
    model.attach(Houlsby(bottleneck=5, placement=placement))
    model.attach(Lora(rank=3, alpha=5), "other")
    randomise(model, "default")
    model.detach("other")
    model.use("default")
    assert not torch.equal(model.logits(IDS), base)
    model.detach()
    assert {n: id(m) for n, m in net.named_modules()} == before
    assert torch.equal(model.logits(IDS), base)
    assert all(not p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointing_gives_the_same_gradients_and_keeps_no_input(kind, placement):
    rows = [Example(tuple(range(5, 16)), (False,) * 4 + (True,) * 7, "one")]
    rows.append(Example((8, 3, 21, 2), (False, True, True, True), "two"))
    grads = []
    for checkpointing in (False, True):
        model, _ = pair(kind, placement=placement)
        step_gradient(model, rows, sft, checkpointing=checkpointing)
        grads.append({n: t.grad for n, t in model.trainable().items()})
        assert model.run.heard == {}
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-6, atol=1e-6)  # the same sums again
        assert bool(value.any())


# Settings and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bottleneck": 0}, r"bottleneck: must be at least 1 \(got 0\)"),
        ({"scale": 0.0}, "scale: must be a finite number other than 0"),
        ({"scale": float("nan")}, "scale: must be a finite number"),
        ({"act": "swish"}, r"Houlsby\.act"),
        ({"placement": "serial"}, r"Houlsby\.placement"),
        ({"dropout": 0.1}, "unknown setting 'dropout'"),
        ({"targets": ("q_proj",)}, "does not sit at linear maps: remove targets"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, said):
    with pytest.raises(SpecError, match=said):
        Houlsby(**settings)


def test_layers_and_exclude_narrow_it():
    model = Model(make_net("opt"))
    model.attach(Houlsby(bottleneck=5, layers=[1], exclude=("fc2",)))
    assert list(model.adapters["default"].sites) == ["model.decoder.layers.1.self_attn.out_proj"]
    with pytest.raises(TargetError, match=r"layers: \[2\] not among the targeted blocks"):
        model.attach(Houlsby(layers=[2]), "two")


@pytest.mark.parametrize("settings", [{"placement": p} for p in PLACEMENTS] + [{"layers": [1], "exclude": ["fc2"]}])
def test_its_file_is_read_back_with_and_without_ours(settings, tmp_path):
    model = Model(make_net("opt"))
    model.attach(Houlsby(bottleneck=5, act="tanh", scale=1.5, **settings))
    randomise(model)
    write_adapter(model.adapter(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    spec = model.adapters["default"].spec
    wanted = {
        "peft_type": "BOTTLENECK", "bottleneck_size": 5, "non_linearity": spec.act, "scaling": spec.scale,
        "use_parallel_adapter": spec.placement == "parallel", "use_adapterp": spec.placement == "pfeiffer",
    }  # fmt: skip
    assert {k: config[k] for k in wanted} == wanted
    file = load_file(tmp_path / "adapter_model.safetensors")
    ends = {"down": "adapter_down.weight", "down_bias": "adapter_down.bias"}
    ends |= {"up": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    for name, value in model.trainable().items():
        site, _, part = name.partition(":")
        assert torch.equal(file.pop(f"base_model.model.{site}.{ends[part]}"), value.detach())
    assert not file
    for _ in range(2):
        again = Model(make_net("opt"))
        again.attach(tmp_path)
        assert again.adapters["default"].spec == spec
        with torch.no_grad():
            assert torch.equal(again.logits(IDS), model.logits(IDS))
        (tmp_path / "deltaw.json").unlink(missing_ok=True)  # then as a foreign file


def test_files_that_say_something_else_are_refused(tmp_path):
    model, _ = pair("llama", placement="pfeiffer")
    write_adapter(model.adapter(), tmp_path)
    (tmp_path / "deltaw.json").unlink()
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "target_modules": ["gate_proj", "up_proj", "down_proj"]}))
    with pytest.raises(AdapterError, match="the LLM-Adapters fork's own, whose adapters have no biases"):
        read_adapter(tmp_path)
    path.write_text(json.dumps({**plain, "use_parallel_adapter": True}))
    with pytest.raises(AdapterError, match="only one can hold"):
        read_adapter(tmp_path)
    path.write_text(json.dumps({**plain, "use_adapterp": False}))
    with pytest.raises(AdapterError, match=r"no tensors for .*o_proj"):
        Model(make_net("llama")).attach(tmp_path)
    path.write_text(json.dumps({**plain, "scaling": "learned"}))
    with pytest.raises(AdapterError, match=r"Houlsby\.scale"):
        read_adapter(tmp_path)


@pytest.mark.parity
def test_peft_refuses_the_folder_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = pair("opt")
    write_adapter(model.adapter(), tmp_path)
    with pytest.raises((KeyError, ValueError), match="BOTTLENECK"):
        peft.PeftModel.from_pretrained(make_net("opt"), tmp_path)
    assert "HF PEFT" not in (tmp_path / "README.md").read_text()


def test_a_merge_is_refused_by_name(tmp_path):
    folder = save_base(tmp_path / "base")
    model = load_base(folder)
    model.attach(Houlsby(bottleneck=5))
    with pytest.raises(NotMergeable, match="The change of method 'houlsby' cannot be written into a base's weights"):
        bake(folder, model.adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("placement", "n"), [("houlsby", 4), ("pfeiffer", 2), ("parallel", 2)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_recipe_trains_it_and_inspect_and_plan_say_what_it_is(kind, placement, n, tmp_path):
    settings = {"method": "houlsby", "bottleneck": 5, "placement": placement}
    losses, told, counts = trained_and_inspected(tmp_path, settings, kind, lr=0.02)
    assert losses[-1] < losses[0] - 0.5
    assert told["method"] == "houlsby"
    assert told["n_parameters"] == counts.trainable == n * (2 * 5 * 32 + 5 + 32)
    assert counts.adapter == counts.stored == counts.gradients == 4 * counts.trainable
    assert {p["role"]: p["count"] for p in told["places"]} == ({"attention": 2} if n == 4 else {}) | {"ffn": 2}
