"""One training step of HF PEFT at a time, as a worker that a bench drives over stdin (bench/workers.py).

The question is asked by the bench that starts it: is our training step at least as fast as PEFT's? Two such
workers (ours and this one) in one process tree, stepped in turn, give a ratio that a shared machine does not
bend. The step: LoRA on all seven linears of a bf16 base, `batch` rows of `length` tokens drawn at random from
the vocabulary, the second half of each row targets, SDPA attention, adapters in the dtype PEFT gives them
(float32): forward, loss, backward, clipping at 1.0, AdamW. Nothing padded, nothing checkpointed.

    peers-env/bin/python bench/peers/peft_step.py --base DIR --rank 16 --alpha 32 --batch 8 --length 256 \
        --dtype bfloat16 --seed 0

`seconds` is the whole step with zero_grad; the first steps also pay for page faults and the choice of kernels
(with `--compile` for the compiler), so leave them out. `--autocast` runs the forward under bf16 autocast, as TRL
does: quote the faster of the two. `--nf4` keeps the base in NF4 with double quantisation by bitsandbytes, prepared
as users do.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # workers.py

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from workers import serve

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_SPECIAL = 17  # SmolLM2's vocabulary starts with its special tokens; they are not text


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", type=Path, required=True, help="folder in Hugging Face layout")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=int, default=32)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the base")
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--autocast", action="store_true", help="bf16 autocast around the forward")
    p.add_argument("--compile", action="store_true", help="torch.compile of the model, with its defaults")
    p.add_argument("--nf4", action="store_true", help="the base in 4 bits by bitsandbytes; the rest in float32")
    return p.parse_args()


def make_batch(vocab_size: int, batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [batch, length] int64; labels are -100 on the first half of each row.

    A model that shifts labels itself (transformers does) then has length - length // 2 targets a row.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(N_SPECIAL, vocab_size, (batch, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return ids, labels


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The base as PEFT's users have it."""
    dtype = getattr(torch, args.dtype)
    if not args.nf4:
        return AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, attn_implementation="sdpa")
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        args.base, dtype=dtype, attn_implementation="sdpa", quantization_config=four, device_map="cpu"
    )
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


class Stepper:
    """A PEFT model, its optimizer and one batch; `step` runs one optimizer step on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        base = load(args)
        lora = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=LINEARS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, lora).train()
        for p in self.model.parameters():
            p.sum()  # weights are mapped from their file: their pages belong to the model, not to its first step
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.lr)
        self.ids, self.labels = make_batch(base.config.vocab_size, args.batch, args.length, args.seed)
        self.autocast = args.autocast
        self.forward = torch.compile(self.model) if args.compile else self.model

    def step(self) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.forward(input_ids=self.ids, labels=self.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    serve(Stepper(args).step)


if __name__ == "__main__":
    main()
