"""An adapter comes back from disk as it was, or an error says which file, which tensor, which value."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw import Adapter, Lora
from deltaw.errors import AdapterError, BaseMismatch, NotFound, WorkFailed
from deltaw.model.identity import OtherBaseWarning
from deltaw.model.model import Model
from deltaw.store.files import whole_file, whole_folder, write_text
from deltaw.store.peft import CONFIG, OURS, TENSORS, read_adapter, write_adapter
from models import make_fingerprint, make_ids, make_net, make_tokenizer, randomise

IDS = make_ids()
SPEC = Lora(
    rank=3, alpha=5.5, targets=["q_proj", "up_proj", "embed_tokens"], bias="all", save_modules=["lm_head"],
    rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 7.0}, dropout=0.1, layers=None,
)  # fmt: skip


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def make_adapter(spec: Lora = SPEC, kind: str = "llama", **provenance: object) -> Adapter:
    model = Model(make_net(kind), make_tokenizer(), make_fingerprint())
    model.attach(spec)
    randomise(model)
    return model.adapter(**provenance)


@pytest.fixture(scope="module")
def made() -> Adapter:
    return make_adapter(recipe={"train": {"epochs": 1}}, seed=3)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return write_adapter(made, tmp_path / "adapter")


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Round trip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True, "init_a": "gaussian", "bias": "lora_only"},
        {"targets": r".*\.1\..*", "bias": "all"},
        {"layers": [1], "exclude": r".*\.0\..*"},
        {"layers": "0-1", "save_modules": ["lm_head"], "bias": "all"},
        {"new_tokens": ["<a>", "<b>"]},
    ],
    ids=str,
)
def test_an_adapter_comes_back_bit_for_bit(kind, settings, tmp_path):
    adapter = make_adapter(Lora(rank=3, alpha=5, **settings), kind, seed=7)
    back = read_adapter(write_adapter(adapter, tmp_path / "a"))
    assert back.id == adapter.id
    assert back.spec == adapter.spec
    assert back.fingerprint == adapter.fingerprint
    assert back.provenance == {"seed": 7}
    assert set(back.places) == set(adapter.places)
    tensors = adapter.tensors()
    assert set(back.tensors()) == set(tensors)
    for name, tensor in back.tensors().items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    again = read_adapter(write_adapter(back, tmp_path / "b"))
    assert again.id == adapter.id
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


def test_a_saved_adapter_computes_what_the_live_one_did(made, folder):
    wanted = Model(make_net("llama"))
    wanted.attach(made)
    for source in (folder, str(folder), deltaw.load_adapter(folder)):
        model = Model(make_net("llama"))
        model.attach(source)
        assert torch.equal(model.logits(IDS), wanted.logits(IDS))


def test_the_folder_holds_peft_files_and_ours_and_nothing_else(folder):
    assert {p.name for p in folder.iterdir()} == {CONFIG, TENSORS, OURS, "README.md"}
    assert {p.name for p in folder.parent.iterdir()} == {"adapter"}


def test_an_adapter_inside_a_runs_folder_is_found(folder):
    assert read_adapter(folder.parent).id == read_adapter(folder).id


def test_writing_replaces_an_adapter_and_refuses_anything_else(made, folder, tmp_path):
    other = make_adapter(Lora(rank=2, alpha=7))
    write_adapter(other, folder)
    assert read_adapter(folder).id == other.id
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "me.jpg").write_bytes(b"1")
    with pytest.raises(AdapterError, match="photos holds something that is not an adapter"):
        write_adapter(made, stranger)
    assert [p.name for p in stranger.iterdir()] == ["me.jpg"]


def test_a_failed_write_leaves_what_was_there(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fill(aside: Path) -> None:
        (aside / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as aside:
        fill(aside)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_what_is_no_folder_is_never_replaced_by_one(made, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(AdapterError, match="is a file; an adapter is a folder"):
            write_adapter(made, tmp_path / name)
        with pytest.raises(WorkFailed, match="it is no folder"), whole_folder(tmp_path / name):
            pass
        with pytest.raises(WorkFailed, match="it is a folder or a device"), whole_file(tmp_path / name) as aside:
            aside.write_text("x")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(made, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltaw.store.peft.save_file", full)
    with pytest.raises(deltaw.errors.WorkFailed, match=r"No space left while writing new to .*Free some space"):
        write_adapter(made, tmp_path / "new")
    monkeypatch.setattr("deltaw.store.files.sync_file", full)
    with pytest.raises(deltaw.errors.WorkFailed, match=r"No space left while writing notes\.txt"):
        write_text(tmp_path / "notes.txt", "x")
    assert list(tmp_path.iterdir()) == []


# Identity -----------------------------------------------------------------------------------------


def test_the_id_is_of_spec_fingerprint_and_tensors_alone(made):
    assert replace(made, provenance={"metrics": {"loss": 1.0}, "when": "today"}).id == made.id
    assert replace(made, places=()).id == made.id
    assert replace(made, fingerprint=make_fingerprint(weights="0" * 64)).id != made.id
    assert replace(made, fingerprint=None).id != made.id
    assert replace(made, spec=made.spec.model_copy(update={"alpha": 6.0})).id != made.id
    for name in list(made.sites)[:2]:
        for part, tensor in made.sites[name].items():
            touched = tensor.clone()
            touched.view(-1)[0] += 1
            assert replace(made, sites={**made.sites, name: {**made.sites[name], part: touched}}).id != made.id
    turned = {n: {p: t.reshape(t.shape[::-1]) for p, t in ps.items()} for n, ps in made.sites.items()}
    assert replace(made, sites=turned).id != made.id  # the same bytes in another shape
    as_whole = {n: {p: t.view(torch.int32) for p, t in ps.items()} for n, ps in made.sites.items()}
    assert replace(made, sites=as_whole).id != made.id  # the same bytes of another dtype
    halves = {n: {p: t.half() for p, t in ps.items()} for n, ps in made.sites.items()}
    assert replace(made, sites=halves).id != made.id
    first = made.replaced[0]
    assert replace(made, replaced=(replace(first, value=first.value + 1), *made.replaced[1:])).id != made.id
    assert replace(made, replaced=(replace(first, tensor="other"), *made.replaced[1:])).id != made.id
    assert replace(made, replaced=(replace(first, rows=(1, 2)), *made.replaced[1:])).id != made.id


def test_the_id_does_not_depend_on_the_order_of_tensors(made):
    turned = {n: dict(reversed(p.items())) for n, p in reversed(made.sites.items())}
    assert replace(made, sites=turned, replaced=made.replaced[::-1]).id == made.id
    assert made.n_parameters == sum(t.numel() for t in made.tensors().values())


# Broken files -------------------------------------------------------------------------------------


def test_a_pickle_is_refused_by_name(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a pickle, which can run code.*refused"):
        read_adapter(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(NotFound, match=r"No adapter at .*nowhere: there is no such folder"):
        read_adapter(tmp_path / "nowhere")
    (folder / TENSORS).unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter: adapter_config\.json is missing"):
        read_adapter(folder)


def test_reading_again_keeps_nothing(folder):
    """A server reads adapters for ever; safetensors' safe_open keeps two integers of each tensor larger than 256."""
    times, n_tensors = 30, len(read_adapter(folder).tensors())
    for _ in range(3):
        read_adapter(folder)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        read_adapter(folder)
    gc.collect()
    assert sys.getallocatedblocks() - before < times * n_tensors / 2


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_with_its_size(folder, size):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:size])
    with pytest.raises(AdapterError, match=rf"\({len(data[:size])} bytes\) is truncated or no safetensors file"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG, OURS])
@pytest.mark.parametrize("text", ['{"r": ', "[1]", ""], ids=["cut", "a list", "empty"])
def test_broken_json_is_refused_by_name(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(AdapterError, match=name):
        read_adapter(folder)


def test_one_flipped_bit_is_noticed(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))
    with pytest.raises(AdapterError, match=r"not the one that was saved .its id is .*A file was changed or damaged"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 4}, "disagree on r: 4 and 3"),
        ({"lora_alpha": 16}, r"disagree on lora_alpha: 16 and 5\.5"),
        ({"use_rslora": True}, "disagree on use_rslora: True and False"),
        ({"target_modules": ["q_proj"]}, "disagree on target_modules"),
        ({"modules_to_save": None}, "disagree on modules_to_save"),
        ({"peft_type": "LOHA"}, "says peft_type='LOHA'; known here: .*LORA"),
    ],
    ids=str,
)
def test_an_edited_config_is_noticed(folder, changes, said):
    edit_json(folder / CONFIG, **changes)
    with pytest.raises(AdapterError, match=said):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "is of format 2; this deltaw reads format 1"),
        ({"spec": "lora"}, "is not what deltaw writes"),
        ({"spec": None}, "is not what deltaw writes"),
        ({"places": 5}, "is not what deltaw writes"),
        ({"provenance": ["me"]}, "is not what deltaw writes"),
        ({"overrides": 3}, "is not what deltaw writes"),
    ],
    ids=str,
)
def test_nonsense_in_deltaw_json_is_refused_by_its_file(folder, changes, said):
    edit_json(folder / OURS, **changes)
    with pytest.raises(AdapterError, match=said):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32, dtype=torch.int32)}), "as int32 of shape"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32).to(torch.float8_e4m3fn)}), "as float8_e4m3fn of"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32, dtype=torch.complex64)}), "as complex64 of"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.tensor(1.0)}), r"as float32 of shape \[\]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 32)}),
         r"A has shape \(2, 32\), its settings need \(3, 32\)"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(32)}),
         r"B has shape \(32,\), its settings need \(32, 3\)"),
    ],
    ids=["none", "int32", "float8", "complex", "a number", "other rank", "flat"],
)  # fmt: skip
def test_tensors_that_fit_no_base_are_refused_without_one(folder, edit, said):
    (folder / OURS).unlink()
    edit_tensors(folder, edit)
    with pytest.raises(AdapterError, match=said):
        read_adapter(folder)


@pytest.mark.parametrize("key", ["spec", "fingerprint", "id"])
def test_an_edited_deltaw_json_is_noticed(folder, key):
    ours = json.loads((folder / OURS).read_text())
    value = {
        "spec": {**ours["spec"], "dropout": 0.2},
        "fingerprint": {**ours["fingerprint"], "weights": "0" * 64},
        "id": "0" * 64,
    }[key]
    edit_json(folder / OURS, **{key: value})
    with pytest.raises(
        AdapterError, match="disagree on lora_dropout" if key == "spec" else "not the one that was saved"
    ):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(2)}), r"does not have: .*q_proj\.lora_C\.weight"),
        (lambda t: t.update({"stray": torch.ones(2)}), "does not have: stray"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"q_proj lacks B"),
        (lambda t: [t.pop(f"{Q}.lora_{p}.weight") for p in "AB"] and t.pop(f"{Q}.base_layer.bias"),
         r"no tensors for model\.layers\.0\.self_attn\.q_proj"),
        (lambda t: t.pop("base_model.model.lm_head.weight"), r"no tensors for lm_head\.weight"),
        (lambda t: t.pop("base_model.model.model.layers.0.self_attn.k_proj.bias"), r"no tensors for .*k_proj\.bias"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 31)}), r"A has shape \(3, 31\), .* needs \(3, 32\)"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(53, 31)}),
         r"lm_head\.weight has shape \(53, 31\), this model's is \(53, 32\)"),
        (lambda t: t.update({f"{Q[:-6]}qq_proj.lora_A.weight": torch.ones(3, 32),
                             f"{Q[:-6]}qq_proj.lora_B.weight": torch.ones(32, 3)}),
         r"no such place in this model: .*qq_proj"),
        (lambda t: t.update({"base_model.model.model.nrom.weight": torch.ones(3)}), r"replaces model\.nrom\.weight"),
    ],
    ids=["unknown lora", "stray", "lone A", "place gone", "saved gone", "bias gone", "misshapen", "misshapen saved",
         "unknown place", "unknown saved"],
)  # fmt: skip
def test_a_foreign_file_with_unknown_missing_or_misshapen_tensors_is_refused(folder, edit, said):
    (folder / OURS).unlink()  # what PEFT would have saved: no id guards it
    edit_tensors(folder, edit)
    model = Model(make_net("llama"))
    base = model.logits(IDS)
    with pytest.raises(AdapterError, match=said):
        model.attach(folder)
    assert torch.equal(model.logits(IDS), base)


# The base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("weights", "a1b2e7ff" * 8, r"weights: adapter has 9f0c21aa9f0c, this model has a1b2e7ffa1b2"),
        ("tokenizer", "beef" * 16, r"tokenizer: adapter has 77aa001177aa, this model has beefbeefbeef"),
        ("architecture", "dead" * 16, r"architecture: adapter has llama/11ab3.*, this model has llama/dead"),
    ],
)
def test_another_base_is_an_error_that_says_what_differs(folder, field, value, said):
    model = Model(make_net("llama"), fingerprint=make_fingerprint(name="Other-2", **{field: value}))
    with pytest.raises(BaseMismatch, match=said) as caught:
        model.attach(folder)
    assert "Tiny-1@9f0c21" in str(caught.value)
    assert "Other-2@" in str(caught.value)
    assert "allow_other_base=True" in str(caught.value)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]] == [field]
    assert model.adapters == {}
    with pytest.warns(OtherBaseWarning, match=said):
        model.attach(folder, allow_other_base=True)


@pytest.mark.parametrize(("field", "value"), [("chat_template", "feed" * 16), ("format", "nf4")])
def test_another_template_or_format_is_a_warning(folder, field, value):
    model = Model(make_net("llama"), fingerprint=make_fingerprint(**{field: value}))
    with pytest.warns(OtherBaseWarning, match=f"{field}: adapter has"):
        model.attach(folder)
    assert model.run.use == {"default": 1.0}


def test_the_same_base_is_silent_whatever_its_name(folder):
    model = Model(make_net("llama"), fingerprint=make_fingerprint(name="copy"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.attach(folder) == "default"


def test_an_adapter_that_does_not_name_its_base_is_said_to_be_unknown_once(folder):
    (folder / OURS).unlink()
    model = Model(make_net("llama"), fingerprint=make_fingerprint())
    with pytest.warns(OtherBaseWarning, match="does not say which base.*unknown") as caught:
        model.attach(folder)
    assert len(caught) == 1


def test_a_folder_with_anybody_elses_file_is_not_written_into(tmp_path):
    adapter = make_adapter()
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"mine")
    with pytest.raises(AdapterError, match=r"optimizer\.pt"):
        adapter.save(tmp_path / "a")
    assert (tmp_path / "a" / "optimizer.pt").read_bytes() == b"mine"
