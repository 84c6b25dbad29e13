"""Other encoders and encoder-decoders than BERT and T5: what they share, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from made_kinds import BERT, LABELS, VOCAB, labelled, make_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import deltaw
from deltaw.data import DataSpec, collate, encode_all, read_rows
from deltaw.data.task import Task
from deltaw.data.template import Example
from deltaw.errors import AdapterError
from deltaw.merge.bake import bake
from deltaw.methods import BitFit, Houlsby, Ia3, LongLora, PrefixTuning, Prompt
from deltaw.model.base import load_base
from deltaw.model.calibrate import input_directions
from deltaw.model.model import Model
from models import make_ids, randomise

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, two blocks
SIZES = {**BERT, "pad_token_id": 1, "max_position_embeddings": 26, "bos_token_id": 0, "eos_token_id": 2}
ENCODERS = {
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=24)
    ),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**BERT, embedding_size=16)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**{**SIZES, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, local_attention=6)
    ),
}
DECODERS = {
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=36, max_position_embeddings=24,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    ),
    "mt5": lambda: MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=VOCAB, d_model=32, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4,
            relative_attention_num_buckets=6, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )
    ),
}  # fmt: skip


def made(make) -> PreTrainedModel:
    torch.manual_seed(3)
    net = make().eval()
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=rng))
    return net


def encoder(kind: str, folder) -> Model:
    made(ENCODERS[kind]).save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    return load_base(folder, labels=LABELS)


SPECS = {
    "lora": deltaw.Lora(rank=3, alpha=5),
    "houlsby": Houlsby(bottleneck=5),
    "prompt": Prompt(n_tokens=3),
    "ia3": Ia3(),
    "bitfit": BitFit(),
}
# ModernBERT has no biases, and its maps have names that "auto" does not know
CASES = [(kind, name) for kind in ENCODERS for name in SPECS if kind != "modernbert" or name not in ("ia3", "bitfit")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_encoders_classify_packs_as_single_texts_and_merge(kind, name, tmp_path):
    spec = SPECS[name]
    model = encoder(kind, tmp_path / "base")
    bare = set(model.net.fresh_tensors)
    assert any("classifier" in name for name in bare)
    model.attach(spec)
    randomise(model)
    assert set(model.adapters["default"].swaps) >= bare
    examples = encode_all(read_rows(labelled()[:6]), model.tokenizer, DataSpec(), model.task).examples
    with torch.no_grad():
        together = model.pack_logits(collate(examples))
        alone = torch.cat([model.logits(torch.tensor([e.input_ids[:-1]])) for e in examples])
    torch.testing.assert_close(together, alone, **CLOSE)
    if not type(spec).mergeable:
        return
    bake(tmp_path / "base", model.adapter(), tmp_path / "out")
    ids = torch.tensor([examples[0].input_ids[:-1]])
    with torch.no_grad():
        torch.testing.assert_close(load_base(tmp_path / "out").logits(ids), alone[:1], **CLOSE)


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_a_prefix_stands_in_front_of_encoders_that_read_a_cache(kind, tmp_path):
    model = encoder(kind, tmp_path)
    ids = make_ids(2, 7, VOCAB).clamp(min=3)
    bare = model.logits(ids)
    model.attach(PrefixTuning(n_tokens=3, projection=False))
    randomise(model, size=0.7)
    assert float((model.logits(ids) - bare).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("kind", ["distilbert", "modernbert"])
def test_a_prefix_is_refused_by_name_where_no_cache_is_read(kind, tmp_path):
    model = encoder(kind, tmp_path)
    model.attach(PrefixTuning(n_tokens=3, projection=False))
    with pytest.raises(AdapterError, match=r"does not read keys and values in front of its layer 0.*'prompt'"):
        model.logits(make_ids(2, 7, VOCAB))


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("kind", DECODERS)
def test_encoder_decoders_equal_peft(kind, method, tmp_path):
    configs = {
        "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM", num_layers=3),
    }
    if (kind, method) == ("mt5", "prefix"):
        configs["prefix"] = lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM", num_layers=3, token_dim=24
        )
    torch.manual_seed(5)
    # in float64: random logits are of order 20 here, where float32 leaves 1e-4
    theirs = peft.get_peft_model(made(DECODERS[kind]).double(), configs[method]()).double().eval()
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(6)))
    theirs.save_pretrained(tmp_path)
    ids, decoder = make_ids(2, 9, VOCAB).clamp(min=3), make_ids(2, 6, VOCAB, seed=7).clamp(min=3)
    ours = Model(made(DECODERS[kind]).double())
    ours.attach(tmp_path)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder).logits
        torch.testing.assert_close(ours.logits(ids, None, decoder), wanted, rtol=1e-9, atol=1e-9)


def test_attention_that_is_cut_is_refused(tmp_path):
    model = encoder("roberta", tmp_path)
    with pytest.raises(AdapterError, match="'longlora' cuts causal attention, and this base is a text classifier"):
        model.attach(LongLora())


def test_padding_does_not_count_where_a_start_looks_at_the_rows(tmp_path):
    model = encoder("roberta", tmp_path)
    spec = deltaw.Lora(rank=2, start="eva", targets=("query",))
    texts = [make_ids(1, n, VOCAB, seed=n)[0].clamp(min=3).tolist() for n in (9, 3, 5)]
    examples = [Example((*t, 1), (False,) * len(t) + (True,), "") for t in texts]
    model.attach(spec, calibration=[collate(examples)])
    made_ = model.adapters["default"]
    name = next(iter(made_.sites))
    model.detach()
    wanted = input_directions(model, [model.places.sites[name]], [collate([e]) for e in examples], 2)[name]
    assert Task("classify", tuple(LABELS)) == model.task
    torch.testing.assert_close(
        (made_.sites[name]["A"].detach() @ wanted.T).abs() > 1e-3, torch.eye(2, dtype=torch.bool)
    )
