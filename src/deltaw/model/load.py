"""From a name to a base in memory: its folder, tokenizer and network; what cannot be trusted is refused."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from deltaw.core.checkpoint_files import checkpoint_files, read_header, read_json
from deltaw.core.misfits import not_finite, some
from deltaw.errors import BaseError, WorkFailed, near
from deltaw.model.kinds import AUTO, NAMES, folder_kind, has_head, make_head, not_in, with_labels
from deltaw.model.quantised import Format, argument, own_config, saved_format, settle
from deltaw.model.quiet import UNUSABLE, making, quiet
from deltaw.model.starter import STARTERS, Say, convert_gguf, fetch_starter, is_no_space
from deltaw.model.unsupported import refuse_unsupported

__all__ = [
    "DTYPES",
    "check_finite",
    "folder_format",
    "load_tokenizer",
    "load_transformers",
    "refuse_unsupported",
    "resolve_base",
]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
NOT_HUB_FILES = ["*/*", "consolidated*"]  # copies in other formats
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
HUB_ANSWER_S = 10


def local_path(name: str) -> Path:
    """A base's name as a path of this machine, there or not. Raises BaseError where it cannot be one."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, not to be entered, the home of nobody
        why = getattr(error, "strerror", None) or error
        raise BaseError(f"the base {name[:200]!r} cannot be looked for: {why}.") from None
    return path


def resolve_base(path_or_name: str | Path, *, say: Say | None = None) -> Path:
    """The folder of a base, from a starter name, a folder, a .gguf file or a hub id; fetched once.

    Raises BaseError that lists what was tried; WorkFailed when a download fails half way or the disk is full.
    """
    name = os.fspath(path_or_name)
    if name in STARTERS:
        return fetch_starter(name, say=say)
    if not name.strip():
        raise BaseError("the base has an empty name.\n  Give a folder, hub id, .gguf file or starter name.")
    path = local_path(name)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return convert_gguf(path, say=say)
        raise BaseError(f"{path} is a file, but not a .gguf.\n  Give a model's folder in Hugging Face layout.")
    tried = [f"starter names: {', '.join(STARTERS)}", f"folder or .gguf file {path.absolute()}: not there"]
    if not isinstance(path_or_name, Path) and HUB_ID.fullmatch(name) and path.suffix.lower() != ".gguf":
        return _from_hub(name, tried, say)
    raise _not_found(name, tried)


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a base (what resolve_base takes). Raises BaseError when it has none that loads."""
    folder = resolve_base(path_or_name)
    try:
        with making():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # transformers raises many kinds for a missing or broken tokenizer
        raise BaseError(
            f"{folder} has no tokenizer that loads: {_first_line(problem)}\n"
            "  A base needs its tokenizer.json (or vocabulary files) and tokenizer_config.json."
        ) from problem
    if not tokenizer.is_fast:
        raise BaseError(
            f"the tokenizer of {folder} ({type(tokenizer).__name__}) gives no character offsets.\n"
            "  Use a version of the model with a tokenizer.json."
        )
    return tokenizer


def load_transformers(
    folder: Path, dtype: str, how: Format | None = None, labels: Sequence[str] | None = None, seed: int = 0
) -> PreTrainedModel:
    """The frozen network of a folder in Hugging Face layout, in eval mode, on the CPU.

    dtype   a key of DTYPES; weights are converted while they load
    how     the format to keep linear maps in; None: as the folder has them
    labels  of a text classifier; None: as the folder's head has them
    seed    of a head that the folder has not

    Raises BaseError: no config, no safetensors (pickles are refused), a truncated file, an architecture that
    is no language model of a known kind, an encoder without labels, tensors that are missing, left over or misshapen,
    weights that are quantised already in another way.
    """
    if dtype not in DTYPES:
        raise BaseError(f"unknown dtype {dtype!r}.{near(dtype, DTYPES)} Known: {', '.join(DTYPES)}.")
    for file in checkpoint_files(folder):
        read_header(file)
    saved = _saved_as(folder, how)
    how = saved or how
    plain = read_json(folder / "config.json")
    kind = folder_kind(plain, labels, folder)
    try:
        with making():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config.__dict__.pop("quantization_config", None)
            config = with_labels(config, labels)
            if saved is not None:
                config.quantization_config = own_config(saved)
            net, info = AUTO[kind].from_pretrained(
                folder,
                config=config,
                quantization_config=argument(how) if how is not None and saved is None else None,
                dtype=DTYPES[dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that `info` lists them all
                output_loading_info=True,
            )
    except BaseError as problem:
        raise BaseError(f"{folder}: {problem}") from problem
    except UNUSABLE as problem:
        raise BaseError(
            f"{folder} does not load as a {NAMES[kind]}: {_first_line(problem)}\n"
            "  Check config.json; models that need code from their repository are refused."
        ) from problem
    if how is not None:
        settle(net, folder)
    if kind == "classify" and not has_head(plain):
        info |= {
            "missing_keys": make_head(net, info["missing_keys"], seed),
            "unexpected_keys": not_in(net, info["unexpected_keys"]),
        }
    _check_complete(folder, info)
    net = net.eval().requires_grad_(False)
    check_finite(net)
    if kind == "causal":
        check_causal(net)
    return net


def _saved_as(folder: Path, how: Format | None) -> Format | None:
    """The format of the folder's weights. Raises BaseError where they cannot become `how`."""
    saved = folder_format(folder)
    if saved is not None and how is not None and not saved.serves(how):
        raise BaseError(
            f"{folder} holds {saved} weights: they cannot become {how}.\n"
            "  Quantise the 16- or 32-bit model that it was made from, or leave the format out."
        )
    return saved


def folder_format(folder: Path) -> Format | None:
    """How the weights of a folder are quantised; None when they are not. Raises BaseError for ways unknown to us."""
    config = read_json(folder / "config.json")
    try:
        return saved_format(config)
    except BaseError as problem:
        raise BaseError(f"{folder}: {problem}") from problem


@torch.no_grad()
def check_causal(net: PreTrainedModel) -> None:
    """Raise BaseError when a token changes what is computed before it: an encoder, not a causal language model."""
    n_vocab = net.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], dtype=torch.long) % n_vocab
    first, second = (net(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in ids)
    scale = float(first.abs().max())
    if ids[0, -1] != ids[1, -1] and not torch.allclose(first, second, rtol=0, atol=1e-5 * scale):
        raise BaseError(
            f"this base ({type(net).__name__}) looks at tokens that come later, so it is not a causal language model.\n"
            "  Give a causal one (a decoder); for BERT-like configs that means is_decoder=true."
        )


def check_finite(model: torch.nn.Module) -> None:
    """Raise BaseError, naming the tensors, when a parameter or buffer holds NaN or infinity."""
    bad = not_finite({n: t for n, t in model.state_dict().items() if t.is_floating_point()})
    if bad:
        raise BaseError(f"the base holds NaN or infinity in {some(bad)}.\n  Download or convert it again.")


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Raise BaseError unless the checkpoint held every tensor of the network, in its shape, and no other."""
    misshapen = [f"{n} (file {list(a)}, model {list(b)})" for n, a, b in sorted(info["mismatched_keys"])]
    taken = {item[0] for item in info["mismatched_keys"]}
    problems = [
        ("missing", sorted(set(info["missing_keys"]) - taken)),
        ("unknown", sorted(info["unexpected_keys"])),
        ("misshapen", misshapen),
    ]
    said = [f"  {kind}: {some(names)}" for kind, names in problems if names]
    if said:
        raise BaseError(
            f"the weights of {folder} do not fit its config.json:\n" + "\n".join(said) + "\n"
            "  Download the model again; folder and config must belong together."
        )


def _from_hub(name: str, tried: list[str], say: Say | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if say and not constants.HF_HUB_OFFLINE:
        say(f"looking for {name} on the Hugging Face hub")
    try:
        with quiet():
            folder = snapshot_download(
                name, allow_patterns=HUB_FILES, ignore_patterns=NOT_HUB_FILES, etag_timeout=HUB_ANSWER_S
            )
    except LocalEntryNotFoundError as problem:
        why = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        raise _not_found(name, [*tried, f"hub id {name}: {why}, and it is not in the hub's cache"]) from problem
    except Exception as problem:
        if is_no_space(problem):
            raise WorkFailed(
                f"no space left on the disk of {constants.HF_HUB_CACHE} while fetching {name}.\n"
                "  Free some space, or set HF_HOME to a folder on a larger disk; then run again."
            ) from problem
        raise _not_found(name, [*tried, f"hub id {name}: {_first_line(problem)}"]) from problem
    return Path(folder)


def _not_found(name: str, tried: list[str]) -> BaseError:
    # a typing error in a starter name is likelier than a hub id of the same letters
    hint = difflib.get_close_matches(name.lower().rpartition("/")[2], list(STARTERS), n=1, cutoff=0.5)
    meant = f" Did you mean {hint[0]!r}?" if hint else ""
    lines = "".join(f"\n  tried {line}" for line in tried)
    return BaseError(f"no base called {name!r} was found.{meant}{lines}")


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__
