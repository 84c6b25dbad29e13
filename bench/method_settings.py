"""The methods that bench_methods.py and bench_learning_rates.py compare: a label, and what it adds to a recipe."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"method": "full"}, "base": {"dtype": "float32"}},
    "galore": {
        "adapter": {"method": "full"},
        "base": {"dtype": "float32"},
        "train": {"optimizer": {"name": "galore", "rank": 128}},
    },
    "lora": {"adapter": {"method": "lora", "rank": 16, "alpha": 32}},
    "lora+": {
        "adapter": {"method": "lora", "rank": 16, "alpha": 32},
        "train": {"optimizer": {"name": "lora_plus"}},
    },
    "pissa": {"adapter": {"method": "lora", "rank": 16, "alpha": 32, "start": "pissa"}},
    "qlora": {
        "adapter": {"method": "lora", "rank": 16, "alpha": 32},
        "base": {"format": "nf4", "double_quant": True},
    },
    "loftq": {
        "adapter": {"method": "lora", "rank": 16, "alpha": 32, "start": "loftq"},
        "base": {"format": "nf4", "double_quant": True},
    },
    "dora": {"adapter": {"method": "dora", "rank": 16, "alpha": 32}},
    "longlora": {"adapter": {"method": "longlora", "rank": 16, "alpha": 32}},
    "vera": {"adapter": {"method": "vera", "rank": 256}},
    "ia3": {"adapter": {"method": "ia3"}},
    "bitfit": {"adapter": {"method": "bitfit", "add": True}},
    "houlsby": {"adapter": {"method": "houlsby", "bottleneck": 64}},
    "parallel": {"adapter": {"method": "houlsby", "bottleneck": 64, "placement": "parallel"}},
    "prefix": {"adapter": {"method": "prefix", "n_tokens": 20}},
    "ptuning": {"adapter": {"method": "ptuning", "n_tokens": 20}},
    "prompt": {"adapter": {"method": "prompt", "n_tokens": 20}},
}
LORA_LIKE = ("lora", "lora+", "pissa", "qlora", "loftq", "dora", "longlora")
"""Those that must come within 0.03 of full fine-tuning."""
