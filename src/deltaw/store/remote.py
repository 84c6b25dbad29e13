"""Adapters pushed to and pulled from other places, through fsspec: folders, memory://, s3://, hf://owner/repo.

Data files go first and the manifest last, so that a push that was cut short is never taken for an adapter.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deltaw.errors import AdapterError, DeltawError, NotFound, RegistryError, WorkFailed
from deltaw.store.card import model_card
from deltaw.store.files import space_explained
from deltaw.store.leases import aside
from deltaw.store.objects import MANIFEST, read_manifest
from deltaw.store.peft import FILES, OURS, TENSORS, read_adapter

if TYPE_CHECKING:
    from deltaw.store.registry import Registry

CARD = "README.md"
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}


def push(registry: Registry, ref: str, url: str) -> dict[str, Any]:
    """Copy an adapter to `url` in PEFT's layout, with a model card and its manifest; an adapter there is replaced.

    Returns {"id", "url", "files", "bytes"}. Raises AdapterError (damaged here), RegistryError (no such kind of place,
    or it holds something else), WorkFailed (the place refuses).
    """
    found = registry.resolve(ref)
    folder = registry.folder(ref)
    kept = read_manifest((folder / MANIFEST).read_bytes(), MANIFEST)["files"]
    content = {name: (folder / name).read_bytes() for name in kept}
    if flipped := [n for n, data in content.items() if hashlib.sha256(data).hexdigest() != kept[n]["sha256"]]:
        raise AdapterError(f"{ref}: {flipped[0]} changed while it was read; nothing was pushed.")
    content[CARD] = model_card(read_adapter(folder), str(found)).encode()
    files = {n: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for n, b in sorted(content.items())}
    manifest = json.dumps({"format": 1, "id": found.id, "files": files}, indent=1) + "\n"
    fs, root = _place(url)
    with _explained("push to", url):
        there = _names(fs, root)
        if foreign := sorted(there - FILES - {MANIFEST, ".gitattributes"}):
            raise RegistryError(f"{url} holds something that is no adapter ({foreign[0]}). Choose another place.")
        if MANIFEST in there:
            fs.rm_file(posixpath.join(root, MANIFEST))
        fs.makedirs(root, exist_ok=True)
        for name, data in content.items():
            fs.pipe_file(posixpath.join(root, name), data)
        for name in (there & FILES) - set(content):
            fs.rm_file(posixpath.join(root, name))
        fs.pipe_file(posixpath.join(root, MANIFEST), manifest.encode())
    return {"id": found.id, "url": url, "files": len(files) + 1, "bytes": sum(f["bytes"] for f in files.values())}


def pull(registry: Registry, name: str, url: str) -> dict[str, Any]:
    """Add the adapter that `push` wrote to `url` as the next version of `name`, every hash checked first.

    Returns what Registry.add does. Raises NotFound (nothing whole there), AdapterError (other bytes than its
    manifest says), RegistryError, WorkFailed.
    """
    fs, root = _place(url)
    with aside(registry.root) as folder, space_explained("an adapter", folder):
        with _explained("pull from", url):
            there = _names(fs, root)
            if MANIFEST not in there:
                hint = " It is PEFT's: fetch its folder, then `deltaw adapters add`." if TENSORS in there else ""
                raise NotFound(f"No adapter that was pushed whole lies at {url}: {MANIFEST} is missing.{hint}")
            manifest = read_manifest(fs.cat_file(posixpath.join(root, MANIFEST)), f"{url}/{MANIFEST}")
            for file, told in manifest["files"].items():
                data = fs.cat_file(posixpath.join(root, file))
                if hashlib.sha256(data).hexdigest() != told["sha256"]:
                    raise AdapterError(f"{url}/{file} is not what was pushed (its SHA-256 differs): nothing was added.")
                (folder / file).write_bytes(data)
        if OURS not in manifest["files"] or read_adapter(folder).id != manifest["id"]:
            raise AdapterError(f"{url} says that it holds {manifest['id'][:12]}, and does not: nothing was added.")
        return registry.add(name, folder)


def _place(url: str) -> tuple[Any, str]:
    """The file system and the path in it. Raises RegistryError where a package is missing, or the kind is unknown."""
    kind = url.partition("://")[0] if "://" in url else "file"
    try:
        fs, root = fsspec.core.url_to_fs(url if "://" in url else str(Path(url).expanduser().absolute()))
    except ImportError:
        package = _PACKAGES.get(kind, f"the fsspec file system for {kind}://")
        raise RegistryError(f"{kind}:// needs the package {package}, which is not installed: pip install it.") from None
    except ValueError as problem:
        raise RegistryError(f"{url} names no place that fsspec knows: {problem}.") from None
    return fs, root.rstrip("/")


def _names(fs: Any, root: str) -> set[str]:
    """Names in a remote folder; none where there is no folder."""
    try:
        if isinstance(fs, LocalFileSystem) and Path(root).is_file():
            raise RegistryError(f"{root} is a file; an adapter is pushed to a folder.")
        fs.invalidate_cache()
        return {posixpath.basename(str(path).rstrip("/")) for path in fs.ls(root, detail=False)}
    except FileNotFoundError:
        return set()


@contextmanager
def _explained(what: str, url: str) -> Iterator[None]:
    try:
        yield
    except DeltawError:
        raise
    except Exception as problem:  # every file system raises its own classes
        if isinstance(problem, OSError) and problem.errno == 28:
            raise
        first = (str(problem) or type(problem).__name__).splitlines()[0]
        raise WorkFailed(f"Could not {what} {url}: {first}") from problem
