"""Which kind of base a folder is: a causal language model, an encoder-decoder, or an encoder that classifies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from deltaw.core.spec import MethodSpec
from deltaw.data.task import Kind, read_labels
from deltaw.errors import BaseError, TargetError

AUTO: dict[Kind, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classify": AutoModelForSequenceClassification,
}
NAMES: dict[Kind, str] = {
    "causal": "causal language model",
    "seq2seq": "encoder-decoder model",
    "classify": "text classifier",
}
HEADS = ("classifier", "score")
"""What PEFT takes for a classifier's head, and trains beside every method."""

_CLASSIFIES = "ForSequenceClassification"
_GIVE_LABELS = (
    "Give labels to classify with it: data.labels in a recipe, --labels, or load_base(..., labels=[...]). "
    "To go on with texts, give a causal language model."
)


def kind_of(net: PreTrainedModel) -> Kind:
    """What a network computes."""
    if type(net).__name__.endswith(_CLASSIFIES):
        return "classify"
    return "seq2seq" if getattr(net.config, "is_encoder_decoder", False) else "causal"


def folder_kind(config: Mapping[str, Any], labels: Sequence[str] | None, where: Path | str) -> Kind:
    """What the folder with this config.json is loaded as; with `labels` anything but an encoder-decoder classifies.

    Raises BaseError for an encoder without a head and without labels, a head that is no classifier of one label a text,
    labels for an encoder-decoder, or others than the folder's head has; DataError for labels that are no list of them.
    """
    labels = None if labels is None else read_labels(tuple(labels))
    declared = [str(name) for name in config.get("architectures") or ()]
    named = ", ".join(declared) or str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        if labels is not None or has_head(config):
            raise BaseError(f"{where} is an encoder-decoder ({named}): it answers in words, and cannot classify here.")
        return "seq2seq"
    if has_head(config):
        _check_head(config, labels, where)
        return "classify"
    if labels is None and wants_labels(config):
        what = "a masked language model" if named.endswith("ForMaskedLM") else "an encoder"
        raise BaseError(f"{where} is {what} ({named}): there is no head to answer with.\n  {_GIVE_LABELS}")
    return "causal" if labels is None else "classify"


def wants_labels(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json classifies, by its own head or by one that is to be learned."""
    if config.get("is_encoder_decoder"):
        return False
    declared = [str(name) for name in config.get("architectures") or ()]
    words = ("LMHeadModel", "ForCausalLM")  # BertLMHeadModel
    bare = all(n.endswith(("Model", "ForMaskedLM", "ForPreTraining")) and not n.endswith(words) for n in declared)
    is_encoder = config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    return has_head(config) or (bare and is_encoder)


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether the folder with this config.json is a text classifier."""
    return any(str(name).endswith(_CLASSIFIES) for name in config.get("architectures") or ())


def _check_head(config: Mapping[str, Any], labels: Sequence[str] | None, where: Path | str) -> None:
    names = [str(name) for name in (config.get("id2label") or {}).values()] or ["LABEL_0", "LABEL_1"]
    problem = config.get("problem_type")
    if len(names) < 2 or problem not in (None, "single_label_classification"):
        what = problem or "regression: it has one output"
        raise BaseError(f"the head of {where} does not choose one of several labels ({what}): that is not supported.")
    if labels is None or list(labels) == names:
        return
    if len(labels) != len(names) or not all(name.startswith("LABEL_") for name in names):
        raise BaseError(
            f"{where} has a head for {len(names)} labels ({', '.join(names[:6])}), and {len(labels)} others were given "
            f"({', '.join(labels[:6])}).\n  Leave the labels out, or give the encoder without its head."
        )


def with_labels(config: Any, labels: Sequence[str] | None) -> Any:
    """`config` with `labels`, changed in place; None leaves its own."""
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}
    return config


def labels_of(net: PreTrainedModel) -> tuple[str, ...]:
    """The labels of a classifier, by their numbers; none of another kind."""
    if kind_of(net) != "classify":
        return ()
    return tuple(str(net.config.id2label[i]) for i in range(net.config.num_labels))


def outside_encoder(net: PreTrainedModel) -> set[str]:
    """The modules of a classifier beside its encoder; none of another kind."""
    if kind_of(net) != "classify":
        return set()
    return {name for name, _ in net.named_children() if name != net.base_model_prefix}


def head_config(net: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of a classifier's head, so that transformers loads it as one; nothing of another kind."""
    names = labels_of(net)
    if not names:
        return {}
    by_number = {str(i): name for i, name in enumerate(names)}
    by_name = {name: i for i, name in enumerate(names)}
    return {"architectures": [type(net).__name__], "id2label": by_number, "label2id": by_name}


def refuse_idle_embedding(net: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise TargetError where `names` (of modules or tensors) hold T5's or BART's `shared`: encoder and decoder have
    embeddings of their own with its weight, and never call it."""
    shared = net.get_input_embeddings()
    others = [n for n, m in net.named_modules() if m is not shared and getattr(m, "weight", None) is shared.weight]
    name = next((n for n, m in net.named_modules() if m is shared), None)
    if kind_of(net) == "seq2seq" and name is not None and any(n in (name, f"{name}.weight") for n in names):
        raise TargetError(
            f"{name} is never called in {type(net).__name__}. Name those with its weight: {', '.join(others)}."
        )


# The head ------------------------------------------------------------------------------------------


def not_in(net: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Of a folder's tensors that `net` does not have, those that belong to no other head: they are too many."""
    prefix = net.base_model_prefix
    inside = {name for name, _ in net.base_model.named_children()}
    return [k for k in unexpected if k.split(".")[0] in {prefix, *inside} and "pooler" not in k.split(".")]


@torch.no_grad()
def make_head(net: PreTrainedModel, missing: Iterable[str], seed: int) -> list[str]:
    """Draw the tensors that the folder has none of: those of the head and of the pooler before it.

    missing  their names. They are kept in `net.fresh_tensors`
    returns  names of missing tensors that belong to the encoder itself; they are left alone

    Matrices are normal with the config's `initializer_range`; biases and norms start as transformers starts them.
    """
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = dict(net.named_parameters())
    wanted = set(missing)
    outside = set(_beside(net))
    std = float(getattr(net.config, "initializer_range", 0.02))
    for name in (n for n in tensors if n in wanted & outside and tensors[n].ndim > 1):
        tensors[name].copy_(torch.randn(tensors[name].shape, generator=rng, dtype=torch.float32) * std)
    net.fresh_tensors = tuple(n for n in tensors if n in wanted & outside)
    return sorted(wanted - outside)


def mark_fresh(net: PreTrainedModel, config: Mapping[str, Any], names: set[str] | None) -> None:
    """Note of an empty network which tensors `make_head` would draw.

    names  of the tensors that the folder holds; None: it has no files, and is taken to lack the head alone
    """
    if kind_of(net) != "classify" or has_head(config):
        return
    prefix, beside = net.base_model_prefix + ".", _beside(net)
    if names is None:
        net.fresh_tensors = tuple(n for n in beside if not n.startswith(prefix))
    else:
        there = {name.removeprefix(prefix) for name in names}
        net.fresh_tensors = tuple(n for n in beside if n.removeprefix(prefix) not in there)


def _beside(net: PreTrainedModel) -> list[str]:
    """The tensors that a folder of the encoder alone may lack: of the head, and of a pooler."""
    return [n for n, _ in net.named_parameters() if n.split(".")[0] in outside_encoder(net) or "pooler" in n.split(".")]


def fresh_tensors(net: PreTrainedModel) -> tuple[str, ...]:
    """The tensors of `net` that no checkpoint holds: a head to be learned."""
    return getattr(net, "fresh_tensors", ())


def head_modules(net: PreTrainedModel) -> tuple[str, ...]:
    """The modules of a classifier that train whole beside every method: its head, and what is fresh."""
    if kind_of(net) != "classify":
        return ()
    children = [name for name, _ in net.named_children()]
    found = [head for head in HEADS if any(name.endswith(head) for name in children)]
    for name in (tensor.rpartition(".")[0] for tensor in fresh_tensors(net)):
        if name not in found and not name.split(".")[0].endswith(HEADS):
            found.append(name)
    return tuple(found)


def with_head(spec: MethodSpec, net: PreTrainedModel) -> MethodSpec:
    """`spec` with a classifier's head among the modules that train whole beside the method, as PEFT has it."""
    more = tuple(name for name in head_modules(net) if name not in spec.save_modules)
    return spec if spec.trains_base or not more else spec.model_copy(update={"save_modules": spec.save_modules + more})
