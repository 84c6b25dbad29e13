"""How accurate, how fast and how large is TRL + PEFT on supersense (one epoch of LoRA, on a CPU)?

The naive answer it gives: what a user gets today from `SFTTrainer` with `LoraConfig`, and TRL's own
defaults wherever no flag below says otherwise (linear schedule without warm-up, AdamW, no weight decay,
clipping at 1.0, gradient checkpointing on, bf16 autocast around a bf16 base, adapters in float32, padded
batches in random order, no packing). `deltaw train` on the same rows must reach its accuracy.
What would change our mind: another seed, or `--no-checkpointing`, moving `value` by more than 0.02. Flags that make it
faster: `--no-checkpointing`, `--group-by-length`, `--batch`, `--no-autocast`.

It runs in an environment of its own, on two threads:

    python3 -m venv peers-env
    peers-env/bin/pip install torch==2.13.0
    peers-env/bin/pip install "transformers>=5.20,<6" peft trl datasets accelerate
    peers-env/bin/python bench/peers/trl_supersense.py --base DIR --train train.jsonl --test test.jsonl \
        --out bench/results/supersense_peers.jsonl

A row: `value` is the share of the `n` test rows whose greedy output, stripped, equals the completion;
`tokens_per_s` counts each training token once and no padding; `train_seconds` is the wall clock of
`trainer.train()`, `train_cpu_seconds` the processor time of all its threads (less than threads x wall where
the machine is shared); `peak_rss_mb` is the process's peak at the end of training, in MB (10^6 bytes; its first
row has MiB). What was not read is null, as is `value` without `--test`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ["torch", "transformers", "peft", "trl", "accelerate", "datasets"]


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", type=Path, required=True, help="folder in Hugging Face layout")
    p.add_argument("--train", type=Path, required=True, help="JSONL of prompt and completion")
    p.add_argument("--test", type=Path, help="JSONL to score the result on")
    p.add_argument("--labels", choices=["none"], default="none", help="decoding is free, no list of labels")
    p.add_argument("--save", type=Path, help="folder for the adapter")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=int, default=32)
    p.add_argument("--epochs", type=float, default=1)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--max-steps", type=int, default=-1, help="stop early (a trial; the row says so)")
    p.add_argument("--limit-test", type=int, default=None, help="score the first N test rows only")
    p.add_argument("--no-checkpointing", action="store_true", help="switch TRL's gradient checkpointing off")
    p.add_argument("--no-autocast", action="store_true", help="switch TRL's bf16 autocast off")
    p.add_argument("--group-by-length", action="store_true", help="batches of rows of like length: less padding")
    p.add_argument("--out", type=Path, help="JSONL the row is appended to")
    return p.parse_args()


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def describe_machine() -> dict:
    """CPU model, usable cores, and whether the bf16 instructions are there (Linux; null elsewhere)."""
    info = Path("/proc/cpuinfo")
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in (info.read_text().split("\n\n")[0].splitlines() if info.exists() else [])
        if ":" in line
    )
    flags = fields["flags"].split() if "flags" in fields else None
    family = f"family {fields.get('cpu family')} model {fields.get('model')}" if fields else None
    return {
        "cpu": fields.get("model name", platform.processor() or None),
        "cpu_family": family,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx_bf16": "amx_bf16" in flags if flags else None,
        "avx512_bf16": "avx512_bf16" in flags if flags else None,
        "nice": os.nice(0) if hasattr(os, "nice") else None,
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def read_commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def build_trainer(args: argparse.Namespace, folder: str) -> SFTTrainer:
    set_seed(args.seed)  # before PEFT draws A: the trainer itself seeds later
    rows = [{"prompt": r["prompt"], "completion": " " + r["completion"]} for r in read_rows(args.train)]
    config = SFTConfig(
        output_dir=folder,
        seed=args.seed,
        learning_rate=args.lr,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch,
        completion_only_loss=True,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **({"gradient_checkpointing": False} if args.no_checkpointing else {}),
        **({"bf16": False} if args.no_autocast else {}),
        **({"train_sampling_strategy": "group_by_length"} if args.group_by_length else {}),
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.base),
        peft_config=LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )


@torch.inference_mode()
def count_exact(model, tokenizer, rows: list[dict[str, str]], batch: int) -> int:
    """How many rows' greedy outputs, stripped, equal their completions. Left-padded, sorted by length."""
    longest = max(len(tokenizer(" " + r["completion"]).input_ids) for r in rows)
    rows = sorted(rows, key=lambda r: len(r["prompt"]))
    tokenizer.padding_side = "left"
    n_exact = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = tokenizer([r["prompt"] for r in part], return_tensors="pt", padding=True)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=longest + 4, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        n_exact += sum(text.strip() == r["completion"] for text, r in zip(texts, part, strict=True))
    return n_exact


def settings_of(trainer: SFTTrainer) -> dict:
    a = trainer.args
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad}
    lora = trainer.model.peft_config["default"]
    return {
        "rank": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "lr": a.learning_rate,
        "schedule": str(a.lr_scheduler_type.value),
        "warmup_steps": a.warmup_steps,
        "optimizer": str(a.optim.value),
        "weight_decay": a.weight_decay,
        "max_grad_norm": a.max_grad_norm,
        "epochs": a.num_train_epochs,
        "max_steps": a.max_steps,
        "batch": a.per_device_train_batch_size,
        "bf16_autocast": a.bf16,
        "base_dtype": "bfloat16",
        "adapter_dtype": sorted(dtypes),
        "gradient_checkpointing": a.gradient_checkpointing,
        "packing": a.packing,
        "sampling": str(getattr(a.train_sampling_strategy, "value", a.train_sampling_strategy)),
        "attention": trainer.model.config._attn_implementation,
    }


def scored(trainer: SFTTrainer, args: argparse.Namespace) -> dict:
    """Exact match on the test rows, and what it took."""
    if args.test is None:
        return {"eval_seconds": None, "metric": "exact", "value": None, "n": 0}
    model, tokenizer = trainer.model, trainer.processing_class
    model.gradient_checkpointing_disable()
    model.eval()
    model.config.use_cache = True
    test = read_rows(args.test)[: args.limit_test]
    wall_start = time.perf_counter()
    n_exact = count_exact(model, tokenizer, test, max(args.batch, 16))
    seconds = round(time.perf_counter() - wall_start, 1)
    return {"eval_seconds": seconds, "metric": "exact", "value": round(n_exact / len(test), 4), "n": len(test)}


def main() -> None:
    args = parse()
    commit = read_commit()  # now: the checkout may move on during the run
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder)
        # With batches in random order only a whole number of epochs has a known count of tokens.
        whole = args.max_steps < 0 and args.epochs == int(args.epochs)
        n_tokens = int(sum(map(len, trainer.train_dataset["input_ids"])) * args.epochs) if whole else None
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        result = trainer.train()
        train_seconds = time.perf_counter() - wall_start
        train_cpu_seconds = time.process_time() - cpu_start
        train_peak_mb = peak_rss_mb()
    if args.save:
        trainer.save_model(str(args.save))
    row = {
        "bench": "supersense",
        "tool": "trl+peft",
        "versions": versions(),
        "machine": describe_machine(),
        "seed": args.seed,
        "rows": len(trainer.train_dataset),
        "tokens": n_tokens,
        "steps": trainer.state.global_step,
        "settings": settings_of(trainer),
        "train_loss": round(result.training_loss, 4),
        "train_seconds": round(train_seconds, 1),
        "train_cpu_seconds": round(train_cpu_seconds, 1),
        "tokens_per_s": round(n_tokens / train_seconds, 1) if n_tokens else None,
        "peak_rss_mb": train_peak_mb,
        **scored(trainer, args),
        "commit": commit,
    }
    line = json.dumps(row)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
