"""Normal forms are made once while answering, and anew in every forward that trains."""

from __future__ import annotations

import pytest
import torch

from deltaw import Dora, Lora, Vera
from deltaw.methods.dora import Dora as DoraClass
from deltaw.model.generate import generate
from deltaw.model.model import Model
from models import make_ids, make_net, make_tokenizer, randomise


@pytest.mark.parametrize("spec", [Dora(rank=3, alpha=5), Vera(rank=5), Lora(rank=3)], ids=lambda s: s.name)
def test_answers_are_those_of_forms_made_anew(spec):
    model = Model(make_net("llama"), make_tokenizer())
    model.attach(spec)
    randomise(model)
    prompt = make_ids(1, 7)[0].tolist()
    (found,) = generate(model, [prompt], 6)
    ids = list(prompt)
    for token in found:
        with torch.no_grad():
            assert int(model.logits(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert len(found) > 1
    assert model.run.forms is None


def test_a_form_is_made_once_inside_and_every_time_outside_or_with_gradients(monkeypatch):
    made = []
    lower = DoraClass.lower
    monkeypatch.setattr(
        DoraClass, "lower", lambda self, site, *rest: made.append(site.name) or lower(self, site, *rest)
    )
    model = Model(make_net("llama"))
    model.attach(Dora(rank=3, alpha=5, targets=["q_proj"]))
    made.clear()
    with torch.no_grad(), model.run.keeping_forms():
        first = model.logits(make_ids())
        assert torch.equal(model.logits(make_ids()), first)
    assert len(made) == 2  # one for each of two layers
    with torch.no_grad():
        model.logits(make_ids())
    assert len(made) == 4
    with model.run.keeping_forms():
        model.logits(make_ids())
        model.logits(make_ids())
    assert len(made) == 8
