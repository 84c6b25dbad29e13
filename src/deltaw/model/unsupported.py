"""Networks that adapters or formats on linear maps reach only in part: mixtures of experts, vision and audio towers."""

from __future__ import annotations

from transformers import PreTrainedModel

from deltaw.core.misfits import some
from deltaw.errors import BaseError

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOWERS = ("vision_config", "audio_config")


def refuse_unsupported(model: PreTrainedModel, *, attention_only: bool) -> None:
    """Refuse mixtures of experts and models with vision or audio towers, unless only attention is targeted.

    Fused experts are bare 3-D parameters that no adapter on linear maps reaches: adapting the rest in
    silence would be a wrong answer. Raises BaseError naming the modules.
    """
    if not attention_only:
        advice = "Target only attention projections (for example q_proj, k_proj, v_proj, o_proj)."
        _refuse(model, "its experts cannot wear adapters yet", advice)


def refuse_unquantisable(model: PreTrainedModel) -> None:
    """Refuse to quantise mixtures of experts and models with vision or audio towers: most of them would stay dense.

    Raises BaseError naming the modules.
    """
    _refuse(model, "its experts cannot be quantised yet", "Load it with format='dense', or take a dense text model.")


def _refuse(model: PreTrainedModel, lack: str, advice: str) -> None:
    experts = _expert_modules(model)
    if experts:
        raise BaseError(f"{model.config.model_type} is a mixture of experts, and {lack}: {some(experts)}.\n  {advice}")
    towers = [key for key in TOWERS if getattr(model.config, key, None) is not None]
    if towers:
        kinds = tuple(key.removesuffix("_config") for key in towers)
        modules = [n for n, _ in model.named_modules() if n and n.rsplit(".", 1)[-1].startswith(kinds)]
        raise BaseError(
            f"{model.config.model_type} is not a plain text model ({', '.join(towers)} in its config): "
            f"{some(modules or list(kinds))}.\n  {advice}"
        )


def _expert_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that hold experts, of MoE blocks when only the config tells, or []."""
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "experts" in parts:
            found[".".join(parts[: parts.index("experts") + 1])] = None
        elif parameter.ndim == 3 and ("experts" in name or "moe" in name):
            found[name.rpartition(".")[0]] = None
    config = model.config.get_text_config()
    holders = (config, getattr(config, "ffn_config", None))
    counted = [
        f"{key}={n}"
        for holder in holders
        for key in EXPERT_COUNTS
        if isinstance(n := getattr(holder, key, None), int) and n > 0
    ]
    return list(found) or counted
