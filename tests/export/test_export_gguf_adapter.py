"""A GGUF LoRA says what the adapter does, at every map, or nothing is written."""

from __future__ import annotations

import resource

import pytest
import torch
from made_exports import noisy, oracle, read, save_base, unpermuted

import deltaw
from deltaw.core.adapter import Replacement
from deltaw.errors import AdapterError, BadInput, BaseError, BaseMismatch, RunError, WorkFailed
from deltaw.methods import METHODS
from deltaw.methods.lora import Lora
from models import make_net

NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "c_attn": "attn_qkv", "attn.c_proj": "attn_output", "c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
SPECS = [
    Lora(rank=3, alpha=5),
    Lora(rank=3, alpha=5, rslora=True, rank_pattern={"q_proj": 7, "c_attn": 7}, alpha_pattern={}),
    Lora(rank=3, alpha=5, alpha_pattern={"0.*(up_proj|c_fc)": 11.0, "1.*": -0.7}),
    deltaw.Vera(rank=4),
]


def name_of(site: str) -> str:
    """llama.cpp's name, written down once more."""
    number = next(part for part in site.split(".") if part.isdigit())
    tail = next(gguf for ours, gguf in sorted(NAMES.items(), key=lambda i: -len(i[0])) if site.endswith(ours))
    return f"blk.{number}.{tail}.weight"


def spec_for(arch: str, spec):
    """The same settings without patterns that match nothing in this architecture."""
    if not isinstance(spec, Lora):
        return spec
    own = {k: v for k, v in spec.rank_pattern.items() if (k == "c_attn") == (arch == "gpt2")}
    return spec.model_copy(update={"rank_pattern": own})


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("spec", SPECS, ids=["lora", "rslora", "alphas", "vera"])
def test_export_gguf_adapter_adds_at_every_map_what_the_adapter_adds(arch, spec, tmp_path):
    base = save_base(tmp_path / "base", arch)
    adapter = noisy(base, spec_for(arch, spec))
    report = deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)
    settings, tensors = read(tmp_path / "a.gguf")
    assert (settings["general.type"], settings["adapter.type"]) == ("adapter", "lora")
    assert settings["general.architecture"] == {"mistral": "llama"}.get(arch, arch)
    assert settings["deltaw.adapter"] == adapter.id
    assert report.n_tensors == len(tensors) == 2 * len(adapter.sites)
    config = make_net(arch).config
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    for site, wanted in oracle(base, adapter).items():
        a, b = tensors[name_of(site) + ".lora_a"], tensors[name_of(site) + ".lora_b"]
        added = settings["adapter.lora.alpha"] / b.shape[1] * b @ a
        if arch in ("llama", "mistral") and site.endswith(tuple(heads)):
            added = unpermuted(added, heads[site.rpartition(".")[2]])
        torch.testing.assert_close(added, wanted, rtol=1e-5, atol=1e-6)


def test_export_gguf_adapter_leaves_factors_alone_where_one_alpha_serves_all(tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    adapter = noisy(base, Lora(rank=4, alpha=6, rslora=True))
    report = deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)
    _, tensors = read(tmp_path / "a.gguf")
    assert (report.alpha, report.n_folded) == (12.0, 0)
    for site, params in adapter.sites.items():
        assert torch.equal(tensors[name_of(site) + ".lora_b"], params["B"])


def test_export_gguf_adapter_turns_the_embeddings_factor_and_takes_the_head(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=("embed_tokens", "lm_head")))
    deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)
    _, tensors = read(tmp_path / "a.gguf")
    site = adapter.sites["model.embed_tokens"]
    assert torch.equal(tensors["token_embd.weight.lora_a"], site["A"].T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], site["B"])
    assert torch.equal(tensors["output.weight.lora_a"], adapter.sites["lm_head"]["A"])


def test_export_gguf_adapter_rounds_once(tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    adapter = noisy(base, Lora(rank=3, alpha=5))
    for dtype in ("float16", "bfloat16"):
        deltaw.export_gguf(base, tmp_path / f"{dtype}.gguf", adapter=adapter, dtype=dtype)
        _, tensors = read(tmp_path / f"{dtype}.gguf")
        for site, params in adapter.sites.items():
            wanted = params["A"].to(getattr(torch, dtype)).float()
            assert torch.equal(tensors[name_of(site) + ".lora_a"], wanted)


REFUSED = [
    (deltaw.Dora(rank=3, alpha=5), ["multiplies whole rows or columns, at 14 maps", "model.layers.0.self_attn.q_proj"]),
    (deltaw.Ia3(), ["multiplies whole rows or columns"]),
    (deltaw.Houlsby(), ["beside the halves of blocks"]),
    (deltaw.Prompt(n_tokens=3), ["in front of the sequence"]),
    (deltaw.PrefixTuning(n_tokens=3), ["in front of the sequence"]),
    (deltaw.BitFit(), ["biases are trained, at 14 maps"]),
    (Lora(rank=3, bias="lora_only"), ["biases are trained, at 14 maps"]),
    (Lora(rank=3, save_modules=("norm", "lm_head")), ["whole tensors are replaced", "lm_head.weight", "model.norm.w"]),
    (Lora(rank=3, new_tokens=("<new>",)), ["rows of tensors are replaced: ", "lm_head.weight", "<new>"]),
    (deltaw.LongLora(rank=3, max_positions=128), ["settings of the base are changed: max_position_embeddings",
                                                  "whole tensors are replaced: "]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "said"), REFUSED, ids=[f"{s.name}-{i}" for i, (s, _) in enumerate(REFUSED)])
def test_export_gguf_adapter_names_everything_that_the_format_cannot_say(spec, said, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    with pytest.raises(AdapterError) as caught:
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=noisy(base, spec))
    merge = "deltaw export gguf --merged" if spec.mergeable else "Nor can weights hold it: serve it with deltaw."
    for part in [*said, merge, "Nothing was written"]:
        assert part in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_export_gguf_adapter_has_an_answer_for_every_method():
    written = {"lora", "vera", "longlora"}
    assert {m.name for m in METHODS} - {"full"} == written | {s.name for s, _ in REFUSED} | {"ptuning"}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_export_gguf_adapter_refuses_one_side_of_a_tie(target, tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    adapter = noisy(base, Lora(rank=3, targets=(target, "q_proj")))
    with pytest.raises(AdapterError, match=f"{target}: embedding and head are one tensor"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)


def test_export_gguf_adapter_refuses_other_bases_architectures_and_taken_names(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=3))
    other = save_base(tmp_path / "other", "llama", initial=9)
    with pytest.raises(BaseMismatch):
        deltaw.export_gguf(other, tmp_path / "a.gguf", adapter=adapter)
    phi = save_base(tmp_path / "phi", "phi3")
    with pytest.raises(BaseError, match=r"architecture 'phi3'.*\n.*Known: llama, mistral"):
        deltaw.export_gguf(phi, tmp_path / "a.gguf", adapter=noisy(phi, Lora(rank=3)))
    with pytest.raises(BadInput, match="nothing to write"):
        deltaw.export_gguf(base, tmp_path / "a.gguf")
    with pytest.raises(BadInput, match=r"unknown dtype 'float31'.*float32"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter, dtype="float31")
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_export_gguf_adapter_names_tensors_that_llama_cpp_lacks(tmp_path):
    base = save_base(tmp_path / "base", "gpt2")
    adapter = noisy(base, Lora(rank=3, targets=("wpe", "c_attn")))
    with pytest.raises(AdapterError, match=r"adds no LoRA at transformer\.wpe"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)


def test_export_gguf_adapter_leaves_nothing_behind_when_it_fails(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=3))
    huge = noisy(base, Lora(rank=3, alpha=3e8, alpha_pattern={"q_proj": 3e15}))
    with pytest.raises(WorkFailed, match=r"lora_b: NaN or Inf in float16"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=huge, dtype="float16")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    try:
        with pytest.raises(WorkFailed, match=r"ulimit -f|No space"):
            deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_export_gguf_adapter_refuses_a_truncated_adapter(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    noisy(base, Lora(rank=3)).save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="truncated"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=tmp_path / "adapter")
    assert not (tmp_path / "a.gguf").exists()


def test_export_gguf_adapter_refuses_tensors_that_do_not_fit(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=3))
    odd = deltaw.Adapter(adapter.spec, adapter.sites, adapter.places, replaced=(Replacement("no.such", torch.ones(2)),))
    with pytest.warns(UserWarning, match="unknown"), pytest.raises(AdapterError, match=r"no\.such"):
        deltaw.export_gguf(base, tmp_path / "a.gguf", adapter=odd)
