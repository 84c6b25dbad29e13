"""llama.cpp reads what we export and computes what we compute. It comes with the `peers` extra: `make test-all`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deltaw
from deltaw.data.source import read_rows
from deltaw.methods.lora import Lora
from deltaw.methods.vera import Vera

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "export")]

from made_exports import byte_bpe, noisy, save_base, sentencepiece_bpe  # noqa: E402

import bench_gguf  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = [3, 7, 11, 50, 60, 5]
ODD = [
    "12 345 6789", "a  b\n\n c \t d\r\n", "don't Don'T we'll", "caf\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c",
    "   ", "\n", "x\u00b2 \u00bd \u0663\u0664", "\U0001f600\U0001f3fd ok", "ends with spaces   ",
    "<|end|> between <|end|>", "a dog house here", "A.B,C;D:E!?", "__init__(self, x=1)",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
]  # fmt: skip
LORA = Lora(
    rank=3, alpha=5, rslora=True, rank_pattern={"0.mlp.(up_proj|c_fc)": 2}, alpha_pattern={"1.*(o_proj|c_proj)": 9}
)


def cut_off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


# llama.cpp looks GELU up in a table of 16-bit floats, which GPT-2 and Gemma show
@pytest.mark.parametrize(
    ("arch", "within"),
    [("llama", 1e-5), ("mistral", 1e-5), ("qwen2", 1e-5), ("qwen3", 1e-5), ("gemma", 1e-2), ("gpt2", 2e-3)],
)
def test_peer_llama_cpp_computes_bases_adapters_and_merged_models_as_we_do(arch, within, tmp_path):
    base = save_base(tmp_path / "base", arch)
    adapter = noisy(base, LORA)
    model = deltaw.load_base(base)
    ours = bench_gguf.our_logits(model, [IDS])[0]
    model.attach(adapter)
    changed = bench_gguf.our_logits(model, [IDS])[0]
    assert cut_off(ours, changed) > 0.2
    deltaw.export_gguf(base, tmp_path / "base.gguf", merged=True)
    deltaw.export_gguf(base, tmp_path / "lora.gguf", adapter=adapter)
    deltaw.export_gguf(base, tmp_path / "merged.gguf", adapter=adapter, merged=True)
    assert cut_off(ours, bench_gguf.llama_logits(tmp_path / "base.gguf", [IDS])[0]) < within
    assert cut_off(changed, bench_gguf.llama_logits(tmp_path / "merged.gguf", [IDS])[0]) < within
    beside = bench_gguf.llama_logits(tmp_path / "base.gguf", [IDS], tmp_path / "lora.gguf")[0]
    assert cut_off(changed, beside) < within


@pytest.mark.parametrize("spec", [Lora(rank=3, alpha=5, targets=("embed_tokens", "lm_head", "q_proj")), Vera(rank=4)])
def test_peer_llama_cpp_takes_embeddings_heads_and_shared_factors(spec, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, spec)
    model = deltaw.load_base(base)
    model.attach(adapter)
    changed = bench_gguf.our_logits(model, [IDS])[0]
    deltaw.export_gguf(base, tmp_path / "base.gguf", merged=True)
    deltaw.export_gguf(base, tmp_path / "lora.gguf", adapter=adapter)
    beside = bench_gguf.llama_logits(tmp_path / "base.gguf", [IDS], tmp_path / "lora.gguf")[0]
    assert cut_off(changed, beside) < 1e-5
    assert cut_off(changed, bench_gguf.llama_logits(tmp_path / "base.gguf", [IDS])[0]) > 0.1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_peer_llama_cpp_rescales_positions_as_transformers_does(rope, tmp_path):
    base = save_base(tmp_path / "base", "llama", rope_parameters={"rope_theta": 10000.0, **rope}, head_dim=32)
    plain = save_base(tmp_path / "plain", "llama", head_dim=32)
    ids = torch.arange(3, 51).tolist()
    ours = bench_gguf.our_logits(deltaw.load_base(base), [ids])[0]
    assert cut_off(ours, bench_gguf.our_logits(deltaw.load_base(plain), [ids])[0]) > 1e-2
    deltaw.export_gguf(base, tmp_path / "base.gguf", merged=True)
    assert cut_off(ours, bench_gguf.llama_logits(tmp_path / "base.gguf", [ids])[0]) < 1e-5


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "tekken"])
def test_peer_llama_cpp_cuts_text_as_the_tokenizer_does(kind, tmp_path):
    texts = [r.completion[:3000] for r in read_rows(ROOT / "data/ppl/wiki.jsonl")]
    tokenizer = byte_bpe(kind, 700, texts)
    base = save_base(tmp_path / "base", "llama", tokenizer)
    report = deltaw.export_gguf(base, tmp_path / "base.gguf", merged=True)
    assert report.tokenizer == f"gpt2/{kind}"
    texts = [*texts[:20], *ODD]
    assert bench_gguf.llama_tokens(tmp_path / "base.gguf", texts) == [tokenizer(t)["input_ids"] for t in texts]


@pytest.mark.parametrize("prefix", [True, False])
def test_peer_llama_cpp_merges_by_score_as_the_tokenizer_does_by_rank(prefix, tmp_path):
    tokenizer = sentencepiece_bpe(prefix)
    base = save_base(tmp_path / "base", "llama", tokenizer)
    report = deltaw.export_gguf(base, tmp_path / "base.gguf", merged=True)
    assert report.tokenizer == "llama/default"
    texts = ["the cat", "the hat on the mat that the cat sat on", "tthe  cathe", "\u00e9 the", *ODD[:9]]
    assert bench_gguf.llama_tokens(tmp_path / "base.gguf", texts) == [tokenizer(t)["input_ids"] for t in texts]


@pytest.mark.starter
def test_peer_llama_cpp_changes_the_starters_logits_by_as_much_as_we_do(tmp_path):
    found, other = bench_gguf.compare("smollm2-135m-instruct", tmp_path, ["lora", "rslora", "mixed alpha"])
    assert other == 0
    assert found.pop("base")["top1"] >= 0.99
    for name, figures in found.items():
        assert figures["moved"] > 0.5, name
        assert figures["top1"] >= 0.99, (name, figures)
        assert abs(figures["slope"] - 1) <= 0.01, (name, figures)
