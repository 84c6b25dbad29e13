"""Does `deltaw diagnose` name what went wrong, and stay silent where nothing did?

The naive answer it must beat: silence on everything is right for healthy runs. What would change our mind: a failing
run without its finding, or a healthy run with any.

    .venv/bin/python bench/bench_diagnose.py [--steps 40] [--work FOLDER]

Trains ten short runs of the starter on shipped data: five made to fail, each in one way of docs/diagnosis.md, and
five that are as one would train them. Each is diagnosed, with what its check needs (another base, the merged folder,
--forgetting). Prints what was expected and found; appends a JSON row to
bench/results/diagnose.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "diagnose.jsonl"
DATA = ROOT / "data"
BASE = "smollm2-135m-instruct"
ASKED = 80  # general questions, and texts, of the forgetting check


def train(
    out: Path, data: str, steps: int, adapter: dict[str, Any], lr: float, rows: int | None = None, **base: Any
) -> Path:
    """A finished run."""
    import deltaw
    from deltaw.data import read_rows

    def some(part: str, n: int | None) -> list[dict[str, Any]]:
        found = read_rows(DATA / data / f"{part}.jsonl")[:n]
        return [{"prompt": r.prompt, "completion": r.completion} for r in found]

    recipe = {
        "base": {"path": BASE, "dtype": "auto", **base},
        "adapter": adapter,
        "data": {"max_tokens": 256},
        "train": {"steps": steps, "tokens_per_step": 512, "lr": lr, "schedule": "cosine", "save_every_s": 1e6},
        "eval": {"every_steps": steps // 2, "keep": "last"},
    }
    for _ in deltaw.train(recipe, out, train_rows=some("train", rows), valid_rows=some("valid", 24)):
        pass
    return out


def lora(rank: int, alpha: float, **more: Any) -> dict[str, Any]:
    """Settings of a LoRA."""
    return {"method": "lora", "rank": rank, "alpha": alpha, **more}


def failing(work: Path, steps: int) -> dict[str, tuple[str, Path, dict[str, Any]]]:
    """Runs made to fail: name -> (the finding that is right, folder, what the diagnosis is given)."""
    import deltaw

    general = {"check_forgetting": True, "general": DATA / "general_mcq" / "questions.jsonl",
               "text": DATA / "ppl" / "wiki.jsonl", "limit": ASKED}  # fmt: skip
    low = train(work / "rank", "address_json", steps + 20, lora(1, 2, targets=["q_proj"]), 1e-3)
    wild = train(work / "alpha", "supersense", steps, lora(8, 800), 1e-3)
    fine = train(work / "fine", "supersense", steps, lora(8, 16), 1e-3)
    deltaw.bake(BASE, fine, work / "other_base", measure=False)  # the same shapes, other weights
    four = train(work / "four", "address_json", steps, lora(16, 32), 1e-3, format="nf4")
    deltaw.bake(BASE, four, work / "merged_into_nf4", into="quantised")
    narrow = train(work / "narrow", "supersense", steps, lora(16, 32), 3e-3, rows=60)
    return {
        "rank 1 at q_proj": ("rank_too_low", low, {}),
        "alpha 800 at rank 8": ("alpha_misconfigured", wild, {}),
        "another base of the same shapes": ("base_mismatch", fine, {"base": work / "other_base"}),
        "merged into nf4": ("merge_precision", four, {"merged": work / "merged_into_nf4"}),
        "60 rows of one narrow task": ("forgetting", narrow, general),
    }


def healthy(work: Path, steps: int) -> dict[str, tuple[str, Path, dict[str, Any]]]:
    """Runs as one would train them: name -> ("", folder, what the diagnosis is given)."""
    general = {"check_forgetting": True, "general": DATA / "general_mcq" / "questions.jsonl",
               "text": DATA / "ppl" / "wiki.jsonl", "limit": ASKED}  # fmt: skip
    dora = {"method": "dora", "rank": 8, "alpha": 16}
    return {
        "address_json, rank 16": ("", train(work / "h1", "address_json", steps, lora(16, 32), 1e-3), general),
        "address_json, rank 8, 5e-4": ("", train(work / "h2", "address_json", steps + 20, lora(8, 16), 5e-4), general),
        "supersense, rank 8": ("", train(work / "h3", "supersense", steps, lora(8, 16), 1e-3), {}),
        "address_json, DoRA": ("", train(work / "h4", "address_json", steps, dora, 1e-3), {}),
        "address_json, nf4 base": (
            "", train(work / "h5", "address_json", steps, lora(16, 32), 1e-3, format="nf4"), {},
        ),
    }  # fmt: skip


def main() -> None:
    """Train, diagnose, print, keep."""
    import torch

    import deltaw

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        table = []
        for make in (failing, healthy):
            for name, (wanted, run, given) in make(work, args.steps).items():
                found = deltaw.diagnose(run, **given)
                kinds = [f.kind for f in found.findings]
                right = kinds == [] if not wanted else kinds[:1] == [wanted]
                table.append({"run": name, "wanted": wanted, "found": kinds, "right": right})
                print(
                    f"{'right' if right else 'WRONG':6} {name:34} wanted {wanted or 'nothing':20} found {kinds}",
                    flush=True,
                )
                for f in found.findings:
                    print(f"         {f.message}", flush=True)
    row = {
        "bench": "diagnose",
        "steps": args.steps,
        "table": table,
        "seconds": round(time.time() - began, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"deltaw": deltaw.__version__, "torch": torch.__version__},
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{sum(t['right'] for t in table)} of {len(table)} right, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
