"""deltaw merge and deltaw inspect, as a user types them."""

from __future__ import annotations

import json

import pytest
import torch
from made_bases import TEXT, attached_logits, logits, noisy, save_base
from transformers import AutoTokenizer
from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.core.adapter import Adapter
from deltaw.errors import BadInput, DataError, RunError
from deltaw.methods.lora import Lora
from deltaw.store.peft import UnfinishedRun, read_adapter
from models import make_ids, make_net


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def run_json(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


@pytest.fixture
def base(saved):
    return saved(make_net("llama"))


@pytest.fixture
def adapter(base, tmp_path) -> Adapter:
    made = noisy(base, Lora(rank=3, alpha=5, rank_pattern={"q_proj": 7}, bias="lora_only"))
    made.save(tmp_path / "adapter")
    return read_adapter(tmp_path / "adapter")


def test_merge_prints_one_json_object(base, adapter, tmp_path):
    (tmp_path / "words.txt").write_text(TEXT)
    found = run_json(
        "merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out",
        "--text", tmp_path / "words.txt",
    )  # fmt: skip
    ids = make_ids()
    torch.testing.assert_close(logits(tmp_path / "out", ids), attached_logits(base, adapter, ids), atol=1e-4, rtol=0)
    assert found["probe"]["logit_max"] < 1e-4
    assert found["probe"]["n_tokens"] == len(AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"])
    assert found["adapter"] == adapter.id
    assert found["dtype"] == "float32"
    assert found["lost_share"] == 0


def test_merge_prints_a_table(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no path is folded
    out = tmp_path / "a[b]"
    result = run("merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", out, "--dtype", "bfloat16")
    assert result.exception is None
    assert "bfloat16" in result.stdout
    assert "logits apart" in result.stdout
    assert "rounded away" in result.stdout
    assert "[b]" in result.stdout


def test_merge_without_the_check_loads_no_model(base, adapter, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("loaded a model")

    monkeypatch.setattr("deltaw.merge.probe.load_transformers", refuse)
    found = run_json(
        "merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--no-check"
    )
    assert found["probe"] is None


def test_merge_names_a_text_that_is_not_there_and_an_output_that_is(base, adapter, tmp_path):
    args = ("merge", "--base", base, "--adapter", tmp_path / "adapter", "--out")
    result = run(*args, tmp_path / "out", "--text", tmp_path / "none.txt")
    assert isinstance(result.exception, DataError)
    assert "none.txt" in str(result.exception)
    assert isinstance(run(*args, tmp_path / "adapter").exception, RunError)


def test_inspect_an_adapter(adapter, tmp_path):
    found = run_json("inspect", tmp_path / "adapter")
    assert found["kind"] == "adapter"
    assert found["id"] == adapter.id
    assert found["method"] == "lora"
    assert found["settings"]["alpha"] == 5
    assert found["n_parameters"] == sum(t.numel() for t in adapter.tensors().values())
    assert found["n_places"] == 14
    by_role = {row["role"]: row for row in found["places"]}
    assert (by_role["q_proj"]["rank"], by_role["q_proj"]["scale"]) == (7, 5 / 7)
    assert (by_role["up_proj"]["rank"], by_role["up_proj"]["count"]) == (3, 2)
    assert by_role["up_proj"]["parameters"] == {"A": [3, 32], "B": [40, 3], "bias": [40]}
    assert sum(row["n_parameters"] for row in found["places"]) == found["n_parameters"]
    assert found["fingerprint"] == adapter.fingerprint.model_dump()
    size = sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())
    assert found["size_mb"] == round(size / 1e6, 3)


def test_inspect_a_run(adapter, tmp_path):
    folder = tmp_path / "run"
    adapter.save(folder / "adapter")
    (folder / "run.json").write_text(json.dumps({"recipe": {"train": {"seed": 3}}, "data": "ab"}))
    (folder / "checkpoints" / "000120").mkdir(parents=True)
    with pytest.warns(UnfinishedRun, match="is not done"):
        found = run_json("inspect", folder)
    assert found["kind"] == "run"
    assert found["finished"] is False
    assert found["checkpoints"] == ["000120"]
    assert found["identity"]["recipe"]["train"]["seed"] == 3
    assert found["adapter"]["id"] == adapter.id
    (folder / "done.json").write_text(json.dumps({"seconds": 4}))
    assert run_json("inspect", folder)["result"] == {"seconds": 4}
    assert "000120" in run("inspect", folder).stdout


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_inspect_a_base_counts_its_linear_maps_and_loads_nothing(tmp_path, kind, monkeypatch):
    base = save_base(make_net(kind), tmp_path / "base")
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("deltaw.model.load.load_transformers", None)
    found = run_json("inspect", base)
    assert found["kind"] == "base"
    assert found["tied"] is (kind == "gpt2")
    assert found["has_chat_template"] is True
    assert found["dtype"] == "float32"
    rows = {row["role"]: row for row in found["linear_maps"] if row["role"] != "c_proj"}
    role, wanted = {
        "llama": ("up_proj", {"kind": "linear", "out_features": 40, "in_features": 32, "count": 2}),
        "gpt2": ("c_attn", {"kind": "conv1d", "out_features": 96, "in_features": 32, "count": 2}),
    }[kind]
    assert {k: rows[role][k] for k in wanted} == wanted
    assert rows["lm_head"]["head"] is True
    assert found["n_parameters"] == sum(p.numel() for p in make_net(kind).parameters())


def test_inspect_prints_tables(base, adapter, tmp_path):
    shown = run("inspect", tmp_path / "adapter").stdout
    assert adapter.id[:12] in shown
    assert "up_proj" in shown
    shown = run("inspect", base).stdout
    assert "LlamaForCausalLM" in shown
    assert "down_proj" in shown


def test_inspect_says_what_it_found_instead(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    result = run("inspect", tmp_path)
    assert isinstance(result.exception, BadInput)
    assert "notes.txt" in str(result.exception)
    for args in (("inspect",), ("inspect", tmp_path, "--machine")):
        assert "one of the two" in str(run(*args).exception)


def test_inspect_the_machine():
    found = run_json("inspect", "--machine")
    assert found["auto_dtype"] in ("float32", "bfloat16")
    assert found["versions"]["torch"] == torch.__version__
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cores"] >= found["usable_cores"] >= 1
    assert found["cpu"]
    assert "torch threads" in run("inspect", "--machine").stdout
