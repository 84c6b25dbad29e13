"""The same adapter, merged by HF PEFT and by us: the same tensors."""

from __future__ import annotations

import pytest
import torch
from made_bases import TEXT, plain, stored
from peft import LoraConfig, get_peft_model

from deltaw.merge.bake import bake
from deltaw.model.identity import OtherBaseWarning
from models import make_net

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")]

CONFIGS = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "bias": "lora_only"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "alpha_pattern": {"c_attn": 7}},
    "phi": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"fc1": 5}},
    "mistral": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_adapter_merges_to_pefts_tensors(saved, tmp_path, kind):
    base = saved(make_net(kind))
    model = get_peft_model(plain(base), LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **CONFIGS[kind]))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    model.save_pretrained(tmp_path / "adapter")

    with pytest.warns(OtherBaseWarning, match="unknown, not checked"):
        report = bake(base, tmp_path / "adapter", tmp_path / "out", text=TEXT)

    assert report.probe.logit_max < 1e-4
    wanted = model.merge_and_unload().state_dict()
    found = stored(tmp_path / "out")
    for name, value in found.items():
        # sums of 3 to 5 terms in another order
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-6, msg=name)
    assert set(wanted) - set(found) <= {"lm_head.weight"}
