"""Who a base is: what changes its fingerprint, what does not, and what it costs the second time."""

from __future__ import annotations

import json
import os
import time

import pytest
from safetensors.torch import load_file, save_file

from deltaw.core import fingerprint as module
from deltaw.core.checkpoint_files import read_header
from deltaw.core.fingerprint import (
    HARD,
    SOFT,
    BaseFingerprint,
    fingerprint_folder,
    hash_checkpoint,
)
from deltaw.errors import BaseError


def edit_json(path, **changes):
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, **changes}))


def flip_last_byte(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def age(folder):
    """Give every file a time well before now, as a downloaded base has."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


def counted(monkeypatch):
    calls = []
    real = module._hash_files
    monkeypatch.setattr(module, "_hash_files", lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


def test_one_shard_or_many_is_the_same_base(base, make, tmp_path):
    many = make.save(tmp_path / "many", shard="10KB")
    assert len(list(many.glob("*.safetensors"))) >= 3
    one, other = fingerprint_folder(base), fingerprint_folder(many)
    assert one.differences(other) == {}
    assert one.weights == other.weights
    assert one.parameters == sum(p.numel() for p in make.llama().parameters())
    assert (one.model_type, one.dtype, one.format, one.name) == ("llama", "float32", "dense", "base")
    assert one.short() == f"base@{one.weights[:6]}"


def test_one_byte_of_a_weight_changes_the_weights_alone(base):
    before = fingerprint_folder(base)
    flip_last_byte(base / "model.safetensors")
    after = fingerprint_folder(base)
    assert set(before.differences(after)) == {"weights"}
    assert before.differences(after)["weights"] == (before.weights[:12], after.weights[:12])


def test_a_shape_or_a_name_is_part_of_the_weights():
    data = bytes(range(24))
    digests = {
        hash_checkpoint([("a", "F32", (2, 3), data)]),
        hash_checkpoint([("a", "F32", (3, 2), data)]),
        hash_checkpoint([("b", "F32", (2, 3), data)]),
        hash_checkpoint([("a", "F32", (1, 3), data[:12]), ("b", "F32", (1, 3), data[12:])]),
    }
    assert len(digests) == 4


def test_order_prefix_and_stored_masks_do_not_matter():
    a, b = ("wte.weight", "F32", (2, 1), b"12345678"), ("h.0.attn.bias", "U8", (1, 1, 2, 2), b"1011")
    c = ("h.0.attn.c_attn.bias", "F32", (1,), b"abcd")
    prefixed = [(f"transformer.{t[0]}", *t[1:]) for t in (c, a)]
    assert hash_checkpoint([a, b, c]) == hash_checkpoint(prefixed)


def test_a_tied_head_stored_twice_is_the_same_base(make, tmp_path):
    tied = make.llama(tie_word_embeddings=True)
    once, twice = make.save(tmp_path / "once", tied), make.save(tmp_path / "twice", tied)
    state = load_file(twice / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, twice / "model.safetensors", metadata={"format": "pt"})
    one, two = fingerprint_folder(once), fingerprint_folder(twice)
    assert (one.weights, one.parameters) == (two.weights, two.parameters)
    state["lm_head.weight"] += 1
    save_file(state, twice / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_folder(twice).weights != one.weights


def test_vocabulary_is_hard_and_settings_of_the_tokenizer_are_not(base):
    before = fingerprint_folder(base)
    whole = json.loads((base / "tokenizer.json").read_text())
    whole["padding"] = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None,
                        "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}  # fmt: skip
    whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]  # the older spelling
    (base / "tokenizer.json").write_text(json.dumps(whole))
    assert before.differences(fingerprint_folder(base)) == {}
    whole["model"]["vocab"]["new"] = 262
    (base / "tokenizer.json").write_text(json.dumps(whole))
    assert set(before.differences(fingerprint_folder(base))) == {"tokenizer"}
    assert "tokenizer" in HARD


def test_chat_template_is_soft_wherever_it_is_kept(base):
    before = fingerprint_folder(base)
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    without = fingerprint_folder(base)
    assert before.differences(without) == {"chat_template": (before.chat_template[:12], "none")}
    edit_json(base / "tokenizer_config.json", chat_template=template)
    assert before.differences(fingerprint_folder(base)) == {}
    edit_json(base / "tokenizer_config.json", chat_template=template + "!")
    assert set(before.differences(fingerprint_folder(base))) == {"chat_template"}
    assert SOFT == ("chat_template", "format", "codes")


def test_old_and_new_spelling_of_a_config_are_one_architecture(base):
    before = fingerprint_folder(base)
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for key in ("head_dim", "dtype", "transformers_version", "attention_bias", "mlp_bias"):
        config.pop(key, None)
    config.update(rope_theta=rope["rope_theta"], rope_scaling=None, torch_dtype="float32", _name_or_path="x",
                  rms_norm_eps=float.fromhex("0x1.0c6f7ap-20"))  # fmt: skip # 1e-6 after float32
    (base / "config.json").write_text(json.dumps(config))
    assert before.differences(fingerprint_folder(base)) == {}
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 500000.0}))
    found = before.differences(fingerprint_folder(base))
    assert list(found) == ["architecture"]
    assert found["architecture"][0].startswith("llama/")


def test_format_is_soft(base):
    dense = fingerprint_folder(base)
    assert dense.differences(dense.model_copy(update={"format": "nf4"})) == {"format": ("dense", "nf4")}


def test_second_time_reads_no_weights_and_a_change_is_seen(base, monkeypatch):
    age(base)
    calls = counted(monkeypatch)
    first = fingerprint_folder(base)
    assert fingerprint_folder(base) == first
    assert len(calls) == 1
    time.sleep(0.05)  # past the file system's clock tick
    flip_last_byte(base / "model.safetensors")
    age(base)  # same size, same modification time
    assert fingerprint_folder(base).weights != first.weights
    assert len(calls) == 2


def test_a_file_younger_than_its_hash_is_hashed_again(base, monkeypatch):
    calls = counted(monkeypatch)
    future = time.time() + 60
    os.utime(base / "model.safetensors", (future, future))
    assert fingerprint_folder(base) == fingerprint_folder(base)
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}'])
def test_a_broken_cache_is_made_again(base, cache, content):
    age(base)
    first = fingerprint_folder(base)
    (kept,) = (cache / "fingerprints").iterdir()
    kept.write_text(content)
    assert fingerprint_folder(base) == first
    assert BaseFingerprint.model_validate(json.loads(kept.read_text())["fingerprint"]) == first


def test_a_cache_that_cannot_be_written_is_no_error(base, tmp_path):
    (tmp_path / "file").write_text("")
    assert fingerprint_folder(base, cache=tmp_path / "file" / "below").name == "base"


def test_truncated_file_is_named_with_its_sizes(base):
    path = base / "model.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 100)
    with pytest.raises(BaseError, match=f"model.safetensors is truncated: expected {whole} .* found {whole - 100}"):
        fingerprint_folder(base)
    with path.open("r+b") as file:
        file.truncate(50)
    with pytest.raises(BaseError, match=r"model.safetensors is truncated: its header alone needs .* has 50"):
        fingerprint_folder(base)
    path.write_bytes(b"")
    with pytest.raises(BaseError, match=r"model.safetensors has no safetensors header \(0 bytes\)"):
        fingerprint_folder(base)


@pytest.mark.parametrize(
    "header",
    [
        b"not json", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    ],
)  # fmt: skip
def test_corrupt_headers_are_errors_that_name_the_file(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BaseError, match=r"x.safetensors has a corrupt safetensors header"):
        read_header(path)


def test_missing_and_doubled_shards_are_errors(make, tmp_path):
    folder = make.save(tmp_path / "many", shard="10KB")
    shards = sorted(folder.glob("*.safetensors"))
    keep = shards[0].read_bytes()
    shards[0].unlink()
    with pytest.raises(BaseError, match=f"misses {shards[0].name}"):
        fingerprint_folder(folder)
    shards[0].write_bytes(keep)
    shards[1].write_bytes(keep)
    with pytest.raises(BaseError, match=r"holds tensor .*, which .* holds too"):
        fingerprint_folder(folder)


def test_name_is_the_hubs_for_its_cache_and_the_folders_else(base, tmp_path):
    snapshot = tmp_path / "models--org--small-model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    assert fingerprint_folder(snapshot).name == "org/small-model"
