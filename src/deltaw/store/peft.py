"""Adapters on disk: HF PEFT's layout, both ways, plus deltaw.json.

    adapter_config.json        PEFT's settings
    adapter_model.safetensors  tensors under PEFT's names
    deltaw.json                our settings, the base's fingerprint, provenance, and the adapter's id

Reading is strict: every tensor must be understood, nothing is guessed, a pickle is refused by name.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from deltaw.core.adapter import Adapter, Replacement
from deltaw.core.checkpoint_files import read_header
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.misfits import misfits, some
from deltaw.core.site import LinearSite, Site, plain_site, site_from
from deltaw.core.spec import MethodSpec
from deltaw.core.targets import ALL_LINEAR, matches
from deltaw.errors import AdapterError, DeltawError, NotFound
from deltaw.methods import METHODS, spec_from
from deltaw.store.card import short_card
from deltaw.store.files import whole_folder
from deltaw.store.peft_options import refuse_unknown

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "deltaw.json"
FORMAT = 1  # of deltaw.json
_OURS = {CONFIG, TENSORS, OURS, "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
_OURS |= {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"}
FILES = frozenset(_OURS)
"""Every file that a saved adapter may consist of."""
_FOREIGN = (".lora_", ".ia3_", ".vera_", ".adapter_down", ".adapter_up")  # names that only a method's tensors have
_TOKENS = ".token_adapter.trainable_tokens_delta"
_COPIES = re.compile(r".*\.(original_module|modules_to_save)\.(.*\.)?bias")  # PEFT's, with bias="all"
_TASKS = {"classify": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
_HEADS = ("classifier", "score")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class UnfinishedRun(UserWarning):
    """An adapter is read out of a run that has not ended."""


def write_adapter(adapter: Adapter, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write `adapter` into `folder`, whole or not at all; an adapter that is there is replaced.

    tokenizer  saved beside an adapter with new tokens, so that PEFT's AutoPeftModel grows the base by itself

    Raises AdapterError when `folder` holds anything else, WorkFailed when the disk is full.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    if adapter.spec.peft_type is None:
        raise AdapterError(f"Method {adapter.spec.name!r} has no adapter to save.")
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in to_peft_tensors(adapter).items()}
    config = to_peft_config(adapter)
    ours = {
        "format": FORMAT,
        "id": adapter.id,
        "spec": adapter.spec.model_dump(mode="json"),
        "fingerprint": None if adapter.fingerprint is None else adapter.fingerprint.model_dump(),
        "places": [plain_site(p) for p in adapter.places],
        **({"overrides": adapter.overrides} if adapter.overrides else {}),
        "provenance": adapter.provenance,
    }
    with whole_folder(folder) as aside:
        save_file(tensors, aside / TENSORS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")  # of a pattern the first key counts
        (aside / OURS).write_text(json.dumps(ours, indent=1, default=str) + "\n")
        (aside / "README.md").write_text(short_card(adapter, config["base_model_name_or_path"]), encoding="utf-8")
        if tokenizer is not None and adapter.spec.new_tokens:
            tokenizer.save_pretrained(aside)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Raise AdapterError where `write_adapter` would write over something that is no adapter."""
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file; an adapter is a folder. Choose another name.")
    if foreign := sorted(p.name for p in folder.glob("*") if p.name not in _OURS):
        raise AdapterError(f"{folder} holds something that is not an adapter's ({foreign[0]}); choose another folder.")


def to_peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    prefix = type(adapter.spec).peft_prefix
    kinds = {p.name: _where(p) for p in adapter.places}
    names = {(param, kind): key for key, (param, kind) in type(adapter.spec).peft_params().items()}
    out: dict[str, Tensor] = {}
    for site, params in adapter.sites.items():
        for param, tensor in params.items():
            if kinds[site] == "virtual":
                out[names[param, "virtual"]] = tensor
            elif param == "bias":
                out[f"{prefix}{site}.{'bias' if len(params) == 1 else 'base_layer.bias'}"] = tensor
            else:
                out[f"{prefix}{site}.{names.get((param, kinds[site])) or names[param, 'any']}"] = tensor
    out |= {names[param, "shared"]: tensor for param, tensor in adapter.shared.items()}
    for r in adapter.replaced:
        if r.rows is None:
            out[prefix + r.tensor] = r.value
        else:
            out[prefix + r.tensor.removesuffix(".weight") + _TOKENS] = r.value
    return out


def _where(site: Site) -> str:
    """Which names of `peft_params` belong to a place."""
    return {"conv1d": "linear", "input": "virtual", "cache": "virtual"}.get(site.kind, site.kind)


def to_peft_config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's adapter_config.json for `adapter`."""
    spec = adapter.spec
    targeted = [p for p in adapter.places if set(adapter.sites[p.name]) != {"bias"} or not spec.wants(p)]
    tokens = {
        r.tensor.removesuffix(".weight").rsplit(".", 1)[-1]: list(r.rows)
        for r in adapter.replaced
        if r.rows is not None
    }
    noted = adapter.provenance
    base = (
        noted.get("base_model_name_or_path")
        or noted.get("base")
        or (adapter.fingerprint.name if adapter.fingerprint else None)
    )
    return {
        "peft_type": spec.peft_type,
        "task_type": _TASKS.get(noted.get("kind", ""), "CAUSAL_LM"),
        "base_model_name_or_path": base,
        "inference_mode": True,
        **({"target_modules": _target_modules(spec, targeted)} if spec.sits == "linear" else {}),
        "modules_to_save": _modules_to_save(adapter) or None,
        **({"trainable_token_indices": tokens} if tokens else {}),
        **spec.to_peft(targeted),
    }


def _modules_to_save(adapter: Adapter) -> list[str]:
    """Of a classifier with both of PEFT's names for a head, as PEFT writes them whatever the base has."""
    own = list(adapter.spec.save_modules)
    both = _HEADS if adapter.provenance.get("kind") == "classify" else ()
    return [*own, *(name for name in both if name not in own)]


def _target_modules(spec: MethodSpec, targeted: list[Site]) -> list[str] | str:
    """Short names where they say the same, else whole paths."""
    if spec.exclude is None and spec.layers is None:
        if isinstance(spec.targets, str) and spec.targets.lower() != ALL_LINEAR:
            return spec.targets if spec.choose([]) is None else sorted(p.name for p in targeted)
        return sorted({p.role for p in targeted}) if isinstance(spec.targets, str) else sorted(spec.targets)
    return sorted(p.name for p in targeted)


def adapter_folder(path: str | Path) -> Path:
    """The folder that holds an adapter: `path` itself, or the adapter inside a run's folder."""
    path = Path(path)
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            run = folder.parent
            if folder.name == "adapter" and (run / "run.json").is_file() and not (run / "done.json").is_file():
                warnings.warn(f"The run in {run} is not done: this is its best so far.", UnfinishedRun, stacklevel=3)
            return folder
    if (path / "model" / "config.json").is_file():
        raise AdapterError(f"{path} is a run that trained a whole model: use {path / 'model'} as the base.")
    if not path.exists():
        raise NotFound(f"No adapter at {path}: there is no such folder.")
    inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
    hint = f" There is one in its folder {' and '.join(map(repr, inside))}." if inside else ""
    raise AdapterError(f"{path} holds no adapter: {CONFIG} is missing.{hint}")


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter that PEFT or deltaw saved.

    Raises AdapterError: no safetensors (a pickle is refused by name), truncated or unknown tensors,
    settings that we cannot represent, or bytes that are not those that were saved.
    """
    folder = adapter_folder(path)
    config = _json(folder / CONFIG)
    tensors = _tensors(folder)
    ours = _json(folder / OURS) if (folder / OURS).is_file() else None
    if ours and ours.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / OURS} is of format {ours.get('format')!r}; this deltaw reads format {FORMAT}. Use the deltaw "
            f"that wrote it, or delete {OURS} to read the folder as a foreign adapter."
        )
    try:
        spec = _spec(config, ours)
        known = {p["name"]: site_from(p) for p in ours["places"]} if ours else {}
        print_ = ours.get("fingerprint") if ours else None
        fingerprint = BaseFingerprint(**print_) if print_ else None
        overrides, provenance = (_object(ours, key) for key in ("overrides", "provenance"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DeltawError):
            raise
        raise AdapterError(f"{folder / OURS} is not what deltaw writes: {error}") from None
    sites, shared, places, replaced = _understood(tensors, config, spec, known)
    adapter = Adapter(
        spec=spec,
        sites=sites,
        places=tuple(places[s] for s in sites),
        shared=shared,
        replaced=tuple(replaced),
        overrides=overrides,
        fingerprint=fingerprint,
        provenance=provenance if ours else _told(config),
    )
    if ours and adapter.id != ours.get("id"):
        raise AdapterError(
            f"{folder}: the adapter is not the one that was saved (its id is {adapter.id[:12]}, deltaw.json says "
            f"{str(ours.get('id'))[:12]}). A file was changed or damaged; restore it, or delete deltaw.json to "
            "read it as a foreign adapter."
        )
    if ours:
        wanted = to_peft_config(adapter)
        _agree(
            config, {key: wanted.get(key) for key in ("target_modules", "modules_to_save", "trainable_token_indices")}
        )
    return adapter


def _object(ours: dict[str, Any] | None, key: str) -> dict[str, Any]:
    value = (ours or {}).get(key, {})
    if not isinstance(value, dict):
        raise TypeError(f"{key} is {type(value).__name__}, not an object")
    return value


def _told(config: dict[str, Any]) -> dict[str, Any]:
    """What PEFT's file tells of where an adapter comes from."""
    kind = next((kind for kind, name in _TASKS.items() if name == config.get("task_type")), None)
    base = config.get("base_model_name_or_path")
    return {"base": base if isinstance(base, str) else None, **({} if kind is None else {"kind": kind})}


def noted(path: str | Path) -> dict[str, Any]:
    """What the adapter in a folder tells of where it comes from: "kind" and "labels" of its base, where it has them.

    Raises AdapterError, NotFound.
    """
    folder = adapter_folder(path)
    ours = _json(folder / OURS) if (folder / OURS).is_file() else None
    found = _told(_json(folder / CONFIG)) if ours is None else ours.get("provenance")
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds {type(value).__name__}, not an object.")
    return value


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles:
            raise AdapterError(
                f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read: refused. "
                f"Save it as {TENSORS} with PEFT (safe_serialization=True)."
            )
        raise AdapterError(f"{folder} has no {TENSORS}.")
    try:  # by bytes: safetensors 0.8's safe_open, behind load_file, keeps two integers of every tensor for ever
        found = load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise AdapterError(f"{path} ({size} bytes) is truncated or no safetensors file: {error}") from None
    if not found:
        raise AdapterError(f"{path} holds no tensors.")
    if odd := sorted(name for name, t in found.items() if t.dtype not in _DTYPES or t.ndim == 0):
        what = str(found[odd[0]].dtype).removeprefix("torch.")
        raise AdapterError(
            f"{path} holds {odd[0]} as {what} of shape {list(found[odd[0]].shape)}; an adapter's tensors are float32, "
            "float16, bfloat16 or float64, of one dimension or more. Save it again as one of these."
        )
    order = read_header(path)  # `load` gives tensors in no order
    return {name: found[name] for name in sorted(found, key=lambda name: (order[name][2:], name))}


def _spec(config: dict[str, Any], ours: dict[str, Any] | None) -> MethodSpec:
    method = next((m for m in METHODS if m.reads_peft(config)), None)
    if method is None:
        known = sorted({m.peft_type for m in METHODS if m.peft_type})
        raise AdapterError(f"{CONFIG} says peft_type={config.get('peft_type')!r}; known here: {', '.join(known)}.")
    if ours is None:
        spec = method.from_peft(config)
        refuse_unknown(config, also=set(spec.to_peft([])))
        return spec
    spec = spec_from(ours["spec"])
    wanted = spec.to_peft([])
    wanted.pop("fan_in_fan_out", None)
    _agree(config, wanted)
    return spec


def _agree(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise AdapterError where PEFT's file says something else than ours."""
    for key, value in wanted.items():
        if key in config and config[key] != value:
            raise AdapterError(
                f"{CONFIG} and {OURS} disagree on {key}: {config[key]!r} and {value!r}. "
                f"Undo the edit, or delete {OURS} to read it as a foreign adapter."
            )


def _understood(
    tensors: dict[str, Tensor], config: dict[str, Any], spec: MethodSpec, known: dict[str, Site]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Site], list[Replacement]]:
    """Each tensor as a parameter at a site, a shared one or a replacement; AdapterError lists what is neither."""
    sites: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    replaced: list[Replacement] = []
    unknown: list[str] = []
    names, prefix = type(spec).peft_params(), type(spec).peft_prefix
    whole = {key: found for key, found in names.items() if found[1] in ("shared", "virtual")}
    for key, tensor in tensors.items():
        path = key.removeprefix(prefix)
        if _COPIES.fullmatch(path):
            continue  # a saved module's bias is in the file under its own name too
        hit = next((s for s in names if s not in whole and path.endswith("." + s)), None)
        if key in whole:
            param, kind = whole[key]
            site = {"input": "prompt", "cache": "prefix"}.get(type(spec).sits, "")
            (shared if kind == "shared" else sites.setdefault(site, {}))[param] = tensor
            kinds[site] = kind
        elif not key.startswith(prefix):
            unknown.append(key)
        elif hit is not None:
            site = path.removesuffix("." + hit)
            param, kind = names[hit]
            kinds |= {} if kind == "any" else {site: kind}
            sites.setdefault(site, {})[param] = tensor
        elif path.endswith(".base_layer.bias") and spec.trains_biases:
            sites.setdefault(path.removesuffix(".base_layer.bias"), {})["bias"] = tensor
        elif path.endswith(_TOKENS):
            module = path.removesuffix(_TOKENS)
            replaced.append(Replacement(module + ".weight", tensor, _token_rows(config, module)))
        elif path.endswith(".bias") and _is_its_own(path.removesuffix(".bias"), spec, known):
            sites.setdefault(path.removesuffix(".bias"), {})["bias"] = tensor
        elif any(mark in path for mark in _FOREIGN):
            unknown.append(key)
        else:
            replaced.append(Replacement(path.replace(".base_layer.", "."), tensor))
    if unknown:
        raise AdapterError(f"{TENSORS} holds tensors that method {spec.name!r} does not have: {some(unknown)}.")
    places = {s: known.get(s) or _place(type(spec), s, params, kinds.get(s, "linear")) for s, params in sites.items()}
    if not known:
        _refuse_contradictions(spec, sites, places)
    return sites, shared, places, replaced


def _refuse_contradictions(spec: MethodSpec, sites: dict[str, dict[str, Tensor]], places: dict[str, Site]) -> None:
    """Raise AdapterError where factors, which tell the sizes of a foreign adapter's places, are not as its settings."""
    problems = []
    for name, params in sites.items():
        told = {"A", "B"} & set(params) or set(params) == {"bias"}  # VeRA's vectors tell no sizes
        if told and type(spec).peft_site(name, params) is None and places[name].kind in ("linear", "embedding"):
            wanted = spec.shapes(places[name], set(params) != {"bias"})
            problems += misfits(name, wanted, params, "its settings need")
    if problems:
        raise AdapterError(f"{TENSORS} is not what {CONFIG} says: {some(problems, between='; ')}.")


def _is_its_own(module: str, spec: MethodSpec, known: dict[str, Site]) -> bool:
    """Whether the bias of `module` is a parameter of the method there, not a tensor that the adapter replaces."""
    return module in known or (not type(spec).peft_params() and matches(spec.targets, module))


def _place(method: type[MethodSpec], name: str, params: dict[str, Tensor], kind: str) -> Site:
    if (site := method.peft_site(name, params)) is not None:
        return site
    n_in = params["A"].shape[-1] if "A" in params else 0
    n_out = params["B"].shape[0] if "B" in params else params["bias"].shape[0] if "bias" in params else 0
    return LinearSite(name, n_in, n_out, "embedding" if kind == "embedding" else "linear", "bias" in params)


def _token_rows(config: dict[str, Any], module: str) -> tuple[int, ...]:
    rows = config.get("trainable_token_indices")
    if isinstance(rows, dict):
        rows = next((v for k, v in rows.items() if module == k or module.endswith("." + k)), None)
    if not isinstance(rows, list):
        raise AdapterError(f"{CONFIG} does not say which rows of {module} its tensor holds.")
    return tuple(rows)
