"""The safetensors files of a checkpoint folder: which they are, and whether their headers are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from deltaw.errors import BaseError

HEADER_LIMIT_BYTES = 100_000_000
ITEM_BYTES = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
ITEM_BYTES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
ITEM_BYTES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, as transformers chooses them.

    Raises BaseError when there are none (pickles are refused by name) or an indexed shard is missing.
    """
    if not (folder / "config.json").is_file():
        raise BaseError(f"{folder} has no config.json.\n  Give a model's folder in Hugging Face layout.")
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise broken(index, "has no weight_map of tensors to files")
        shards = sorted(set(named.values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            what = f"{folder} misses {', '.join(missing)}, which {index.name} names"
            raise BaseError(f"{what}.\n  Download the model again.")
        return [folder / name for name in shards]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise BaseError(
            f"{folder} holds its weights in {', '.join(pickles)}. Pickles may run code when they are read:\n"
            "  they are refused. Use a safetensors version, or convert it where you trust it:\n"
            "  AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise BaseError(f"{folder} has no model.safetensors, nor {index.name}.\n  Is the download complete?")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Tensors of a safetensors file, checked: {name: (dtype, shape, first byte in the file, end byte)}.

    Raises BaseError naming the file, with expected and found sizes where it is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if size < 8 or n > HEADER_LIMIT_BYTES:
            raise broken(path, f"has no safetensors header ({size} bytes)")
        if size < 8 + n:
            raise broken(path, f"is truncated: its header alone needs {8 + n} bytes, the file has {size}")
        raw = file.read(n)
    found = {}
    try:
        for name, tensor in json.loads(raw).items():
            if name != "__metadata__":
                first, last = (8 + n + int(offset) for offset in tensor["data_offsets"])
                found[name] = str(tensor["dtype"]), tuple(map(int, tensor["shape"])), first, last
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise broken(path, f"has a corrupt safetensors header ({problem})") from problem
    end = 8 + n
    for name, (dtype, shape, first, last) in sorted(found.items(), key=lambda item: item[1][2:]):
        item = ITEM_BYTES.get(dtype)
        if first != end or last < first or (item and last - first != item * math.prod(shape)):
            where = f"{name}: {dtype} {shape} at {first}-{last}"
            raise broken(path, f"has a corrupt safetensors header ({where})")
        end = last
    if size != end:
        what = "is truncated" if size < end else "has bytes after its last tensor"
        raise broken(path, f"{what}: expected {end} bytes, found {size}")
    return found


def broken(path: Path, what: str) -> BaseError:
    """The error for a file that is not what its name says."""
    return BaseError(f"{path} {what}.\n  Download or copy the file again.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. Raises BaseError for anything else, and where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"{path.parent} has no {path.name}.\n  Give a model's folder in Hugging Face layout.") from None
    except OSError as problem:
        raise broken(path, f"cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise broken(path, f"is not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise broken(path, f"holds a JSON {type(value).__name__}, not an object")
    return value
