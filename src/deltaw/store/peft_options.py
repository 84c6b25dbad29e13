"""The options of PEFT's adapter_config.json that we know: what they mean is read, or changes no answer."""

from __future__ import annotations

from typing import Any

from deltaw.errors import AdapterError

KNOWN = frozenset([
    # of every method
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "trainable_token_indices", "ensure_weight_tying",
    # LoRA and DoRA, as PEFT 0.21 has them
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora", "qalora_group_size",
    "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora", "arrow_config",
    "kasa_config",
    # IA3, VeRA
    "feedforward_modules", "init_ia3_weights", "projection_prng_key", "save_projection", "vera_dropout", "d_initial",
    "init_weights",
    # prompt, prefix and p-tuning
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_hidden_size", "prefix_projection", "encoder_reparameterization_type", "encoder_num_layers",
    "encoder_dropout",
])  # fmt: skip


def refuse_unknown(config: dict[str, Any], also: set[str]) -> None:
    """Raise AdapterError for options, switched on, that neither PEFT 0.21 nor the method (`also`) has."""
    odd = {key: value for key, value in config.items() if value and key not in KNOWN and key not in also}
    if odd:
        shown = ", ".join(f"{key}={value!r:.60}" for key, value in odd.items())
        raise AdapterError(
            f"adapter_config.json asks for {shown}, which this deltaw does not know: a later PEFT, or another program, "
            "wrote it. Convert the adapter there, or take the option out of the file if no answer depends on it."
        )
