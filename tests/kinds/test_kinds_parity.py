"""HF PEFT and we compute the same with encoders that classify (SEQ_CLS) and encoder-decoders (SEQ_2_SEQ_LM)."""

from __future__ import annotations

import json

import pytest
import torch
from made_kinds import BERT, VOCAB, make_net
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import deltaw
from deltaw.methods import Dora, Ia3, PrefixTuning, Prompt, PTuning, Vera
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter, write_adapter
from models import make_ids, randomise

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:for MLP, the argument `encoder_num_layers` is ignored:UserWarning"),
]

IDS = make_ids(3, 9, VOCAB)
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
DECODER = make_ids(3, 6, VOCAB, seed=7)
# float32: the same operations in another order through two blocks; the promise is 1e-5
ATOL = RTOL = 1e-5
N = 5
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
QV = {"bert": ["query", "value"], "t5": ["q", "v"]}

CONFIGS = {
    "lora": lambda kind, **t: peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **t),
    "lora as PEFT chooses": lambda kind, **t: peft.LoraConfig(r=3, lora_alpha=5, **t),
    "dora": lambda kind, **t: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=QV[kind], **t),
    "ia3": lambda kind, **t: peft.IA3Config(**t),
    "vera": lambda kind, **t: peft.VeraConfig(r=4, target_modules=QV[kind], **t),
    "prompt": lambda kind, **t: peft.PromptTuningConfig(num_virtual_tokens=N, **t),
    "prefix": lambda kind, **t: peft.PrefixTuningConfig(num_virtual_tokens=N, **t),
    "ptuning": lambda kind, **t: peft.PromptEncoderConfig(num_virtual_tokens=N, encoder_hidden_size=9, **t),
}
SPECS = {
    "lora": deltaw.Lora(rank=3, alpha=5),
    "dora": Dora(rank=3, alpha=5),
    "ia3": Ia3(),
    "vera": Vera(rank=4, targets=("query", "value", "q", "v")),
    "prompt": Prompt(n_tokens=N),
    "prefix": PrefixTuning(n_tokens=N, projection=False),
    "ptuning": PTuning(n_tokens=N, hidden=9),
}


def spec_for(method: str, kind: str):
    spec = SPECS[method]
    return spec.model_copy(update={"targets": tuple(QV[kind])}) if method == "vera" else spec


def theirs(kind: str, method: str, seed: int = 11) -> nn.Module:
    """PEFT's model with every trainable tensor randomised, the head too."""
    torch.manual_seed(4)
    made = peft.get_peft_model(make_net(kind), CONFIGS[method](kind, task_type=TASKS[kind]))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=rng))
    return made.eval()


def peft_logits(net: nn.Module, kind: str, mask: Tensor | None) -> Tensor:
    more = {} if kind == "bert" else {"decoder_input_ids": DECODER}
    return net(input_ids=IDS, attention_mask=mask, **more).logits


def our_logits(model: Model, mask: Tensor | None) -> Tensor:
    return model.logits(IDS, mask, None if model.kind == "classify" else DECODER)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", TASKS)
def test_what_peft_saved_gives_pefts_logits_and_goes_back(kind, method, tmp_path):
    made = theirs(kind, method)
    made.save_pretrained(tmp_path / "theirs")
    ours = Model(make_net(kind))
    bare = our_logits(ours, MASK)
    ours.attach(tmp_path / "theirs")
    for mask in (None, MASK):
        with torch.no_grad():
            wanted = peft_logits(made, kind, mask)
        torch.testing.assert_close(our_logits(ours, mask), wanted, rtol=RTOL, atol=ATOL)
    assert float((wanted - bare).abs().max()) > 0.05
    assert ours.adapter().provenance["kind"] == ours.kind
    write_adapter(ours.adapter(), tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make_net(kind), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft_logits(back, kind, MASK), wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("kind", TASKS)
def test_what_we_made_gives_our_logits_in_peft(kind, method, tmp_path):
    ours = Model(make_net(kind))
    ours.attach(spec_for(method, kind))
    randomise(ours)
    write_adapter(ours.adapter(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[kind]
    assert config["modules_to_save"] == (["classifier", "score"] if kind == "bert" else None)
    loaded = peft.AutoPeftModelForSequenceClassification if kind == "bert" else peft.AutoPeftModelForSeq2SeqLM
    assert loaded._target_peft_class.__name__ == type(peft.PeftModel.from_pretrained(make_net(kind), tmp_path)).__name__
    back = peft.PeftModel.from_pretrained(make_net(kind), tmp_path).eval()
    with torch.no_grad():
        for mask in (None, MASK):
            torch.testing.assert_close(peft_logits(back, kind, mask), our_logits(ours, mask), rtol=RTOL, atol=ATOL)
    again = Model(make_net(kind))
    again.attach(read_adapter(tmp_path))
    torch.testing.assert_close(our_logits(again, MASK), our_logits(ours, MASK), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TASKS)
def test_gradients_of_lora_and_of_the_head_equal_pefts(kind):
    made = theirs(kind, "lora")
    ours = Model(make_net(kind))
    ours.attach(deltaw.Lora(rank=3, alpha=5))
    names = {}
    for name, value in made.named_parameters():
        if value.requires_grad:
            site, is_lora, part = name.removeprefix("base_model.model.").partition(".lora_")
            site = site.replace(".modules_to_save.default", "")
            names[f"{site}:{part[0]}" if is_lora else f"replace:{site}"] = value
    parameters = ours.adapters["default"].parameters()
    assert set(names) == set(parameters)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(names[name])
    labels = make_ids(3, 6, 3 if kind == "bert" else VOCAB, seed=8)
    for logits in (peft_logits(made, kind, MASK), our_logits(ours, MASK)):
        wanted = labels[:, 0] if kind == "bert" else labels.flatten()
        nn.functional.cross_entropy(logits.flatten(0, -2), wanted).backward()
    for name, value in parameters.items():
        assert float(names[name].grad.abs().max()) > 0
        torch.testing.assert_close(
            value.grad, names[name].grad, rtol=1e-4, atol=3e-6
        )  # of order 0.1, through two stacks


def test_a_prefix_in_front_of_an_encoder_is_seen_by_every_token():
    """What PEFT 0.21 does with BERT: keys and values in front of each layer's, positions counted on behind them."""
    net = BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).eval()
    ours = Model(net)
    bare = ours.logits(IDS)
    ours.attach(PrefixTuning(n_tokens=N, projection=False))
    randomise(ours, size=0.7)
    assert ours.n_before == N
    assert float((ours.logits(IDS) - bare).abs().amax(1).min().detach()) > 1e-3
