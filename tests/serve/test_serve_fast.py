"""The fast runner's logits, keys and values are the generic runner's, step by step, whatever adapters share a batch."""

from __future__ import annotations

import pytest
import torch
from serving import METHODS, adapter_of, alone, ask, base
from torch import Tensor

from deltaw.methods import Lora
from deltaw.model.model import Model
from deltaw.model.paged import cache_shapes
from deltaw.model.resident import settle
from deltaw.ops.native import library
from deltaw.serve.batch import Segment, StepBatch
from deltaw.serve.engine import Engine
from deltaw.serve.fast import FastRunner, make_runner, why_generic
from deltaw.serve.pages import Pages
from deltaw.serve.runner import GenericRunner
from models import make_ids

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
PROMPTS = [make_ids(1, n, seed=60 + n)[0].tolist() for n in (3, 21, 1)]
MOST = 6


class Both(FastRunner):
    """Computes every step twice, from the same pages, and keeps how far logits and pages are apart."""

    def __init__(self, model: Model, pages: Pages) -> None:
        super().__init__(model, pages)
        self.pages = pages
        self.slow = GenericRunner(model, pages)
        self.apart: list[float] = []
        self.sizes: list[float] = []

    def add(self, key, resident, ready):
        super().add(key, resident, ready)
        self.slow._residents[key] = resident

    def run(self, batch: StepBatch) -> Tensor:
        held = [*self.pages.keys, *self.pages.values]
        before = [t.clone() for t in held]
        wanted = self.slow.run(batch).float()
        after = [t.clone() for t in held]
        for t, was in zip(held, before, strict=True):
            t.copy_(was)
        found = super().run(batch)
        pairs = [(found, wanted), *zip(held, after, strict=True)]
        self.apart.append(max(float((a.float() - b.float()).abs().max()) for a, b in pairs if a.numel()))
        self.sizes.append(float(wanted.abs().max()) if len(wanted) else 0.0)
        return wanted


def served(model: Model, adapters: dict, kind: type[FastRunner] = Both) -> tuple[dict, FastRunner]:
    """Greedy answers of every adapter's prompts in one batch, and the runner."""
    made: list[FastRunner] = []

    def runner(model: Model, pages: Pages) -> FastRunner:
        made.append(kind(model, pages))
        return made[0]

    engine = Engine(model, kv_bytes=1 << 21, chunk_tokens=24, make_runner=runner)
    for name, adapter in adapters.items():
        if adapter is not None:
            engine.load(name, adapter)
    heard = {name: [ask(engine, p, adapter=name, max_tokens=MOST) for p in PROMPTS] for name in adapters}
    got = {name: [h.wait().tokens for h in hs] for name, hs in heard.items()}
    engine.close()
    return got, made[0]


def worn(model: Model) -> dict:
    found = {None: None}
    return found | {name: adapter_of(model, spec, seed=i) for i, (name, spec) in enumerate(METHODS.items())}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_serve_fast_logits_and_pages_equal_the_generic_runners(kind, quantised):
    model = base(kind, quantised)
    assert why_generic(model) is None
    _, both = served(model, worn(model))
    assert len(both.apart) > 5
    assert not both._plain
    assert max(both.apart) < 1e-4 * max(1.0, *both.sizes)


@pytest.mark.parametrize("path", [p for p in library.paths() if p != library.REFERENCE])
def test_serve_fast_tokens_equal_generate_one_at_a_time_on_every_path(path):
    model = base("llama")
    adapters = worn(model) | {"head": adapter_of(model, Lora(rank=2, alpha=5, targets=("lm_head", "up_proj")))}
    wanted = {name: [alone(model, a, p, MOST) for p in PROMPTS] for name, a in adapters.items()}
    with library.forced(path):
        got, _ = served(model, adapters, FastRunner)
    assert got == wanted


def prompts_step(names: list[str | None], lengths: list[int]) -> StepBatch:
    """One prompt for each adapter, as long as its length; all rows' logits wanted of its last."""
    n = len(names)
    held = -(-max(lengths) // 16)
    tables = torch.arange(n * held, dtype=torch.int32).view(n, held)
    places = [torch.arange(length) for length in lengths]
    slots = torch.cat([tables.long()[i, at // 16] * 16 + at % 16 for i, at in enumerate(places)])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ends = bounds.tolist()
    segments = tuple(Segment(ends[i], ends[i + 1], name) for i, name in enumerate(names))
    head = tuple(Segment(i, i + 1, name) for i, name in enumerate(names))
    ids = make_ids(1, ends[-1], seed=9)[0]
    none = torch.zeros(n, dtype=torch.int64)
    return StepBatch(ids, torch.cat(places), slots, bounds, none, tables, segments, bounds[1:] - 1, head)


def logits_of(kind: str, adapters: dict, batch: StepBatch, dtype: torch.dtype, make: type) -> Tensor:
    model = base(kind)
    model = Model(model.net.bfloat16().to(dtype), model.tokenizer)
    runner = make(model, Pages(cache_shapes(model.net), 1 << 20, dtype, model.device))
    for name, adapter in adapters.items():
        if adapter is not None:
            resident = settle(model, adapter)
            runner.add(name, resident, runner.ready(resident))
    return runner.run(batch).double()


def as_near_as_the_generic_runner(kind: str, adapters: dict, batch: StepBatch, strict: slice) -> None:
    """The fast runner's logits are float32's on all paths, and in bfloat16 as near to them as the generic runner's.

    Of the rows of `strict` each, of others most: behind large adapters a tiny network doubles errors layer by layer.
    """
    exact = logits_of(kind, adapters, batch, torch.float32, GenericRunner)
    noise = (logits_of(kind, adapters, batch, torch.bfloat16, GenericRunner) - exact).square().mean(1)
    for path in library.paths()[1:]:
        with library.forced(path):
            assert (logits_of(kind, adapters, batch, torch.float32, FastRunner) - exact).abs().max() < 1e-4
            found = (logits_of(kind, adapters, batch, torch.bfloat16, FastRunner) - exact).square().mean(1)
            assert (found / noise)[strict].max() < 4
            assert (found / noise).median() < 1  # what lies between two products is float32 here


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_serve_fast_in_bfloat16_is_as_near_to_float32_as_the_generic_runner(kind):
    kept = (None, "lora", "rslora", "dora", "ia3", "bitfit", "houlsby")
    adapters = {n: a for n, a in worn(base(kind)).items() if n in kept}
    adapters["wide"] = adapter_of(base(kind), Lora(rank=301, alpha=90))
    as_near_as_the_generic_runner(kind, adapters, prompts_step(list(adapters), [35] * len(adapters)), slice(-1, None))


@pytest.mark.parametrize("many", [False, True], ids=["few_rows", "many_rows"])
def test_serve_fast_takes_segments_of_every_length_and_adapters_of_every_rank(many):
    ranks = {1: 7, 2: 1, 3: 64, 4: 2, 5: 12, 8: 3, 12: 1, 16: 5, 21: 13, 33: 4}  # and how many rows of each
    lengths = [n if many or n < 6 else 6 for n in ranks.values()]
    adapters: dict = {None: None}
    for rank in ranks:
        gentle = Lora(rank=rank, alpha=0.25 * rank, targets="all-linear")
        adapters[f"r{rank}"] = adapter_of(base("llama"), gentle, seed=rank)
    batch = prompts_step(list(adapters), [9, *lengths])
    assert (batch.n_rows >= 96) == many  # from which on another product is taken
    as_near_as_the_generic_runner("llama", adapters, batch, slice(None))


def test_serve_fast_leaves_replaced_tensors_to_the_generic_runner():
    model = base("llama")
    specs = {
        "norms": Lora(rank=3, alpha=5, save_modules=("norm",)),
        "embedding": Lora(rank=4, alpha=5, targets=("embed_tokens", "q_proj")),
        "plain": Lora(rank=4, alpha=5),
    }
    adapters = {name: adapter_of(model, spec, seed=i) for i, (name, spec) in enumerate(specs.items())}
    wanted = {name: [alone(model, a, p, MOST) for p in PROMPTS] for name, a in adapters.items()}
    runner = make_runner(model, Pages([(2, 8, 8)] * 2, 1 << 16, torch.float32, torch.device("cpu")))
    assert isinstance(runner, FastRunner)
    for name, adapter in adapters.items():
        resident = settle(model, adapter)
        runner.add(name, resident, runner.ready(resident))
    assert runner.why_generic("norms") == "lora replaces tensors of the base"
    assert runner.why_generic("embedding") == "lora changes model.embed_tokens"
    assert runner.why_generic("plain") is None
    for name in adapters:
        runner.remove(name)
    got, _ = served(model, adapters, FastRunner)
    assert got == wanted


def test_serve_fast_says_why_a_base_is_not_for_it():
    assert why_generic(base("gpt2")) == "GPT2LMHeadModel is not one of Llama, Mistral, Qwen2, Qwen3, Gemma, Phi3"
    pages = Pages([(4, 8, 8)] * 2, 1 << 16, torch.float32, torch.device("cpu"))
    assert isinstance(make_runner(base("gpt2"), pages), GenericRunner)
    with library.forced(library.REFERENCE):
        assert why_generic(base("llama")) == "there are no compiled kernels"
