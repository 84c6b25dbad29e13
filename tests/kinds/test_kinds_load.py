"""A folder's kind is found by itself; what cannot be what is asked is refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from made_kinds import BERT, LABELS, NAMED, T5, make_net, make_tokenizer, save_base
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

import deltaw
from deltaw.data.pack import collate
from deltaw.data.template import Example
from deltaw.errors import BaseError, DataError, SpecError, TargetError
from deltaw.model.base import labels_for, load_base, task_before
from deltaw.model.describe import describe_base
from deltaw.model.limits import max_positions, refuse_beyond
from deltaw.model.model import Model
from models import make_ids, randomise


def test_the_kind_follows_from_the_config(tmp_path):
    assert load_base(save_base("t5", tmp_path / "t5")).kind == "seq2seq"
    bert = load_base(save_base("bert", tmp_path / "bert"))
    assert (bert.kind, bert.task.labels) == ("classify", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert load_base(tmp_path / "bert", labels=LABELS).task.labels == tuple(LABELS)
    for kind in ("masked", "encoder"):
        assert load_base(save_base(kind, tmp_path / kind), labels=LABELS).kind == "classify"
    assert task_before(tmp_path / "t5", None).kind == "seq2seq"
    assert task_before(tmp_path / "bert", None) == bert.task


@pytest.mark.parametrize(
    ("kind", "said"),
    [("masked", r"masked language model \(BertForMaskedLM\)"), ("encoder", r"an encoder \(BertModel\)")],
)
def test_an_encoder_without_labels_is_refused(kind, said, tmp_path):
    save_base(kind, tmp_path)
    with pytest.raises(BaseError, match=rf"(?s){said}.*Give labels to classify with it: data\.labels"):
        load_base(tmp_path)
    with pytest.raises(DataError, match="at least two"):
        load_base(tmp_path, labels=["one"])
    with pytest.raises(DataError, match="twice"):
        load_base(tmp_path, labels=["one", "one "])


def test_labels_that_the_head_does_not_have_are_refused(tmp_path):
    save_base("bert", tmp_path / "bert", **NAMED)
    assert load_base(tmp_path / "bert").task.labels == tuple(LABELS)
    for other in (LABELS[::-1], ["yes", "no"]):
        with pytest.raises(BaseError, match=r"a head for 3 labels \(noun\.body"):
            load_base(tmp_path / "bert", labels=other)
    save_base("t5", tmp_path / "t5")
    with pytest.raises(BaseError, match=r"is an encoder-decoder .* cannot classify"):
        load_base(tmp_path / "t5", labels=LABELS)


@pytest.mark.parametrize("setting", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_a_head_that_does_not_choose_one_label_is_refused(setting, tmp_path):
    net = BertForSequenceClassification(BertConfig(**BERT, **{"num_labels": 3, **setting}))
    net.save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="does not choose one of several labels"):
        load_base(tmp_path)


def test_another_task_is_no_kind_that_loads(tmp_path):
    BertForTokenClassification(BertConfig(**BERT)).save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(BaseError):
        load_base(tmp_path)


def test_a_fresh_head_follows_the_seed_and_the_encoder_does_not(tmp_path):
    save_base("masked", tmp_path)
    one, same, other = (load_base(tmp_path, labels=LABELS, seed=s).net for s in (3, 3, 4))
    fresh = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert set(one.fresh_tensors) == fresh
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (name not in fresh or name.endswith("bias")), name
    std = float(one.classifier.weight.std())
    assert 0.01 < std < 0.03  # initializer_range


def test_a_damaged_encoder_is_refused_although_its_head_is_fresh(tmp_path):
    from safetensors.torch import load_file, save_file

    save_base("encoder", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"missing: bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load_base(tmp_path, labels=LABELS)
    tensors |= {"encoder.layer.1.output.dense.weight": gone, "encoder.layer.2.output.dense.weight": gone.clone()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"unknown: .*layer\.2\.output\.dense\.weight"):
        load_base(tmp_path, labels=LABELS)


def test_the_head_trains_beside_every_method_and_is_no_target(tmp_path):
    model = load_base(save_base("masked", tmp_path), labels=LABELS)
    model.attach(deltaw.Lora(rank=3, alpha=5))
    made = model.adapters["default"]
    assert set(made.swaps) == set(model.net.fresh_tensors)
    assert not any("classifier" in name or "pooler" in name for name in made.sites)
    model.detach()
    with pytest.raises(TargetError, match="leaves no place to train"):
        model.attach(deltaw.Lora(rank=3, targets=("classifier",)))


def test_an_adapter_brings_its_labels(tmp_path):
    save_base("encoder", tmp_path / "base")
    model = load_base(tmp_path / "base", labels=LABELS)
    model.attach(deltaw.Lora(rank=3, alpha=5))
    model.adapter().save(tmp_path / "adapter")
    assert labels_for(tmp_path / "base", tmp_path / "adapter", None) == LABELS
    assert labels_for(tmp_path / "base", None, LABELS) == LABELS
    assert labels_for(save_base("t5", tmp_path / "t5"), None, LABELS) is None  # they are for metric choice
    other = load_base(tmp_path / "base", labels=["a", "b", "c"])
    other.attach(tmp_path / "adapter")
    assert other.task.labels == tuple(LABELS)
    other.use(None)
    assert other.task.labels == ("a", "b", "c")


def test_a_causal_model_becomes_a_classifier_where_labels_are_given(tmp_path):
    config = LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    model = load_base(tmp_path, labels=LABELS)
    assert isinstance(model.net, LlamaForSequenceClassification)
    model.attach(deltaw.Lora(rank=3, alpha=5))
    randomise(model)
    assert list(model.adapters["default"].swaps) == ["score.weight"]
    texts = [make_ids(1, n, seed=n)[0].tolist() for n in (7, 3, 5)]
    batch = collate([Example((*t, 1), (False,) * len(t) + (True,), "") for t in texts])
    alone = torch.cat([model.logits(torch.tensor([t])) for t in texts])
    torch.testing.assert_close(model.pack_logits(batch), alone, rtol=0, atol=0)


def test_documents_beyond_an_encoders_positions_are_refused():
    bert = make_net("bert")
    assert max_positions(bert) == 24
    text = Example((5,) * 25 + (1,), (False,) * 25 + (True,), "rows line 7")
    refuse_beyond(bert, [Example(text.input_ids[1:], text.is_target[1:], "")])
    with pytest.raises(DataError, match=r"line 7: 25 tokens, and this base has 24 positions\. Set data\.max_tokens"):
        refuse_beyond(bert, [text])
    with pytest.raises(DataError, match="24 tokens behind 3 virtual tokens"):
        refuse_beyond(bert, [Example(text.input_ids[1:], text.is_target[1:], "")], before=3)
    assert max_positions(make_net("t5")) is None
    roberta = RobertaForMaskedLM(RobertaConfig(**{**BERT, "pad_token_id": 1, "max_position_embeddings": 26}))
    assert max_positions(roberta) == 24  # two rows stand for padding


def test_an_encoder_decoder_needs_what_its_decoder_reads():
    with pytest.raises(SpecError, match="decoder_input_ids"):
        Model(make_net("t5")).logits(make_ids(2, 5))
    with pytest.raises(DataError, match="decoder_input_ids, row 2: -100 is no token"):
        Model(make_net("t5")).logits(make_ids(2, 5), decoder_input_ids=torch.tensor([[0, 1], [0, -100]]))


def test_inspect_describes_every_kind(tmp_path):
    found = describe_base(str(save_base("t5", tmp_path / "t5", tie_word_embeddings=True)))
    assert (found["task"], found["architecture"], found["tied"]) == ("seq2seq", "T5ForConditionalGeneration", True)
    found = describe_base(str(save_base("bert", tmp_path / "bert")))
    assert (found["task"], found["labels"]) == ("classify", ["LABEL_0", "LABEL_1", "LABEL_2"])
    found = describe_base(str(save_base("masked", tmp_path / "masked")))
    assert found["task"] == "classify (with labels that you give)"
    assert "labels" not in found
    assert json.dumps(found)
    assert T5["d_model"] == 32


def test_an_embedding_that_is_never_called_is_no_target():
    model = Model(make_net("t5"))
    for spec in (deltaw.Lora(rank=3, targets=("shared", "q")), deltaw.Lora(rank=3, save_modules=("shared",))):
        with pytest.raises(
            TargetError, match=r"shared is never called .* encoder\.embed_tokens, decoder\.embed_tokens"
        ):
            model.attach(spec)
    ids, decoder = make_ids(2, 5), make_ids(2, 3, seed=6)
    bare = model.logits(ids, None, decoder)
    model.attach(deltaw.Lora(rank=3, alpha=5, targets=("encoder.embed_tokens",)))
    randomise(model)
    assert float((model.logits(ids, None, decoder) - bare).abs().max().detach()) > 1e-3


def test_labels_may_be_a_file(tmp_path):
    save_base("encoder", tmp_path / "base")
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    assert load_base(tmp_path / "base", labels=tmp_path / "labels.json").task.labels == tuple(LABELS)
    with pytest.raises(DataError, match="cannot be read"):
        load_base(tmp_path / "base", labels="yes,no")


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_quantised_folder_keeps_its_kind(kind, tmp_path):
    from deltaw.merge.quantise import quantise_base
    from deltaw.model.quantised import Format

    save_base(kind, tmp_path / "base")
    quantise_base(tmp_path / "base", tmp_path / "out", Format("int8"))
    kept, made = load_base(tmp_path / "out"), load_base(tmp_path / "base", "int8")
    ids, decoder = make_ids(2, 5), None if kind == "bert" else make_ids(2, 3, seed=6)
    assert kept.kind == made.kind
    torch.testing.assert_close(kept.logits(ids, None, decoder), made.logits(ids, None, decoder), rtol=0, atol=0)
