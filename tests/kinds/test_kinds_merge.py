"""A merged classifier or encoder-decoder is a plain transformers folder with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_kinds import LABELS, VOCAB, make_tokenizer, save_base
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import deltaw
from deltaw.errors import NotMergeable
from deltaw.merge.bake import bake
from deltaw.methods import BitFit, Dora, Houlsby, Ia3, Prompt, Vera
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.store.peft import write_adapter
from models import make_ids, randomise

IDS, DECODER = make_ids(3, 9, VOCAB), make_ids(3, 6, VOCAB, seed=7)
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
# float32: W x + s B (A x) against (W + s B A) x through two blocks
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
METHODS = {
    "lora": deltaw.Lora(rank=3, alpha=5),
    "dora": Dora(rank=3, alpha=5),
    "ia3": Ia3(),
    "vera": Vera(rank=4, targets=("dense", "query")),
    "bitfit": BitFit(),
}


BIASLESS = ("t5", "bitfit")


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.logits(IDS, MASK, None if model.kind == "classify" else DECODER)


def plain_logits(folder: Path, kind: str) -> Tensor:
    """The folder as a user loads it, strictly."""
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForSequenceClassification
    net, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    more = {"decoder_input_ids": DECODER} if kind == "t5" else {}
    with torch.no_grad():
        return net.eval()(input_ids=IDS, attention_mask=MASK, **more).logits


def worn(kind: str, folder: Path, spec, format: str = "dense") -> Model:
    save_base(kind, folder)
    model = load_base(folder, format, labels=None if kind == "t5" else LABELS)
    model.attach(spec)
    randomise(model)
    return model


CASES = [(kind, name) for kind in ("bert", "masked", "encoder", "t5") for name in METHODS if (kind, name) != BIASLESS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_merged_folder_computes_the_same(kind, name, tmp_path):
    spec = METHODS[name]
    spec = Vera(rank=4, targets=("q", "wi")) if (kind, name) == ("t5", "vera") else spec
    model = worn(kind, tmp_path / "base", spec)
    bare = plain_logits(tmp_path / "base", kind) if kind in ("t5", "bert") else None
    wanted = logits(model)
    write_adapter(model.adapter(), tmp_path / "adapter")
    report = bake(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = plain_logits(tmp_path / "out", kind)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert bare is None or float((found - bare).abs().max()) > 0.05
    assert report.probe is not None
    assert report.probe.logit_max < 2e-5
    assert (report.probe.perplexity_before is None) == (kind != "t5")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if kind == "t5":
        assert config["architectures"] == ["T5ForConditionalGeneration"]
    else:
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert list(config["id2label"].values()) == LABELS
        again = load_base(tmp_path / "out")
        assert again.task.labels == tuple(LABELS)
        torch.testing.assert_close(logits(again), wanted, **CLOSE)


def test_a_t5_whose_head_changed_is_untied_and_scales_as_before(tmp_path):
    """T5 reads from tie_word_embeddings whether to scale what goes into its head: it must stay as it was."""
    model = worn("t5", tmp_path / "base", deltaw.Lora(rank=3, alpha=5, targets=("lm_head", "q")))
    report = bake(tmp_path / "base", model.adapter(), tmp_path / "out")
    assert report.untied
    torch.testing.assert_close(plain_logits(tmp_path / "out", "t5"), logits(model), **CLOSE)
    torch.testing.assert_close(logits(load_base(tmp_path / "out")), logits(model), **CLOSE)


def test_new_tokens_of_a_t5_train_and_merge(tmp_path):
    model = worn("t5", tmp_path / "base", deltaw.Lora(rank=3, alpha=5, new_tokens=("<new>",)))
    ids, decoder = IDS.clone(), DECODER.clone()
    ids[0, 3] = decoder[0, 2] = VOCAB
    with torch.no_grad():
        wanted = model.logits(ids, None, decoder)
    assert wanted.shape[-1] == VOCAB + 1
    write_adapter(model.adapter(), tmp_path / "adapter", model.tokenizer)
    again = load_base(tmp_path / "base")
    again.attach(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again.logits(ids, None, decoder), wanted, rtol=0, atol=0)
    bake(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_base(tmp_path / "out")
    assert merged.tokenizer.convert_tokens_to_ids("<new>") == VOCAB
    with torch.no_grad():  # the new row makes logits of order 5
        torch.testing.assert_close(merged.logits(ids, None, decoder), wanted, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("spec", [Houlsby(bottleneck=5), Prompt(n_tokens=3)])
@pytest.mark.parametrize("kind", ["masked", "t5"])
def test_what_no_weights_can_hold_is_refused(kind, spec, tmp_path):
    model = worn(kind, tmp_path / "base", spec)
    with pytest.raises(NotMergeable, match=f"method '{spec.name}' cannot be written"):
        bake(tmp_path / "base", model.adapter(), tmp_path / "out")


@pytest.mark.parametrize("kind", ["bert", "masked", "t5"])
def test_a_quantised_base_trains_and_merges(kind, tmp_path):
    model = worn(kind, tmp_path / "base", deltaw.Lora(rank=3, alpha=5), "int8")
    assert kind == "t5" or isinstance(model.places.modules["classifier"], torch.nn.Linear)  # the head stays dense
    write_adapter(model.adapter(), tmp_path / "adapter")
    again = load_base(tmp_path / "base", "int8", labels=None if kind == "t5" else LABELS)
    again.attach(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    bake(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", into="dequantised")
    torch.testing.assert_close(plain_logits(tmp_path / "out", kind), logits(model), rtol=1e-4, atol=1e-4)


def test_bfloat16_and_shards(tmp_path):
    model = worn("masked", tmp_path / "base", deltaw.Lora(rank=3, alpha=5))
    report = bake(tmp_path / "base", model.adapter(), tmp_path / "out", dtype="bfloat16", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert report.dtype == "bfloat16"
    assert make_tokenizer("bert")("w5")["input_ids"] == load_base(tmp_path / "out").tokenizer("w5")["input_ids"]
