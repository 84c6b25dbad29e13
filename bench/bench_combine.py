"""How far from dense float64 arithmetic is a combination of adapters, ours and PEFT's add_weighted_adapter?

The naive answer it must beat: the weighted sum of the A and of the B, which has cross terms. What would change our
mind: a case in which PEFT's result is nearer to the dense one than ours.

    .venv/bin/python bench/bench_combine.py [--density 0.5]

The first block of the starter, with its own weights, held in float64 so that rounding a merged weight hides nothing;
adapters with random factors whose change is some percent of a weight. Each error is |dW - oracle| / |oracle| over all
seven maps. The oracle is PEFT's own formula on the dense changes in float64, which is ours too, with the same masks
where chance drops numbers of the dense change. PEFT's TIES votes before it weights, ours afterwards: they are one where
all weights are equal, and ours is left out elsewhere (its tests have a formula of their own).
Prints a table and appends a row to bench/results/combine.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import deltaw
from deltaw.merge.checkpoint import Checkpoint
from deltaw.merge.sums import drop_mask
from deltaw.model.base import load_base
from deltaw.model.load import resolve_base
from workers import append, identity

Deltas = list[dict[str, Tensor]]
LORA = deltaw.Lora(rank=16, alpha=32)
CASES: dict[str, tuple[list[Any], list[float]]] = {
    "one rank, one scale": ([LORA, LORA], [0.7, 0.7]),
    "unequal weights": ([LORA, LORA], [0.7, 0.3]),
    "a negative weight": ([LORA, LORA], [1.0, -0.5]),
    "two scales": ([LORA, deltaw.Lora(rank=16, alpha=8)], [0.7, 0.7]),
    "LoRA and rsLoRA": ([LORA, deltaw.Lora(rank=16, alpha=32, rslora=True)], [0.7, 0.7]),
    "two ranks": ([LORA, deltaw.Lora(rank=64, alpha=32)], [0.7, 0.7]),
    "LoRA and DoRA": ([LORA, deltaw.Dora(rank=16, alpha=32)], [0.7, 0.7]),
}
OURS = {"linear": "linear", "cat": "cat", "svd": "svd", "ties": "ties", "dare_linear": "dare_linear"}
OURS |= {"dare_ties": "dare_ties", "magnitude_prune": "magnitude"}
SEED = 11


def make_base(folder: Path) -> Path:
    """The starter's first block, under a small vocabulary of noise."""
    starter = resolve_base("smollm2-135m-instruct")
    config = LlamaForCausalLM.config_class.from_pretrained(starter)
    config.num_hidden_layers, config.vocab_size, config.dtype = 1, 64, "float64"
    torch.manual_seed(0)
    net = LlamaForCausalLM(config)
    with Checkpoint(starter) as checkpoint, torch.no_grad():
        for name, value in net.named_parameters():
            if "layers.0." in name:
                value.copy_(checkpoint.read(name))
    net.double().save_pretrained(folder)
    return folder


def make_adapter(base: Path, spec: Any, folder: Path, seed: int) -> Path:
    """Random factors; B so small that the change is some percent of the weight."""
    model = load_base_without_words(base)
    model.attach(spec)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.adapters["default"].parameters().items():
            if name.endswith(":B"):
                value.normal_(std=0.004, generator=rng)
            elif name.endswith(":m"):
                value.mul_(1 + 0.002 * torch.randn(value.shape, generator=rng))
    model.adapter().save(folder)
    return folder


def load_base_without_words(base: Path) -> Any:
    """The base, which has no tokenizer."""
    with mock.patch("deltaw.model.base.load_tokenizer", return_value=None):
        return load_base(base)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The maps of a merged folder, float64."""
    tensors = load_file(folder / "model.safetensors")
    return {n: t.double() for n, t in tensors.items() if n.endswith("proj.weight")}


def dense(base: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """dW of one adapter by its formula in float64."""
    one = deltaw.load_adapter(adapter)
    out = {}
    for place in one.places:
        p = {k: v.double() for k, v in one.sites[place.name].items()}
        W = base[f"{place.name}.weight"]
        changed = W + one.spec.scale_at(place) * p["B"] @ p["A"]
        if "m" in p:
            changed = changed * (p["m"] / changed.norm(dim=1))[:, None]
        out[f"{place.name}.weight"] = changed - W
    return out


def oracle(deltas: Deltas, weights: list[float], kind: str, density: float) -> dict[str, Tensor]:
    """PEFT's own formulas on dense float64 changes; chance as ours."""
    w = torch.tensor(weights, dtype=torch.float64)
    out = {}
    for name in deltas[0]:
        each = [d[name] for d in deltas]
        masks = iter([drop_mask(tuple(each[0].shape), density, SEED, name, i) for i in range(len(each))])
        with mock.patch.object(torch, "bernoulli", lambda t, masks=masks: next(masks).to(t.dtype)):
            args = (each, w) if kind == "task_arithmetic" else (each, w, density)
            out[name] = getattr(merge_utils, kind)(*args)
    return out


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted| over all maps."""
    lost = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
    return (lost / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


def cut(delta: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The best approximation of a rank."""
    out = {}
    for name, value in delta.items():
        U, S, Vt = torch.linalg.svd(value, full_matrices=False)
        out[name] = U[:, :rank] * S[:rank] @ Vt[:rank]
    return out


def peft_result(base: Path, adapters: list[Path], weights: list[float], kind: str, rank: int, density: float) -> Any:
    """The maps that PEFT's combined adapter merges to, float64; or the first line of its refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        model = PeftModel.from_pretrained(net, adapters[0], adapter_name="a0")
        for i, folder in enumerate(adapters[1:], 1):
            model.load_adapter(folder, f"a{i}")
        names = [f"a{i}" for i in range(len(adapters))]
        order = [m for m, _ in model.named_modules()]
        sites = [n.removeprefix("base_model.model.") for n in order if n.endswith("_proj")]
        masks = iter([
            drop_mask(tuple(net.get_submodule(s).weight.shape), density, SEED, f"{s}.weight", i)
            for s in sites for i in range(len(adapters))
        ])  # fmt: skip
        chance: Callable[[Tensor], Tensor] = lambda t: next(masks).to(t.dtype)  # noqa: E731
        given = chance if kind.endswith("_svd") else torch.bernoulli
        torch.manual_seed(SEED)
        try:
            with mock.patch.object(torch, "bernoulli", given):
                model.add_weighted_adapter(
                    names, weights, "x", combination_type=kind, density=density,
                    svd_rank=rank if kind.endswith("svd") else None,
                )  # fmt: skip
        except (ValueError, RuntimeError) as problem:
            return str(problem).splitlines()[0]
        model.set_adapter("x")
        merged = model.merge_and_unload(adapter_names=["x"]).state_dict()
    return {n: t.double() for n, t in merged.items() if n.endswith("proj.weight")}


def one_case(base: Path, room: Path, specs: list[Any], weights: list[float], density: float) -> dict[str, Any]:
    """Errors of ours and PEFT's, by method."""
    adapters = [make_adapter(base, spec, room / f"a{i}", seed=i + 1) for i, spec in enumerate(specs)]
    before = weights_of(base)
    deltas = [dense(before, a) for a in adapters]
    rank = sum(s.rank for s in specs)
    found: dict[str, Any] = {}
    for theirs, ours in OURS.items():
        sparse = theirs not in ("linear", "cat", "svd")
        definition = theirs if sparse else "task_arithmetic"
        wanted = oracle(deltas, weights, definition, density)
        how: dict[str, Any] = {"density": density} if sparse else {}
        how |= {"seed": SEED} if ours.startswith("dare") else {}
        row: dict[str, Any] = {}
        dora = any(s.name == "dora" for s in specs)
        equal = len(set(weights)) == 1
        if not sparse and not (dora and theirs == "cat"):
            cutting = {"rank": rank} if dora or theirs == "svd" else {}
            deltaw.combine(adapters, weights, method=ours, base=base, out=room / theirs, **cutting)
            row["ours_adapter"] = apart(dense(before, room / theirs), wanted)
        if theirs not in ("cat", "svd") and (equal or theirs not in ("ties", "dare_ties")):
            deltaw.combine(adapters, weights, method=ours, base=base, into_base=room / f"{theirs}-base", **how)
            after = weights_of(room / f"{theirs}-base")
            row["ours_base"] = apart({n: after[n] - before[n] for n in after}, wanted)
        if sparse and (equal or theirs == "magnitude_prune" or theirs == "dare_linear"):
            deltaw.combine(adapters, weights, method=ours, rank=rank, base=base, out=room / theirs, **how)
            row["ours_adapter"] = apart(dense(before, room / theirs), wanted)
            row["best_of_rank"] = apart(cut(wanted, rank), wanted)
        for kind in (theirs, f"{theirs}_svd") if sparse else (theirs,):
            result = peft_result(base, adapters, weights, kind, rank, density)
            told = isinstance(result, str)
            row[f"peft {kind}"] = result if told else apart({n: result[n] - before[n] for n in before}, wanted)
        found[theirs] = row
    return found


def shown(value: Any) -> str:
    """A number, or why there is none."""
    return f"{value:.1e}" if isinstance(value, float) else f"refused ({value[:48]})" if value else "-"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--density", type=float, default=0.5)
    args = p.parse_args()
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        for i, (title, (specs, weights)) in enumerate(CASES.items()):
            room = Path(folder) / str(i)
            room.mkdir()
            cases[title] = one_case(base, room, specs, weights, args.density)
            for method, row in cases[title].items():
                print(f"{title:22} {method:16}", ", ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)
    row = {**identity("combine", ("peft",)), "density": args.density, "cases": cases}
    append(Path(__file__).resolve().parent / "results" / "combine.jsonl", row)


if __name__ == "__main__":
    main()
