"""Which base is this: hashes of a checkpoint folder's weights, architecture, vocabulary and chat template.

Nothing here loads a model: safetensors files are checked and hashed as bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from deltaw.core.checkpoint_files import broken, checkpoint_files, read_header, read_json

__all__ = [
    "HARD",
    "SOFT",
    "SOURCE_FILE",
    "BaseFingerprint",
    "cache_dir",
    "fingerprint_folder",
    "hash_checkpoint",
    "set_cache_dir",
]

HARD = ("weights", "architecture", "tokenizer")  # a difference is an error
SOFT = ("chat_template", "format", "codes")  # a difference is a warning
SOURCE_FILE = "deltaw_base.json"
"""In a folder deltaw made: `name`, the base's human name, and `source`, the file it was converted from. In one that it
quantised also `fingerprint`, the dense checkpoint's, and `sha256`, over the quantised tensors."""

CACHE_VERSION = 2
CLOCK_TICK_NS = 50_000_000  # a file changed this shortly before it was hashed could change again unseen
HASH_THREADS = 4
VOCABULARIES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
PREFIXES = ("model.", "transformer.", "gpt_neox.", "backbone.")
MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NOT_ARCHITECTURE = re.compile(
    r"_.*|transformers_version|torch_dtype|dtype|use_cache|quantization_config|architectures|auto_map"
    r"|initializer_range|tie_word_embeddings|(bos|eos|pad|unk|sep|decoder_start)_token_id|pretraining_tp"
    r"|task_specific_params|id2label|label2id|output_attentions|output_hidden_states|return_dict|problem_type"
    r"|chunk_size_feed_forward|gradient_checkpointing"
)
"""Keys of config.json that do not change what the weights compute. A tie is seen in the weights."""

Tensor = tuple[str, str, tuple[int, ...], memoryview | bytes]

_state: dict[str, Path | None] = {}


def cache_dir() -> Path:
    """The folder for what can be made again (converted bases, fingerprints): by default the user's cache."""
    return _state.get("cache") or Path(platformdirs.user_cache_dir("deltaw"))


def set_cache_dir(folder: Path | None) -> None:
    """Use `folder` as the cache of this process; None goes back to the user's cache."""
    _state["cache"] = folder


class BaseFingerprint(BaseModel):
    """Which base. Hashes are SHA-256 in hex; `tokenizer` or `chat_template` is "" where a folder has none.

    `weights` covers sorted (name, shape, bytes); `architecture` the keys of config.json that define the
    computation; `tokenizer` the vocabulary, merges and added tokens. `format` is how the weights are held
    (dense, nf4 ...); a quantised model keeps the hashes of the dense checkpoint it was made from. `codes` covers the
    codes and scales of one that were chosen for a text; "" where each value has its nearest level, and then it is not
    written, so that such a fingerprint has the bytes it always had.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    name: str
    weights: str
    architecture: str
    model_type: str
    tokenizer: str
    chat_template: str
    format: str = "dense"
    dtype: str = ""
    parameters: int
    codes: str = ""

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        return found if self.codes else {k: v for k, v in found.items() if k != "codes"}

    def differences(self, other: BaseFingerprint) -> dict[str, tuple[str, str]]:
        """Fields of HARD and SOFT that differ, as {field: (mine, theirs)} in short, readable form.

        A base without a tokenizer is not at odds with any, and codes are compared within a format only.
        """
        found: dict[str, tuple[str, str]] = {}
        for field in HARD + SOFT:
            mine, theirs = getattr(self, field), getattr(other, field)
            idle = (field == "tokenizer" and "" in (mine, theirs)) or (field == "codes" and "format" in found)
            if mine != theirs and not idle:
                found[field] = (self._readable(field), other._readable(field))
        return found

    def short(self) -> str:
        """For people: "SmolLM2-135M-Instruct@9f0c21"."""
        return f"{self.name}@{self.weights[:6]}"

    def _readable(self, field: str) -> str:
        value = str(getattr(self, field))
        if field == "format":
            return value
        if field == "codes" and not value:
            return "the nearest levels"
        return f"{self.model_type}/{value[:12]}" if field == "architecture" else value[:12] or "none"


def fingerprint_folder(folder: Path, cache: Path | None = None, *, checked: bool = True) -> BaseFingerprint:
    """The fingerprint of a folder in Hugging Face layout; from the cache while no file in it has changed.

    cache    folder that keeps fingerprints; None is cache_dir() / "fingerprints"
    checked  False: the folder's own bytes, without what a quantised one says of its source; nothing is kept

    Raises BaseError when the folder has no config.json, no safetensors, or a truncated or corrupt one.
    """
    folder = Path(folder)
    files = checkpoint_files(folder)
    started_ns = time.time_ns()
    key = _files_key(folder, files)
    kept_in = (cache or cache_dir() / "fingerprints") / f"{_sha256(str(folder.resolve()).encode())[:32]}.json"
    kept = _read_kept(kept_in, key)
    if kept is not None and checked:
        return kept
    config = read_json(folder / "config.json")
    weights, parameters, dtype = _hash_files(files, tied=config.get("tie_word_embeddings") is not False)
    fingerprint = BaseFingerprint(
        name=_human_name(folder),
        weights=weights,
        architecture=_told(folder / "config.json", lambda: _sha256(_canonical(_architecture(config)))),
        model_type=str(config.get("model_type", "")),
        tokenizer=_told(folder / "tokenizer.json", lambda: _hash_tokenizer(folder)),
        chat_template=_hash_chat_template(folder),
        format=_saved_format(config),
        dtype=dtype,
        parameters=parameters,
    )
    if not checked:
        return fingerprint
    if fingerprint.format != "dense":
        fingerprint = _of_source(folder, fingerprint)
    _keep(kept_in, {"version": CACHE_VERSION, "hashed_ns": started_ns, "key": key}, fingerprint)
    return fingerprint


def _saved_format(config: dict[str, Any]) -> str:
    """ "dense", or by its quantisation's short name what the folder's weights are kept in."""
    found = config.get("quantization_config") or {}
    if not isinstance(found, dict):
        return str(found)
    return str(found.get("name") or found.get("bnb_4bit_quant_type") or found.get("quant_method") or "dense")


def _of_source(folder: Path, own: BaseFingerprint) -> BaseFingerprint:
    """The identity of the dense checkpoint that a quantised folder was made from, where the folder says so."""
    note = read_json(folder / SOURCE_FILE) if (folder / SOURCE_FILE).is_file() else {}
    if "fingerprint" not in note:
        return own
    if note.get("sha256") != own.weights:
        raise broken(folder, f"was changed after it was quantised: its tensors hash to {own.weights[:12]}")
    try:
        source = BaseFingerprint.model_validate(note["fingerprint"])
    except ValidationError as problem:
        raise broken(
            folder / SOURCE_FILE, f"holds no fingerprint: {problem.error_count()} fields are wrong"
        ) from problem
    here = ("architecture", "tokenizer", "chat_template", "dtype")
    return source.model_copy(update={field: getattr(own, field) for field in here})


def hash_checkpoint(tensors: Iterable[Tensor], *, tied: bool = True) -> str:
    """SHA-256 (hex) over the sorted canonical (name, shape, bytes) of (name, dtype, shape, buffer).

    The order of tensors and their spread over files do not matter, nor does the prefix of the inner model.
    tied     a head whose bytes equal an embedding's is left out: files store such a tie once or twice
    """
    return _hash_tensors(tensors, tied=tied)[0]


def _hash_files(files: Iterable[Path], *, tied: bool) -> tuple[str, int, str]:
    """Digest, number of parameters and most frequent dtype of safetensors files, read through maps."""
    tensors: list[Tensor] = []
    held_by: dict[str, str] = {}
    for path in files:
        header = read_header(path)
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for name, (dtype, shape, first, last) in header.items():
            if name in held_by:
                raise broken(path, f"holds tensor {name!r}, which {held_by[name]} holds too")
            held_by[name] = path.name
            tensors.append((name, dtype, shape, view[first:last]))
    sizes: Counter[str] = Counter()
    for _, dtype, shape, _ in tensors:
        sizes[dtype] += math.prod(shape) * (1 if dtype in DTYPES else 0)  # codes have no dtype of the model
    common = sizes.most_common(1)[0][0] if sizes else ""
    return *_hash_tensors(tensors, tied=tied), DTYPES.get(common, common.lower())


def _hash_tensors(tensors: Iterable[Tensor], *, tied: bool) -> tuple[str, int]:
    """The digest of hash_checkpoint, and the number of parameters in it."""
    named = [(_canonical_name(name), shape, data) for name, _, shape, data in tensors if not _is_mask(name, shape)]
    named.sort(key=lambda item: item[:2])
    # hashlib lets go of the GIL on big buffers, so threads share the work
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda item: hashlib.sha256(item[2]).digest(), named))
    entries = [(name, shape, digest) for (name, shape, _), digest in zip(named, digests, strict=True)]
    embeddings = {e[1:] for e in entries if e[0] not in HEADS and ("emb" in e[0] or "wte" in e[0])}
    whole, parameters = hashlib.sha256(b"deltaw checkpoint 1"), 0
    for name, shape, digest in entries:
        if tied and name in HEADS and (shape, digest) in embeddings:
            continue
        parameters += math.prod(shape)
        for part in (name.encode(), repr(shape).encode(), digest):
            whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest(), parameters


def _canonical_name(name: str) -> str:
    """A tensor's name without the inner model's prefix, which some files have and others leave out."""
    return next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)), name)


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a constant (causal mask, rotary frequencies) that old files hold and new ones do not."""
    return name.endswith("rotary_emb.inv_freq") or (name.endswith(MASKS) and len(shape) in (0, 4))


def _told(path: Path, hashed: Callable[[], str]) -> str:
    """A part of the fingerprint. Raises BaseError for a file whose entries are of other kinds than a model's."""
    try:
        return hashed()
    except (AttributeError, KeyError, TypeError, ArithmeticError) as problem:
        raise broken(path, f"is not what a model's file holds ({problem})") from problem


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config that define the computation; what has several spellings gets one."""
    kept = {k: v for k, v in config.items() if not NOT_ARCHITECTURE.fullmatch(k)}
    rope = {**(kept.pop("rope_scaling", None) or {}), **(kept.pop("rope_parameters", None) or {})}
    kept = {k: _architecture(v) if isinstance(v, dict) else v for k, v in kept.items()}
    for name in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(name, kept.pop(name, None))
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", None))
    defaults = {"rope_type": "default", "rope_theta": 10000.0}
    kept["rope"] = {k: v for k, v in rope.items() if v is not None and v != defaults.get(k)}
    heads, width = kept.get("num_attention_heads"), kept.get("hidden_size")
    if kept.get("num_key_value_heads") == heads:
        kept.pop("num_key_value_heads", None)
    if heads and width and kept.get("head_dim") == width // heads:
        del kept["head_dim"]
    if set(kept.get("layer_types") or ()) == {"full_attention"}:
        del kept["layer_types"]
    if config.get("use_sliding_window") is False:
        kept = {k: v for k, v in kept.items() if k not in ("sliding_window", "max_window_layers")}
    return {k: v for k, v in kept.items() if v is not None and v is not False and v != {} and v != []}


def _hash_tokenizer(folder: Path) -> str:
    """Hash of vocabulary, merges and added tokens; padding, truncation and decoding settings do not count."""
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
        model = whole.get("model") or {}
        vocab, merges = model.get("vocab") or {}, model.get("merges") or []
        added = {token["content"]: token["id"] for token in whole.get("added_tokens") or []}
    else:
        found = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
        return _sha256(b"".join(path.read_bytes() for path in found)) if found else ""
    if isinstance(vocab, dict):
        vocab, added = {**vocab, **added}, {}  # files differ in whether the vocabulary lists added tokens too
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return _sha256(_canonical({"vocab": vocab, "merges": merges, "added": added}))


def _hash_chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return _sha256((folder / "chat_template.jinja").read_text(encoding="utf-8").encode())
    settings = folder / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if not template:
        return ""
    return _sha256(template.encode() if isinstance(template, str) else _canonical(template))


def _human_name(folder: Path) -> str:
    if (folder / SOURCE_FILE).is_file():
        return str(read_json(folder / SOURCE_FILE).get("name", folder.name))
    whole = folder.resolve()
    hub = re.search(r"models--([^/\\]+)[/\\]snapshots", str(whole))
    return hub[1].replace("--", "/", 1) if hub else whole.name


def _canonical(value: Any) -> bytes:
    """Bytes of JSON with sorted keys; floats at 7 digits, so that 1e-5 through float32 is 1e-5 still."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, list):
            return [plain(v) for v in x]
        return f"{x:.7g}" if isinstance(x, float) else x

    return json.dumps(plain(value), sort_keys=True, separators=(",", ":")).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _files_key(folder: Path, weights: list[Path]) -> list[list[Any]]:
    """What stands for the files' content: name, size, times, inode."""
    small = [p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".txt", ".model")]
    stats = [(path.name, path.stat()) for path in sorted({*weights, *small})]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]


def _read_kept(path: Path, key: list[list[Any]]) -> BaseFingerprint | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        newest_ns = max(entry[2] for entry in key)
        settled = newest_ns <= kept["hashed_ns"] - CLOCK_TICK_NS
        if settled and kept["version"] == CACHE_VERSION and kept["key"] == key:
            return BaseFingerprint.model_validate(kept["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass  # absent or of another version: it is made again
    return None


def _keep(path: Path, entry: dict[str, Any], fingerprint: BaseFingerprint) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written (full, read-only) costs time, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({**entry, "fingerprint": fingerprint.model_dump()}, file)
        os.replace(aside, path)
