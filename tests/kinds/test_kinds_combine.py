"""Classifiers and encoder-decoders: their adapters are summed as any other, heads included."""

from __future__ import annotations

import pytest
import torch
from made_kinds import LABELS, NAMED, save_base

from deltaw.core.adapter import Adapter
from deltaw.errors import NotMergeable
from deltaw.merge.combine import combine
from deltaw.methods.lora import Lora
from deltaw.model.base import load_base
from deltaw.model.classify import label_logits
from models import randomise

IDS = torch.tensor([[1, 9, 14, 23, 2], [1, 30, 11, 7, 2]])


def adapters_of(base, **how) -> list[Adapter]:
    made = []
    for seed, spec in enumerate((Lora(rank=3, alpha=5), Lora(rank=2, alpha=7))):
        model = load_base(base, **how)
        model.attach(spec)
        randomise(model, seed=seed)
        made.append(model.adapter())
    return made


def computed(folder, attach=None):
    model = load_base(folder)
    for name, (adapter, _) in (attach or {}).items():
        model.attach(adapter, name=name)
    if attach:
        model.use({name: weight for name, (_, weight) in attach.items()})
    with torch.no_grad():
        if model.kind == "seq2seq":
            return model.net(input_ids=IDS, decoder_input_ids=IDS).logits
        return label_logits(model.net, None, IDS)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_base_with_the_sum_computes_what_the_set_in_use_does(tmp_path, kind):
    base = save_base(kind, tmp_path / "base", **(NAMED if kind == "bert" else {}))
    first, second = adapters_of(base)
    assert (kind == "bert") == any("classifier" in r.tensor for r in first.replaced)
    combine([first, second], [0.7, -0.4], base=base, into_base=tmp_path / "out")
    combine([first, second], [0.7, -0.4], base=base, out=tmp_path / "adapter")
    wanted = computed(base, {"a": (first, 0.7), "b": (second, -0.4)})
    # two blocks of float32 sums of 32 to 40 terms
    torch.testing.assert_close(computed(tmp_path / "out"), wanted, atol=1e-4, rtol=0)
    found = computed(base, {"c": (tmp_path / "adapter", 1.0)})
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_heads_that_the_base_has_not_have_no_sum(tmp_path):
    base = save_base("encoder", tmp_path / "base")
    adapters = adapters_of(base, labels=LABELS)
    with pytest.raises(NotMergeable, match=r"replace classifier.* which the base's files do not hold"):
        combine(adapters, base=base, out=tmp_path / "out")
    other = adapters_of(base, labels=LABELS[:2])
    with pytest.raises(NotMergeable, match="different labels"):
        combine([adapters[0], other[0]], base=base, out=tmp_path / "out")
