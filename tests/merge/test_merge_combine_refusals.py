"""combine: what it refuses, each with one clear sentence, and that nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_bases import noisy, save_base

from deltaw.core.adapter import Replacement
from deltaw.errors import AdapterError, BadInput, BaseMismatch, NotMergeable, RunError, ShapeError, WorkFailed
from deltaw.merge.combine import combine
from deltaw.merge.compress import compress
from deltaw.methods.bitfit import BitFit
from deltaw.methods.dora import Dora
from deltaw.methods.houlsby import Houlsby
from deltaw.methods.ia3 import Ia3
from deltaw.methods.lora import Lora
from deltaw.methods.prompt import Prompt
from deltaw.model.identity import OtherBaseWarning
from deltaw.store.peft import read_adapter
from models import make_net

Q = ("q_proj",)


@pytest.fixture
def base(saved):
    return saved(make_net("llama", num_hidden_layers=1))


@pytest.fixture
def pair(base):
    return [noisy(base, Lora(rank=3, alpha=5, targets=Q)), noisy(base, Lora(rank=2, alpha=9, targets=Q), seed=2)]


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".part", ".old"))]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": [0.0, 0.0]}, "every weight is 0: the result would be the base"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"method": "tise", "density": 0.2}, "unknown method 'tise'. Did you mean 'ties'"),
        ({"method": "ties"}, "give density"),
        ({"method": "dare_ties", "density": 0.0}, "above 0 and at most 1"),
        ({"density": 0.5}, "'linear' keeps every number: remove density"),
        ({"method": "ties", "density": 0.5, "shared_mask": True}, "shared_mask is for dare"),
        ({"method": "ties", "density": 0.5, "seed": 0}, "seed is for dare_linear and dare_ties"),
        ({"method": "ties", "density": 0.5}, "dense at .*q_proj: give the rank"),
        ({"method": "svd"}, "give rank and out"),
        ({"method": "cat", "rank": 2}, "'cat' keeps every rank"),
        ({"rank": 0}, "rank is 0"),
        ({"dtype": "float32"}, "dtype is of a merged base"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(pair, out, settings, match):
    with pytest.raises(BadInput, match=match):
        combine(pair, **settings, out=out)


def test_one_place_for_the_result(pair, out, base):
    with pytest.raises(BadInput, match="one of the two"):
        combine(pair)
    with pytest.raises(BadInput, match="one of the two"):
        combine(pair, out=out, into_base=out, base=base)
    with pytest.raises(BadInput, match="give the base too"):
        combine(pair, into_base=out)
    with pytest.raises(BadInput, match="remove rank"):
        combine(pair, into_base=out, base=base, rank=3)
    with pytest.raises(BadInput, match="unknown dtype 'float'"):
        combine(pair, into_base=out, base=base, dtype="float")
    with pytest.raises(RunError, match="holds something"):
        combine(pair, into_base=base, base=base)
    for nothing in ([], pair[0]):
        with pytest.raises(BadInput, match="a list of adapters, one at least"):
            combine(nothing, out=out)


@pytest.mark.parametrize("spec", [Dora(rank=2, targets=Q), Ia3(), BitFit(), Lora(rank=2, save_modules=("norm",))])
def test_what_depends_on_the_base_needs_it(base, pair, out, spec):
    with pytest.raises(BadInput, match=r"give the base too|Give the base too"):
        combine([pair[0], noisy(base, spec)], rank=3, out=out)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_is_refused(base, pair, out, with_base, bad):
    pair[1].sites["model.layers.0.self_attn.q_proj"]["B"][3, 1] = bad
    with pytest.raises(AdapterError, match=r"q_proj holds NaN or Inf in B"):
        combine(pair, out=out, base=base if with_base else None)


def test_a_sum_that_overflows_is_refused(base, pair, out):
    for adapter in pair:
        adapter.sites["model.layers.0.self_attn.q_proj"]["B"].fill_(3e38)
    with pytest.raises(WorkFailed, match=r"q_proj: the change holds NaN or Inf, or overflows"):
        combine(pair, [1e9, 1.0], out=out)
    with pytest.raises(WorkFailed, match=r"q_proj\.weight: The sum holds NaN or Inf"):
        combine(pair, [1e9, 1.0], base=base, into_base=out)


def test_adapters_of_other_bases_are_refused_field_by_field(base, pair, out, tmp_path):
    other = save_base(make_net("llama", seed=1, num_hidden_layers=1), tmp_path / "other")
    stranger = noisy(other, Lora(rank=2, alpha=3, targets=Q))
    with pytest.raises(BaseMismatch, match=r"(?s)Adapter 3 does not go with adapter 1.*weights: adapter has"):
        combine([*pair, stranger], out=out)
    with pytest.raises(BaseMismatch, match=r"(?s)trained on another base.*weights: adapter has"):
        combine([*pair, stranger], out=out, base=base)


def test_other_bases_are_tried_when_asked(pair, tmp_path, base):
    other = save_base(make_net("llama", seed=1, num_hidden_layers=1), tmp_path / "other")
    with pytest.warns(OtherBaseWarning, match="weights: adapter has"):
        combine([pair[0], noisy(other, Lora(rank=2, targets=Q))], out=tmp_path / "out", allow_other_base=True)
    assert read_adapter(tmp_path / "out").fingerprint == pair[0].fingerprint


def test_foreign_adapters_are_said_to_be_unchecked(pair, tmp_path):
    with pytest.warns(OtherBaseWarning, match="None of the adapters says"):
        combine([replace(a, fingerprint=None) for a in pair], out=tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    assert found.fingerprint is None
    assert found.spec.targets == ("model.layers.0.self_attn.q_proj",)  # what others meant by a name is not known


def test_changes_of_different_shapes_are_refused(base, pair, out, tmp_path):
    wider = save_base(make_net("llama", num_hidden_layers=1, num_key_value_heads=1), tmp_path / "wider")
    third = replace(noisy(wider, Lora(rank=2, targets=("v_proj",))), fingerprint=pair[0].fingerprint)
    fourth = noisy(base, Lora(rank=2, targets=("v_proj",)))
    with pytest.raises(ShapeError, match=r"Adapter 2 changes a matrix of 8 x 32 at .*v_proj, another one of 16 x 32"):
        combine([fourth, third], out=out)
    with pytest.raises(AdapterError, match="does not fit this model"):
        combine([fourth, third], out=out, base=base)


@pytest.mark.parametrize(("spec", "name"), [(Houlsby(), "houlsby"), (Prompt(), "prompt")])
def test_methods_that_change_no_weight_are_refused_by_name(base, pair, out, spec, name):
    with pytest.raises(NotMergeable, match=rf"Adapter 2 \(method '{name}'\) is no change of weights"):
        combine([pair[0], noisy(base, spec)], out=out)


def test_gains_cannot_be_put_side_by_side(base, pair, out):
    with pytest.raises(NotMergeable, match=r"q_proj: gains \(DoRA, IA3\) have no factors"):
        combine([pair[0], noisy(base, Dora(rank=2, targets=Q))], method="cat", base=base, out=out)


def test_new_rows_of_vocabulary_are_refused(pair, out):
    rows = Replacement("model.embed_tokens.weight", torch.ones(1, 32), (5,))
    with pytest.raises(NotMergeable, match=r"Adapter 1 .* rows of vocabulary of its own"):
        combine([replace(pair[0], replaced=(rows,)), pair[1]], out=out)


def test_a_bias_where_the_base_has_none_is_refused(saved, out):
    base = saved(make_net("qwen3"), name="bare")
    adapters = [noisy(base, Lora(rank=2, targets=Q)), noisy(base, BitFit(targets=Q, add=True))]
    with pytest.raises(NotMergeable, match=r"Adapter 2 adds a bias at .*q_proj, where the base has none"):
        combine(adapters, base=base, out=out)


def test_different_positions_are_refused(pair, out):
    other = replace(pair[1], overrides={"max_position_embeddings": 128})
    with pytest.raises(NotMergeable, match="different positions of the base"):
        combine([pair[0], other], out=out)


def test_a_quantised_base_is_refused(base, pair, out, tmp_path):
    from deltaw.merge.quantise import quantise_base
    from deltaw.model.quantised import Format

    quantise_base(base, tmp_path / "small", Format("nf4", 32, False))
    with pytest.raises(NotMergeable, match="holds nf4 weights: give the 16- or 32-bit model"):
        combine(pair, base=tmp_path / "small", into_base=out)


def test_a_folder_with_other_things_and_a_parents_own_are_refused_before_any_work(base, pair, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds something that is not an adapter's \(notes.txt\)"):
        combine(pair, out=tmp_path / "full")
    pair[0].save(tmp_path / "parent")
    for call in (
        lambda: combine([tmp_path / "parent", pair[1]], out=tmp_path / "parent"),
        lambda: compress(tmp_path / "parent", tmp_path / "parent", rank=1),
    ):
        with pytest.raises(AdapterError, match="is an adapter that the result is made from: it would be lost"):
            call()
    assert read_adapter(tmp_path / "parent").id == pair[0].id
