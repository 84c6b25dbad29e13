"""Write a base with its linear maps in 4 or 8 bits, so that quantising is paid once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.core.fingerprint import SOURCE_FILE, fingerprint_folder
from deltaw.data.source import Row, data_hash, read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import encode_all
from deltaw.errors import BaseError, DataError
from deltaw.formats.calibrate import DAMPING
from deltaw.merge.checkpoint import SHARD_BYTES, Planned, write_shards
from deltaw.merge.write import refuse_used, write_beside, write_config
from deltaw.model.calibrated import calibrate, windows
from deltaw.model.load import DTYPES, load_tokenizer, load_transformers, resolve_base
from deltaw.model.originals import originals
from deltaw.model.quantised import Format, frozen_weights, saved_config
from deltaw.model.sites import find_sites
from deltaw.model.tuned import tune_scales
from deltaw.store.files import whole_folder, write_text

Say = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """Text that codes are chosen for.

    data    a file of rows (what `read_rows` reads), or a .txt file: one document
    tokens  most of it to read, in its order
    passes  over it to tune the scales in, by what the dense base answers; 0: they stay as the codes' search left them

    Raises DataError for counts that are not possible.
    """

    data: str | Path
    tokens: int = 16_384
    passes: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.passes < 0:
            raise DataError(f"calibration on {self.tokens} tokens in {self.passes} passes is not possible.")

    def rows(self) -> list[Row]:
        """The documents. Raises DataError."""
        if Path(self.data).suffix != ".txt":
            return read_rows(self.data)
        try:
            text = Path(self.data).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise DataError(
                f"the text {str(self.data)!r} cannot be read: {problem}.\n  Give a UTF-8 file."
            ) from problem
        if not text.strip():
            raise DataError(f"{self.data} is empty.\n  Give a file with text to calibrate on.")
        return [Row(text=text, source=str(self.data))]


@dataclass(frozen=True)
class QuantiseReport:
    """What `quantise_base` wrote.

    format            of the linear maps, as in "nf4+dq"
    bits              of such a weight, constants included
    n_quantised       linear maps in that format
    quantised_bytes   of those maps, constants included; dense_bytes is everything else
    size_bytes        of the weight files
    calibration       what codes were chosen for: the data's name and hash, tokens, window, damping, maps reached, and
                      what tuning the scales did; None where each value has its nearest level
    """

    out: str
    base: str
    format: str
    bits: float
    n_quantised: int
    quantised_bytes: int
    dense_bytes: int
    size_bytes: int
    seconds: float
    calibration: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def quantise_base(
    base: str | Path,
    out: str | Path,
    how: Format,
    *,
    dtype: str | None = None,
    calibration: Calibration | None = None,
    say: Say | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantiseReport:
    """Quantise a base and write it as a folder, whole or not at all. nf4 and fp4 are written as bitsandbytes does.

    base   a folder in Hugging Face layout, a hub id, a .gguf file, or a starter name; not quantised yet
    out    a folder that is not there yet, or empty
    how    format, block size, double quantisation
    dtype  of what stays dense (head, embeddings, norms, biases); None: the checkpoint's
    calibration  text to choose the codes for (GPTQ); None: the nearest levels, which are bitsandbytes' own bytes

    Raises BaseError, DataError (no text, too little), RunError (`out` holds something), WorkFailed (a full disk).
    """
    started = time.monotonic()
    out = Path(out)
    refuse_used(out)
    folder = resolve_base(base, say=say)
    source = fingerprint_folder(folder)
    if source.format != "dense":
        raise BaseError(f"{folder} is quantised already ({source.format}).\n  Give the model that it was made from.")
    own = source.dtype if source.dtype in DTYPES else "float32"
    dtype = dtype or own
    rows = None if calibration is None else calibration.rows()  # a wrong text is said at once
    if say:
        say(f"quantising {folder} to {how}")
    with whole_folder(out) as aside:  # first: a place that cannot be written to is said before the work
        net = load_transformers(folder, dtype, how)
        told = None
        if calibration is not None and rows is not None:
            told = _calibrated(net, folder, how, rows, calibration, say)
        size = _write_tensors(net, aside, shard_bytes)
        write_config(folder, aside, dtype=dtype, tied=None, vocab_size=None)
        _write_format(net, aside, how, dtype)
        write_beside(folder, aside, None)
        digest = fingerprint_folder(aside, checked=False).weights
        codes = "" if told is None else _hash_of_codes(net)
        kept = source.model_copy(update={"format": str(how), "codes": codes})
        note = {"name": source.name, "fingerprint": kept.model_dump(), "sha256": digest}
        note |= {} if told is None else {"calibration": told}
        write_text(aside / SOURCE_FILE, json.dumps(note, indent=2) + "\n")
        refuse_used(out)  # by another process, in the meantime
    return QuantiseReport(
        out=str(out),
        base=source.short(),
        format=str(how),
        size_bytes=size,
        seconds=round(time.monotonic() - started, 3),
        calibration=told,
        **_sizes(net),
    )


def _hash_of_codes(net: PreTrainedModel) -> str:
    """SHA-256 over the codes and scales of all quantised maps, by name: the same whatever dtype the rest is kept in."""
    whole = hashlib.sha256()
    for name, weight in sorted(frozen_weights(net).items()):
        for part, tensor in sorted(weight.named_buffers()):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            whole.update(f"{name}.{part}|{len(raw)}|".encode() + raw)
    return whole.hexdigest()


def _sizes(net: PreTrainedModel) -> dict[str, Any]:
    frozen = frozen_weights(net)
    n_bytes = sum(w.nbytes() for w in frozen.values())
    n_values = sum(w.in_features * w.out_features for w in frozen.values())
    return {
        "bits": 8 * n_bytes / max(n_values, 1),
        "n_quantised": len(frozen),
        "quantised_bytes": n_bytes,
        "dense_bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
    }


def _calibrated(
    net: PreTrainedModel, folder: Path, how: Format, rows: list[Row], job: Calibration, say: Say | None
) -> dict[str, Any]:
    """Choose the codes of `net` again for a text, then tune its scales; what the folder keeps of that."""
    spec = DataSpec(max_tokens=max(2, job.tokens), too_long="cut")
    ids = windows(net, encode_all(rows, load_tokenizer(folder), spec).examples, job.tokens)
    if say:
        say(f"calibrating on {ids.numel():,} tokens of {rows[0].source}")
    left = calibrate(net, how, _dense_maps(folder, net, say), ids, say)
    if left and say:
        say(f"{len(left)} maps were not reached and have their nearest levels: {', '.join(left[:5])}")
    told: dict[str, Any] = {
        "data": Path(rows[0].source).name,
        "data_hash": data_hash(rows),
        "tokens": ids.numel(),
        "window": ids.shape[1],
        "damping": DAMPING,
        "maps": len(frozen_weights(net)) - len(left),
    }
    if job.passes:
        dtype = str(net.dtype).removeprefix("torch.")
        told["tuned"] = asdict(tune_scales(net, load_transformers(folder, dtype), ids, job.passes, say))
    return told


def _dense_maps(folder: Path, net: PreTrainedModel, say: Say | None) -> Callable[[str], Tensor]:
    """A function from a map's name to its W [out, in]: from the files, or where these name it in another way than the
    network does, from the whole dense network, which is then loaded."""
    read = originals(folder, find_sites(net), net.base_model_prefix)

    @cache
    def whole() -> PreTrainedModel:
        if say:
            say("the files name maps in another way than the network: loading the whole dense model beside it")
        own = fingerprint_folder(folder).dtype
        return load_transformers(folder, own if own in DTYPES else "float32")

    def dense(name: str) -> Tensor:
        try:
            return read(name)
        except BaseError:
            weight: Tensor = whole().get_submodule(name).weight
            return weight.T if find_sites(net)[name].kind == "conv1d" else weight

    return dense


def requantise(folder: Path, how: Format, dtype: str, shard_bytes: int) -> int:
    """Quantise the dense weights of a folder in place; returns bytes of the new files."""
    net = load_transformers(folder, dtype, how)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    size = _write_tensors(net, folder, shard_bytes)
    _write_format(net, folder, how, dtype)
    return size


def _write_tensors(net: PreTrainedModel, folder: Path, shard_bytes: int) -> int:
    """Every tensor of the network, a tied one once, under the network's own names; returns bytes of the files."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        plain = dict(net.named_parameters())
        hidden = {id(t) for w in frozen_weights(net).values() for t in w.buffers()}
        kept = net.state_dict()
        yield from plain.items()
        yield from ((n, t) for n, t in net.named_buffers() if n in kept and id(t) not in hidden)
        for name, weight in frozen_weights(net).items():
            yield from ((f"{name}.{part}", t) for part, t in weight.entries().items())

    planned = [Planned(name, t.numel() * t.element_size()) for name, t in tensors()]
    return write_shards(folder, planned, ((n, t.detach().contiguous()) for n, t in tensors()), shard_bytes)


def _write_format(net: PreTrainedModel, folder: Path, how: Format, dtype: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    left = [n for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    config["quantization_config"] = saved_config(how, dtype, left)
    write_text(path, json.dumps(config, indent=2) + "\n")
