"""What is pushed elsewhere is PEFT's layout with a card, comes back bit for bit, or is refused."""

from __future__ import annotations

import json
import sys

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from peft import LoraConfig, PeftConfig
from tiny_adapters import tiny

from deltaw.errors import AdapterError, NotFound, RegistryError, WorkFailed
from deltaw.store.objects import MANIFEST
from deltaw.store.peft import CONFIG, OURS, TENSORS, read_adapter
from deltaw.store.registry import Registry

URL = "memory://hub/support"


@pytest.fixture
def registry(tmp_path) -> Registry:
    MemoryFileSystem.store.clear()
    made = Registry(tmp_path / "registry", create=True)
    made.add("support", tiny(1, metrics={"valid_loss": 0.25}, base="owner/tiny", data_hash="d" * 64))
    made.add("support", tiny(2))
    return made


@pytest.fixture
def other(tmp_path) -> Registry:
    return Registry(tmp_path / "other", create=True)


@pytest.mark.parametrize("kind", ["memory", "folder", "file"])
def test_store_remote_what_is_pushed_comes_back(registry, other, kind, tmp_path):
    url = {"memory": URL, "folder": str(tmp_path / "out"), "file": f"file://{tmp_path}/out"}[kind]
    told = registry.push("support@1", url)
    made = other.pull("mine", url)
    assert made["id"] == told["id"] == tiny(1).id
    back, kept = other.folder("mine"), registry.folder("support@1")
    for name in (CONFIG, TENSORS, OURS):
        assert (back / name).read_bytes() == (kept / name).read_bytes()
    assert other.show("mine@1")["metrics"] == {"valid_loss": 0.25}
    registry.push("support@2", url)  # replaces it
    assert other.pull("mine", url)["version"] == 2


def test_store_remote_a_pushed_folder_is_peft_s_with_a_model_card(registry, tmp_path):
    registry.push("support@1", str(tmp_path / "out"))
    assert read_adapter(tmp_path / "out").id == tiny(1).id
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.base_model_name_or_path) == (3, "owner/tiny")
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "owner/tiny", "library_name": "peft", "tags": ["deltaw", "lora"], "metrics": ["valid_loss"],
    }  # fmt: skip
    assert "| valid_loss | 0.25 |" in body
    assert tiny(1).id in body


def test_store_remote_the_manifest_goes_last_and_half_a_push_is_not_pulled(registry, other, monkeypatch):
    order: list[str] = []
    pipe = MemoryFileSystem.pipe_file

    def watched(self, path, value, **more):
        order.append(path.rpartition("/")[2])
        if len(order) == 3:
            raise ConnectionError("the line is cut")
        pipe(self, path, value, **more)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", watched)
    with pytest.raises(WorkFailed, match=f"Could not push to {URL}: the line is cut"):
        registry.push("support@1", URL)
    with pytest.raises(NotFound, match=f"{MANIFEST} is missing"):
        other.pull("a", URL)
    order[:] = ["again"] * 3
    registry.push("support@1", URL)
    assert order[-1] == MANIFEST
    assert MANIFEST not in order[:-1]
    order[:] = []
    with pytest.raises(WorkFailed, match="the line is cut"):
        registry.push("support@2", URL)  # the adapter that was there is half replaced
    with pytest.raises(NotFound, match=f"{MANIFEST} is missing"):
        other.pull("a", URL)
    assert other.listing() == []


@pytest.mark.parametrize("name", [CONFIG, TENSORS, OURS, "README.md"])
def test_store_remote_a_flipped_bit_is_not_pulled(registry, other, name):
    registry.push("support@1", URL)
    fs = fsspec.filesystem("memory")
    data = bytearray(fs.cat_file(f"/hub/support/{name}"))
    data[len(data) // 2] ^= 1
    fs.pipe_file(f"/hub/support/{name}", bytes(data))
    with pytest.raises(
        AdapterError, match=rf"{name} is not what was pushed \(its SHA-256 differs\): nothing was added"
    ):
        other.pull("a", URL)
    assert other.listing() == []
    assert list((other.root / "aside").iterdir()) == []


@pytest.mark.parametrize(
    "forge",
    [
        lambda m: {**m, "files": {**m["files"], "../../evil.json": m["files"][OURS]}},
        lambda m: {**m, "files": {**m["files"], "weights.bin": m["files"][OURS]}},
        lambda m: {**m, "id": "../" * 20},
        lambda m: {**m, "id": "0" * 64},
        lambda m: [1],
    ],
)
def test_store_remote_a_forged_manifest_is_refused(registry, other, forge):
    registry.push("support@1", URL)
    fs = fsspec.filesystem("memory")
    manifest = json.loads(fs.cat_file(f"/hub/support/{MANIFEST}"))
    fs.pipe_file(f"/hub/support/{MANIFEST}", json.dumps(forge(manifest)).encode())
    with pytest.raises(AdapterError):
        other.pull("a", URL)
    assert other.listing() == []


def test_store_remote_a_place_that_holds_something_else_is_left_alone(registry, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"1")
    with pytest.raises(RegistryError, match=r"something that is no adapter \(me\.jpg\)"):
        registry.push("support", str(tmp_path / "photos"))
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["me.jpg"]
    with pytest.raises(RegistryError, match="is a file"):
        registry.push("support", str(tmp_path / "photos" / "me.jpg"))


def test_store_remote_a_plain_peft_folder_is_sent_to_add(registry, other, tmp_path):
    registry.push("support", str(tmp_path / "out"))
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(NotFound, match="then `deltaw adapters add`"):
        other.pull("a", str(tmp_path / "out"))


def test_store_remote_a_missing_package_and_an_unknown_place_are_named(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(RegistryError, match="s3:// needs the package s3fs, which is not installed"):
        registry.push("support", "s3://bucket/support")
    with pytest.raises(RegistryError, match="no place that fsspec knows"):
        registry.pull("support", "nowhere://x")
