"""What a server reads from the exported folder, r, lora_alpha and tensors, is what the adapter does."""

from __future__ import annotations

import json

import pytest
import torch
from made_exports import noisy, oracle, save_base
from safetensors.torch import load_file

import deltaw
from deltaw.errors import AdapterError, BadInput, BaseMismatch, RunError
from deltaw.methods.lora import Lora

SPECS = [
    (Lora(rank=3, alpha=5), 3, 5),
    (Lora(rank=4, alpha=3, rslora=True), 4, 6),
    (Lora(rank=3, alpha=4, rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"1.*": -0.7}), 7, 7),
    (deltaw.Vera(rank=4), 4, 4),
]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(("spec", "rank", "alpha"), SPECS, ids=["lora", "rslora", "mixed", "vera"])
def test_export_vllm_says_everything_by_one_rank_and_one_alpha(arch, spec, rank, alpha, tmp_path):
    base = save_base(tmp_path / "base", arch)
    adapter = noisy(base, spec)
    report = deltaw.export_vllm(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], type(config["lora_alpha"])) == (rank, alpha, int)
    assert not any(
        config.get(k) for k in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    )
    assert config["bias"] == "none"
    assert set(config["target_modules"]) == {p.role for p in adapter.places}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(adapter.sites) == report.n_tensors
    for site, wanted in oracle(base, adapter).items():
        a = tensors[f"base_model.model.{site}.lora_A.weight"]
        b = tensors[f"base_model.model.{site}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == rank
        torch.testing.assert_close(alpha / rank * b @ a, wanted, rtol=1e-5, atol=1e-6)


def test_export_vllm_says_which_rank_the_server_needs(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=9))
    assert deltaw.export_vllm(base, adapter, tmp_path / "out").max_lora_rank == 16
    assert deltaw.export_vllm(base, adapter, tmp_path / "other", max_rank=64).rank == 9
    with pytest.raises(AdapterError, match=r"rank 9 at model.*the most is 8; .*deltaw compress --rank 8"):
        deltaw.export_vllm(base, adapter, tmp_path / "more", max_rank=8)
    with pytest.raises(BadInput, match="takes no --max-lora-rank 10: it is one of 1, 8, 16"):
        deltaw.export_vllm(base, adapter, tmp_path / "more", max_rank=10)
    assert not (tmp_path / "more").exists()


REFUSED = [
    ("llama", deltaw.Dora(rank=3), "multiplies whole rows or columns"),
    ("llama", deltaw.Ia3(), "multiplies whole rows or columns"),
    ("llama", deltaw.Houlsby(), "works beside the halves of blocks"),
    ("llama", deltaw.PrefixTuning(n_tokens=3), "works in front of the sequence"),
    ("llama", Lora(rank=3, bias="lora_only"), "biases are trained, at 14 maps"),
    ("llama", Lora(rank=3, save_modules=("lm_head",)), "whole tensors are replaced: lm_head.weight"),
    ("llama", Lora(rank=3, new_tokens=("<new>",)), "rows of tensors are replaced"),
    (
        "llama",
        Lora(rank=3, targets=("embed_tokens", "q_proj", "lm_head")),
        "model.embed_tokens, lm_head: adapters",
    ),
    ("gpt2", Lora(rank=3), "architecture 'gpt2' is not among"),
]


@pytest.mark.parametrize(("arch", "spec", "said"), REFUSED, ids=[s for _, _, s in REFUSED])
def test_export_vllm_names_what_servers_do_not_load(arch, spec, said, tmp_path):
    base = save_base(tmp_path / "base", arch)
    with pytest.raises(AdapterError) as caught:
        deltaw.export_vllm(base, noisy(base, spec), tmp_path / "out")
    merge = (
        "Or serve a whole model: deltaw merge" if spec.mergeable else "Nor can weights hold it: serve it with deltaw."
    )
    for part in (said, merge, "Nothing was written"):
        assert part in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_export_vllm_names_every_reason_at_once(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    spec = deltaw.Dora(rank=9, bias="lora_only", save_modules=("norm",), targets=("q_proj", "lm_head"))
    with pytest.raises(AdapterError) as caught:
        deltaw.export_vllm(base, noisy(base, spec), tmp_path / "out", max_rank=8)
    assert str(caught.value).count("\n  - ") == 5


def test_export_vllm_wants_the_adapters_base_and_a_free_place(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=3))
    other = save_base(tmp_path / "other", "llama", initial=9)
    with pytest.raises(BaseMismatch):
        deltaw.export_vllm(other, adapter, tmp_path / "out")
    with pytest.warns(UserWarning, match="differs"):
        deltaw.export_vllm(other, adapter, tmp_path / "out", allow_other_base=True)
    with pytest.raises(RunError, match="is there already"):
        deltaw.export_vllm(base, adapter, tmp_path / "out")
