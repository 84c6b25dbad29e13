"""A base quantised for a text: every map fitted to the inputs it has, the same identity, files that others read."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.core import fingerprint
from deltaw.core.fingerprint import BaseFingerprint, fingerprint_folder
from deltaw.data.source import data_hash, read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import encode_all
from deltaw.errors import BaseError, DataError
from deltaw.formats.calibrate import calibrated, inverse_factor, second_moment
from deltaw.merge.bake import bake
from deltaw.merge.quantise import Calibration, quantise_base
from deltaw.model.base import load_base
from deltaw.model.calibrated import calibrate, windows
from deltaw.model.describe import describe_base
from deltaw.model.frozen import FrozenLinear
from deltaw.model.identity import OtherBaseWarning
from deltaw.model.load import load_tokenizer, load_transformers
from deltaw.model.originals import originals
from deltaw.model.quantised import Format, frozen_weights
from deltaw.model.sites import find_sites
from deltaw.train.events import Step
from kinds.made_kinds import save_base as save_kind
from merge.made_bases import noisy
from train.tiny_runs import ROWS, save_base

KINDS = ("llama", "gpt2", "gemma2", "phi3", "gpt_neox")
NF4 = Format("nf4", 64, True)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setitem(fingerprint._state, "cache", tmp_path / "cache")


def text(n: int, seed: int) -> str:
    """Words of which each is one of two that may follow the one before it."""
    rng, at, found = random.Random(seed), 0, []
    for _ in range(n):
        found.append(WORDS[at])
        at = (3 * at + rng.choice((1, 2))) % len(WORDS)
    return " ".join(found)


@pytest.fixture
def data(tmp_path) -> Path:
    """Some 6,000 bytes of text, a token each, in documents."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text(300, i)}) + "\n" for i in range(5)))
    return path


def loss(net, ids: Tensor) -> float:
    with torch.no_grad():
        return float(net(input_ids=ids, labels=ids, use_cache=False).loss)


def calibrated_net(base: Path, how: Format, ids: Tensor):
    net = load_transformers(base, "float32", how)
    dense = originals(base, find_sites(net), net.base_model_prefix)
    return net, dense, calibrate(net, how, dense, ids)


def ids_of(data: Path, base: Path, most: int = 4096) -> Tensor:
    net = load_transformers(base, "float32", NF4)
    return windows(net, encode_all(read_rows(data), load_tokenizer(base), DataSpec(max_tokens=4096)).examples, most)


@pytest.mark.parametrize("kind", KINDS)
def test_each_map_is_fitted_to_the_inputs_that_the_finished_network_gives_it(kind, tmp_path, data):
    base = save_base(tmp_path / "base", kind=kind)
    how = Format("nf4", 32, True) if kind == "gpt2" else NF4
    ids = ids_of(data, base)
    net, dense, left = calibrated_net(base, how, ids)
    assert left == []
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, FrozenLinear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    net.base_model(input_ids=ids, use_cache=False)
    plain = frozen_weights(load_transformers(base, "float32", how))
    assert seen.keys() == plain.keys() == frozen_weights(net).keys()
    for name, weight in frozen_weights(net).items():
        factor = inverse_factor(second_moment(seen[name]))
        again = calibrated(type(weight), dense(name), factor, torch.float32, how.block, True)
        assert torch.equal(weight.codes, again.codes), name
        assert torch.equal(weight.absmax, again.absmax), name
        assert not torch.equal(weight.codes, plain[name].codes), name


def test_a_trained_network_loses_less_than_with_the_nearest_levels(tmp_path, data):
    base = save_base(tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = ids_of(data, base, 6400)
    seen, unseen = ids[:56], ids[56:]
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for step in range(60):
        part = seen[step * 8 % 56 :][:8]
        net(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    net.save_pretrained(base)
    rough = Format("int4", 4096)
    nets = {
        "dense": net,
        "plain": load_transformers(base, "float32", rough),
        "fitted": calibrated_net(base, rough, seen)[0],
    }
    lost = {name: loss(made, unseen) for name, made in nets.items()}
    assert lost["dense"] < 2.0  # of 5.6: it has learned
    assert lost["fitted"] - lost["dense"] < 0.6 * (lost["plain"] - lost["dense"]), lost


def test_a_written_folder_keeps_the_codes_the_identity_and_what_they_were_chosen_for(tmp_path, data):
    base = save_base(tmp_path / "base")
    said: list[str] = []
    report = quantise_base(base, tmp_path / "out", NF4, calibration=Calibration(data, 3000, 0), say=said.append)
    net, _, _ = calibrated_net(base, NF4, ids_of(data, base, 3000))
    loaded = load_base(tmp_path / "out")
    for name, weight in frozen_weights(net).items():
        assert torch.equal(frozen_weights(loaded.net)[name].codes, weight.codes)
    plain = load_base(base, "nf4", double_quant=True)
    assert loaded.fingerprint.model_copy(update={"codes": ""}) == plain.fingerprint
    told = {
        "data": "text.jsonl", "data_hash": data_hash(read_rows(data)), "tokens": 46 * 64, "window": 64,
        "damping": 0.01, "maps": 14,
    }  # fmt: skip
    assert report.calibration == describe_base(tmp_path / "out")["calibration"] == told
    assert "calibration" not in describe_base(base)
    assert any(line.startswith("calibrating on 2,944 tokens of ") for line in said)
    assert quantise_base(base, tmp_path / "plain", NF4).calibration is None


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_with_bitsandbytes_reads_it(kind, tmp_path, data):
    # no dropout; and no row shorter than a block, which bitsandbytes 0.50 dequantises wrongly on the CPU
    wide = {"hidden_size": 128, "intermediate_size": 136, "head_dim": 32, "attention_dropout": 0.0}
    if kind == "gpt2":
        wide = {"n_embd": 128, "n_inner": 136, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = save_base(tmp_path / "base", kind=kind, **wide)
    quantise_base(base, tmp_path / "out", NF4, calibration=Calibration(data))
    ids = torch.arange(3, 25).view(2, 11)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert "Linear4bit" in {type(m).__name__ for m in theirs.modules()}
        logits = theirs.train()(input_ids=ids, use_cache=False).logits  # in eval mode it repacks scales in bfloat16
    # float32: sums of at most 136 products in another order, through two blocks; logits up to 20
    torch.testing.assert_close(load_base(tmp_path / "out").logits(ids), logits, rtol=0, atol=5e-5)


def test_an_adapter_trains_on_it(tmp_path, data):
    base = save_base(tmp_path / "base")
    quantise_base(base, tmp_path / "out", NF4, calibration=Calibration(data))
    recipe = {
        "base": {"path": str(tmp_path / "out"), "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 3, "alpha": 5},
        "data": {"max_tokens": 64},
        "train": {"steps": 12, "tokens_per_step": 60, "lr": 2e-2},
        "eval": {"keep": "last"},
    }
    events = list(deltaw.train(recipe, tmp_path / "run", train_rows=ROWS))
    losses = [e.loss for e in events if isinstance(e, Step)]
    assert losses[-1] < 0.8 * losses[0]
    adapter = events[-1].adapter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base(tmp_path / "out").attach(adapter)  # its own codes
    codes = deltaw.load_adapter(tmp_path / "run").fingerprint.codes[:12]
    other = rf"codes: adapter has {codes}, this model has "
    with pytest.warns(OtherBaseWarning, match=other + "the nearest levels"):
        load_base(base, "nf4", double_quant=True).attach(adapter)
    quantise_base(base, tmp_path / "more", NF4, calibration=Calibration(data, 3000))
    with pytest.warns(OtherBaseWarning, match=other + load_base(tmp_path / "more").fingerprint.codes[:12]):
        load_base(tmp_path / "more").attach(adapter)
    with pytest.warns(OtherBaseWarning) as said:
        load_base(base).attach(adapter)
    assert "format: adapter has nf4+dq, this model has dense" in str(said[0].message)
    assert "codes" not in str(said[0].message)  # the format says it all


def test_merging_into_other_codes_than_the_adapter_s_is_said(tmp_path, data):
    base = save_base(tmp_path / "base")
    quantise_base(base, tmp_path / "out", NF4, calibration=Calibration(data, 700))
    adapter = noisy(tmp_path / "out")
    codes = adapter.fingerprint.codes[:12]
    with pytest.warns(OtherBaseWarning, match=f"codes: adapter has {codes}, this model has the nearest levels"):
        bake(base, adapter, tmp_path / "wrong", into="dequantised", measure=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(tmp_path / "out", adapter, tmp_path / "merged", into="dequantised", measure=False)


def test_codes_are_part_of_the_identity_only_where_they_were_chosen(tmp_path, data):
    base = save_base(tmp_path / "base")
    for name, most, shards in (("one", 700, 10**9), ("two", 700, 10_000), ("more", 3000, 10**9)):
        text = Calibration(data, most)
        quantise_base(base, tmp_path / name, NF4, calibration=text, shard_bytes=shards)
    quantise_base(base, tmp_path / "plain", NF4)
    prints = {name: fingerprint_folder(tmp_path / name) for name in ("one", "two", "more", "plain", "base")}
    assert len(prints["one"].codes) == 64
    assert prints["one"].differences(prints["plain"]).keys() == {"codes"}
    for name in ("plain", "base"):
        assert prints[name].codes == ""
        assert "codes" not in prints[name].model_dump_json()  # the ids of adapters stay what they were
        assert "codes" not in prints[name].model_dump()
    again = BaseFingerprint.model_validate_json(prints["one"].model_dump_json())
    assert again == prints["one"]
    assert load_base(tmp_path / "one").fingerprint == prints["one"]
    assert prints["two"] == prints["one"]
    assert prints["more"].differences(prints["one"]).keys() == {"codes"}


def test_maps_that_the_text_does_not_reach_keep_their_nearest_levels(tmp_path, data):
    base = save_base(tmp_path / "base")
    ids = ids_of(data, base)
    net = load_transformers(base, "float32", NF4)
    dense = originals(base, find_sites(net), net.base_model_prefix)
    spare = net.get_submodule("model.layers.0.mlp.up_proj").frozen
    net.model.add_module("spare", FrozenLinear(spare, None, "linear"))
    assert calibrate(net, NF4, dense, ids) == ["model.spare"]
    assert net.model.spare.frozen is spare


def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(tmp_path, data):
    base = save_base(tmp_path / "base")

    def refused(kind: type[Exception], match: str, calibration: Calibration, folder: Path = base) -> None:
        with pytest.raises(kind, match=match):
            quantise_base(folder, tmp_path / "out", NF4, calibration=calibration)
        assert not (tmp_path / "out").exists()

    (tmp_path / "empty.txt").write_text(" \n")
    refused(DataError, r"empty.txt is empty", Calibration(tmp_path / "empty.txt"))
    refused(DataError, r"no-such.txt' cannot be read", Calibration(tmp_path / "no-such.txt"))
    refused(DataError, r"does not exist", Calibration(tmp_path / "no-such.jsonl"))
    refused(DataError, r"has 0 tokens \(windows of 64\), and the widest map has 40 inputs", Calibration(data, 63))
    t5 = save_kind("t5", tmp_path / "t5")
    refused(BaseError, r"of another kind \(encoder-decoder model\)", Calibration(data), t5)
    quantise_base(base, tmp_path / "nf4", NF4)
    refused(BaseError, "is quantised already", Calibration(data), tmp_path / "nf4")


def test_inputs_that_are_not_finite_name_the_map(tmp_path, data):
    base = save_base(tmp_path / "base")
    ids = ids_of(data, base)
    net = load_transformers(base, "float32", NF4)
    net.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(BaseError, match=r"layers\.1\.self_attn\.q_proj cannot be calibrated: its inputs hold NaN"):
        calibrate(net, NF4, originals(base, find_sites(net), net.base_model_prefix), ids)


def test_a_text_file_is_one_document(tmp_path):
    base = save_base(tmp_path / "base")
    (tmp_path / "book.txt").write_text(text(100, 7))
    report = quantise_base(base, tmp_path / "out", Format("int4", 32), calibration=Calibration(tmp_path / "book.txt"))
    assert report.calibration["tokens"] == len(text(100, 7)) // 64 * 64
    assert report.calibration["data"] == "book.txt"
