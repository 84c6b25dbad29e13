"""Adapters of quantised bases: merged into the dense base, into what the quantised one stands for, or into its bits."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from made_bases import TEXT, config, logits, noisy, renamed_base, stored
from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.core.adapter import Adapter
from deltaw.errors import BadInput, NotMergeable
from deltaw.merge.bake import bake
from deltaw.merge.quantise import quantise_base
from deltaw.methods.lora import Lora
from deltaw.model.base import load_base
from deltaw.model.load import folder_format
from deltaw.model.quantised import Format
from models import make_ids, make_net, randomise

IDS = make_ids()
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def trained_on(folder, how: Format | None = None, bias: str = "lora_only") -> tuple[Adapter, torch.Tensor]:
    """A noisy adapter of a quantised base, and the logits of the two together in float32."""
    settings = {} if how is None else {"format": how.name, "block": how.block, "double_quant": how.double_quant}
    model = load_base(folder, **settings)
    model.attach(Lora(rank=3, alpha=5, bias=bias))
    randomise(model)
    with torch.no_grad():
        return model.adapter(), model.logits(IDS)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("llama", Format("nf4", 64, True)),
        ("gpt2", Format("fp4", 32)),
        ("phi", Format("int8")),
        ("opt", Format("int4", 128, True)),
    ],
)
@pytest.mark.parametrize("given", ["dense", "quantised"])
def test_dequantised_merge_computes_what_the_quantised_base_and_adapter_do(saved, tmp_path, kind, how, given):
    base = saved(make_net(kind), shard="20KB")
    adapter, wanted = trained_on(base, how)
    if given == "quantised":
        quantise_base(base, tmp_path / "base4", how, shard_bytes=20_000)
        base = tmp_path / "base4"

    report = bake(base, adapter, tmp_path / "out", into="dequantised", text=TEXT)

    torch.testing.assert_close(logits(tmp_path / "out", IDS), wanted, **CLOSE)
    assert "quantization_config" not in config(tmp_path / "out")
    assert (report.into, report.format, report.route) == ("dequantised", "dense", "shards")
    assert report.probe.logit_max < 1e-4
    assert abs(report.probe.perplexity_before - report.probe.perplexity_after) < 1e-3 * report.probe.perplexity_before


def test_merging_into_the_dense_base_is_the_default_and_says_that_the_format_differs(saved, tmp_path):
    base = saved(make_net("llama"))
    adapter, at_training = trained_on(base, Format("nf4"))

    with pytest.warns(UserWarning, match=r"format.*nf4.*dense"):
        bake(base, adapter, tmp_path / "out", text=TEXT)

    model = load_base(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.attach(adapter)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out", IDS), model.logits(IDS), **CLOSE)
    assert (logits(tmp_path / "out", IDS) - at_training).abs().max() > 1e-2  # another base than at training


@pytest.mark.parametrize("given", ["dense", "quantised"])
def test_merging_into_the_bits_is_measured_and_loses_something(saved, tmp_path, given):
    base, how = saved(make_net("llama")), Format("nf4", 64, True)
    adapter, wanted = trained_on(base, how)
    if given == "quantised":
        quantise_base(base, tmp_path / "base4", how)
        base = tmp_path / "base4"

    report = bake(base, adapter, tmp_path / "out", into="quantised", text=TEXT)

    assert folder_format(tmp_path / "out") == how
    found = load_base(tmp_path / "out").logits(IDS)
    dense = bake(base, adapter, tmp_path / "sum", into="dequantised", text=TEXT)
    again = load_base(tmp_path / "sum", format="nf4", double_quant=True).logits(IDS)
    torch.testing.assert_close(found, again, **CLOSE)
    assert 1e-3 < (found - wanted).abs().max() < wanted.abs().max()
    assert report.format == "nf4+dq"
    assert report.probe.logit_max > 10 * dense.probe.logit_max
    assert report.probe.perplexity_before == pytest.approx(dense.probe.perplexity_before, rel=1e-5)
    assert report.probe.perplexity_after != report.probe.perplexity_before
    maps = [t for n, t in stored(tmp_path / "out").items() if n.endswith("proj.weight")]
    assert maps
    assert all(t.dtype == torch.uint8 for t in maps)


def test_names_that_transformers_changes_on_load_are_rounded_in_memory(tmp_path):
    base = renamed_base(tmp_path / "base")
    adapter, wanted = trained_on(base, Format("nf4"), bias="none")

    report = bake(base, adapter, tmp_path / "out", into="dequantised", text=TEXT)

    assert report.route == "loaded"
    torch.testing.assert_close(logits(tmp_path / "out", IDS), wanted, **CLOSE)


def test_what_does_not_go_together_is_refused_with_the_way_out(saved, tmp_path):
    base = saved(make_net("llama"))
    adapter, _ = trained_on(base, Format("nf4"))
    quantise_base(base, tmp_path / "base4", Format("nf4"))
    with pytest.raises(NotMergeable, match=r"(?s)holds nf4 weights.*--into dequantised"):
        bake(tmp_path / "base4", adapter, tmp_path / "out")
    with pytest.raises(NotMergeable, match="neither is"):
        bake(base, noisy(base), tmp_path / "out", into="quantised")
    with pytest.raises(BadInput, match="without measuring"):
        bake(base, adapter, tmp_path / "out", into="quantised", measure=False)
    with pytest.raises(BadInput, match="Did you mean 'dequantised'"):
        bake(base, adapter, tmp_path / "out", into="dequantized")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_was_lost(saved, tmp_path):
    base = saved(make_net("llama"))
    adapter, _ = trained_on(base, Format("nf4"))
    adapter.save(tmp_path / "adapter")
    arguments = ["--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--into", "quantised"]
    done = CliRunner().invoke(app, ["merge", *map(str, arguments), "--json"])
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert found["format"] == "nf4"
    assert found["probe"]["perplexity_after"] != found["probe"]["perplexity_before"] > 1
