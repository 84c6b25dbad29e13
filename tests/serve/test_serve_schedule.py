"""Any order of arrivals, cancels, loads, on few pages: every answer is what `generate` gives, and no page leaks."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
from serving import METHODS, RUNNERS, Heard, adapter_of, alone, ask, base, n_free
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, DataError, NotFound, SpecError, WorkFailed
from deltaw.methods import LongLora, Lora
from deltaw.serve.batch import StepBatch
from deltaw.serve.engine import Engine
from deltaw.serve.runner import GenericRunner
from deltaw.serve.types import Output, Request, Sampling
from models import VOCAB, make_ids

MOST = 9
USED = ("lora", "dora", "parallel", "prompt", "prefix")


@pytest.fixture(scope="module")
def world():
    """A base, adapters, prompts that begin alike, and each pair's answer alone."""
    model = base("llama")
    adapters: dict[str | None, Adapter | None] = {None: None}
    adapters |= {name: adapter_of(model, METHODS[name], seed=n) for n, name in enumerate(USED)}
    begin = make_ids(1, 34, seed=3)[0].tolist()
    ends = [make_ids(1, n, seed=70 + n)[0].tolist() for n in (1, 5, 14)]
    prompts = [*ends, *(begin[:n] + e for n, e in zip((34, 16, 20), ends, strict=True))]
    answers = {(name, i): alone(model, a, p, MOST) for name, a in adapters.items() for i, p in enumerate(prompts)}
    return model, adapters, prompts, answers


def one_page(model) -> int:
    heads = model.net.config
    return 16 * 2 * heads.num_key_value_heads * heads.head_dim * 4 * heads.num_hidden_layers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("runner", RUNNERS)
def test_serve_schedule_random_traffic_on_few_pages(world, seed, runner):
    model, adapters, prompts, answers = world
    rng = random.Random(seed)
    n_pages = rng.choice([4, 5, 7, 14])
    engine = Engine(
        model,
        kv_bytes=n_pages * one_page(model),
        max_sequences=rng.choice([3, 8, 40]),
        chunk_tokens=rng.choice([3, 16, 64]),
        make_runner=runner,
    )
    assert engine.pages.n_pages == n_pages
    for name, adapter in adapters.items():
        if adapter is not None:
            engine.load(name, adapter)
    asked: list[tuple[str | None, int, int, Heard, bool]] = []
    for _ in range(45):
        name, i, most = rng.choice(list(adapters)), rng.randrange(len(prompts)), rng.choice([1, 4, MOST])
        heard = Heard()
        ticket = engine.submit(Request("x", tuple(prompts[i]), Sampling(max_tokens=most, temperature=0.0), name), heard)
        gone = rng.random() < 0.2
        if gone and rng.random() < 0.7:
            threading.Event().wait(rng.random() * 0.01)
        if gone:
            ticket.cancel()
        if rng.random() < 0.15:  # the same content again, under the same name, while requests of it run
            again = rng.choice(USED)
            engine.unload(again)
            engine.load(again, adapters[again])
        asked.append((name, i, most, heard, gone))
    for name, i, most, heard, gone in asked:
        heard.wait()
        wanted = answers[name, i][:most]
        if gone and heard.finished == "cancelled":
            assert heard.tokens == wanted[: len(heard.tokens)]
        else:
            assert heard.tokens == wanted
            assert heard.finished == ("length" if len(wanted) == most else "stop")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_bytes_used) == (0, 0, 0)
    assert n_free(engine) == n_pages
    assert stats.prefix_hits > 0
    assert stats.tokens_total == sum(len(h.tokens) for *_, h, _ in asked)
    engine.close()


def test_serve_schedule_preempts_where_pages_run_out(world):
    model, _, prompts, answers = world
    engine = Engine(model, kv_bytes=5 * one_page(model), chunk_tokens=64)
    heard = {i: ask(engine, prompts[i], max_tokens=MOST) for i in (2, 1, 5)}
    for i, h in heard.items():
        assert h.wait().tokens == answers[None, i]
    many = [ask(engine, make_ids(1, 12, seed=n)[0].tolist(), max_tokens=20, ignore_eos=True) for n in range(4)]
    assert all(len(h.wait().tokens) == 20 for h in many)
    assert engine.stats().preemptions > 0
    assert n_free(engine) == 5
    engine.close()


def test_serve_schedule_prefixes_are_found_by_content_only(world):
    model, adapters, prompts, answers = world
    engine = Engine(model, kv_bytes=1 << 20)
    engine.load("a", adapters["lora"])

    def hits(name: str | None, wanted: list[int]) -> int:
        before = engine.stats().prefix_hits
        assert ask(engine, prompts[3], adapter=name, max_tokens=MOST).wait().tokens == wanted
        return engine.stats().prefix_hits - before

    assert hits("a", answers["lora", 3]) == 0
    assert hits("a", answers["lora", 3]) == 32  # 35 tokens: two full pages, and the last token is computed
    assert hits(None, answers[None, 3]) == 0
    assert hits(None, answers[None, 3]) == 32
    engine.unload("a")
    engine.load("a", adapters["dora"])
    assert hits("a", answers["dora", 3]) == 0
    engine.load("a", adapters["lora"])
    assert hits("a", answers["lora", 3]) == 32  # the same content under whatever name
    engine.load("p", adapters["prefix"])
    assert hits("p", answers["prefix", 3]) == 0
    assert hits("p", answers["prefix", 3]) == 48  # 19 virtual tokens and 35
    engine.close()


def test_serve_schedule_running_requests_keep_their_version(world):
    model, adapters, prompts, answers = world
    engine = Engine(model, kv_bytes=1 << 20)
    engine.load("a", adapters["lora"])
    changed, heard = threading.Event(), Heard()

    def listen(output: Output) -> None:
        if not heard.outputs:  # in the engine's thread, after the first token
            engine.load("a", adapters["dora"])
            engine.unload("a")
            engine.load("a", adapters["parallel"])
            changed.set()
        heard(output)

    engine.submit(Request("x", tuple(prompts[2]), Sampling(max_tokens=MOST, temperature=0.0), "a"), listen)
    assert changed.wait(20)
    assert ask(engine, prompts[2], adapter="a", max_tokens=MOST).wait().tokens == answers["parallel", 2]
    assert heard.wait().tokens == answers["lora", 2]
    assert len(answers["lora", 2]) > 2
    assert answers["lora", 2] != answers["dora", 2]
    assert engine.names() == ["a"]
    engine.unload("a")
    with pytest.raises(NotFound, match="No adapter 'a'"):
        ask(engine, [3], adapter="a")
    engine.close()


def test_serve_schedule_loads_do_not_wait_for_each_other(world, monkeypatch):
    model, adapters, prompts, answers = world
    engine = Engine(model, kv_bytes=1 << 20)
    engine.load("old", adapters["lora"])
    began, hold, run = threading.Event(), threading.Event(), engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (began.set(), hold.wait(20), run(batch))[-1])
    running = ask(engine, prompts[2], adapter="old", max_tokens=MOST)
    assert began.wait(20)
    orders = [engine.begin_load("a", adapters["dora"]), engine.begin_load("b", adapters["parallel"])]
    with pytest.raises(NotFound):
        engine.tokenizer("a")  # not there before the step that runs has ended
    orders += [engine.begin_unload("old"), engine.begin_load("old", adapters["parallel"])]
    assert not any(order.done() for order in (*orders[:2], orders[3]))
    hold.set()
    for order in orders:
        order.result(20)
    assert engine.names() == ["a", "b", "old"]
    assert running.wait().tokens == answers["lora", 2]
    for name, method in (("a", "dora"), ("old", "parallel")):
        assert ask(engine, prompts[2], adapter=name, max_tokens=MOST).wait().tokens == answers[method, 2]
    engine.close()
    with pytest.raises(WorkFailed):
        engine.begin_load("c", adapters["lora"])


def test_serve_schedule_broken_rows_end_alone(world):
    model, adapters, prompts, answers = world
    engine = Engine(model, kv_bytes=6 * one_page(model))
    engine.load("good", adapters["lora"])
    huge = {site: {p: 1e25 * t for p, t in params.items()} for site, params in adapters["lora"].sites.items()}
    engine.load("bad", replace(adapters["lora"], sites=huge))  # finite numbers, whose products are not
    good = [ask(engine, prompts[1], adapter="good", max_tokens=MOST), ask(engine, prompts[1], max_tokens=MOST)]
    bad = [ask(engine, p, adapter="bad", max_tokens=MOST) for p in prompts[:3]]
    good += [ask(engine, p, adapter="good", max_tokens=MOST) for p in prompts]
    assert [h.wait(broken=True).tokens for h in bad] == [[], [], []]
    assert "NaN" in bad[0].outputs[-1].error
    assert good[0].wait().tokens == answers["lora", 1]
    assert good[1].wait().tokens == answers[None, 1]
    assert [h.wait().tokens for h in good[2:]] == [answers["lora", i] for i in range(len(prompts))]
    assert n_free(engine) == 6
    engine.close()


def test_serve_schedule_a_listener_that_fails_ends_its_request_only(world):
    model, _, prompts, answers = world
    engine = Engine(model, kv_bytes=1 << 20)

    def fails(output: Output) -> None:
        raise RuntimeError("gone")

    engine.submit(Request("x", tuple(prompts[0]), Sampling(max_tokens=MOST, ignore_eos=True)), fails)
    assert ask(engine, prompts[1], max_tokens=MOST).wait().tokens == answers[None, 1]
    engine.close(drain_s=20)
    assert engine.stats().kv_bytes_used == 0


def test_serve_schedule_a_step_that_fails_ends_what_ran_only(world):
    model, _, prompts, answers = world

    class Once(GenericRunner):
        calls = 0

        def run(self, batch: StepBatch) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise MemoryError("no room")
            return super().run(batch)

    engine = Engine(model, kv_bytes=1 << 20, make_runner=Once)
    first = ask(engine, prompts[2], max_tokens=MOST).wait(broken=True)
    assert first.tokens == answers[None, 2][:2]
    assert first.outputs[-1].error == "MemoryError: no room"
    assert ask(engine, prompts[2], max_tokens=MOST).wait().tokens == answers[None, 2]
    engine.close()
    assert engine.stats().kv_bytes_used == 0


def test_serve_schedule_closing_drains_or_cancels(world):
    model, _, prompts, answers = world
    engine = Engine(model, kv_bytes=1 << 20)
    first = ask(engine, prompts[1], max_tokens=MOST)
    engine.close(drain_s=30)
    assert first.wait().tokens == answers[None, 1]
    with pytest.raises(WorkFailed, match="closing"):
        ask(engine, prompts[1])
    engine.close()
    engine = Engine(model, kv_bytes=1 << 21, max_sequences=1)
    late = [ask(engine, prompts[0], max_tokens=60, ignore_eos=True) for _ in range(30)]
    engine.close()
    assert {h.wait().finished for h in late} <= {"cancelled", "length"}
    assert late[-1].finished == "cancelled"


def test_serve_schedule_what_can_never_run_is_refused_by_name(world):
    model, adapters, _, _ = world
    engine = Engine(model, kv_bytes=3 * one_page(model))
    engine.load("p", adapters["prefix"])
    assert engine.most_tokens(10) == 39
    assert engine.most_tokens(10, "p") == 20
    for wrong, kind, says in [
        (Request("r1", (3,) * 10, Sampling(max_tokens=40)), DataError, "'r1' .* room for 39"),
        (Request("r1", (3,) * 10, Sampling(max_tokens=21), "p"), DataError, "room for 20"),
        (Request("r1", (3,) * 90, Sampling(max_tokens=1)), DataError, "room for 0"),
        (Request("r1", (), Sampling()), DataError, "empty prompt"),
        (Request("r1", (3, VOCAB), Sampling()), DataError, f"token {VOCAB} is not"),
        (Request("r1", (-1,), Sampling()), DataError, "token -1"),
        (Request("r1", (3,), Sampling(), "q"), NotFound, "Did you mean 'p'|No adapter 'q'"),
        (Request("r1", (3,), Sampling(temperature=-1.0)), SpecError, "temperature must be 0 or more"),
        (Request("r1", (3,), Sampling(temperature=float("nan"))), SpecError, "finite"),
        (Request("r1", (3,), Sampling(top_p=0.0)), SpecError, "top_p"),
        (Request("r1", (3,), Sampling(max_tokens=0)), SpecError, "max_tokens"),
        (Request("r1", (3,), Sampling(stop=("",))), SpecError, "stop"),
    ]:
        with pytest.raises(kind, match=says):
            engine.submit(wrong, Heard())
    most = ask(engine, [3] * 10, max_tokens=39, ignore_eos=True)
    assert len(most.wait().tokens) == 39
    engine.close()
    gpt2 = Engine(base("gpt2"), kv_bytes=1 << 20)  # 64 learned positions
    assert gpt2.most_tokens(60) == 4
    assert len(ask(gpt2, [3] * 60, max_tokens=4, ignore_eos=True).wait().tokens) == 4
    gpt2.close()


def test_serve_schedule_adapters_that_cannot_share_a_batch_are_refused(world):
    model, adapters, _, _ = world
    longer = adapter_of(model, LongLora(rank=3, alpha=5, max_positions=128, group_least=4))
    other = adapter_of(base("gpt2"), Lora(rank=2, alpha=3, targets="all-linear"))
    engine = Engine(model, kv_bytes=1 << 20)
    with pytest.raises(AdapterError, match=r"rope|max_position"):
        engine.load("longer", longer)
    with pytest.raises(AdapterError, match="does not fit"):
        engine.load("other", other)
    assert engine.names() == []
    engine.close()
    model.attach(adapters["lora"], name="mine")
    with pytest.raises(AdapterError, match="Detach mine"):
        Engine(model)
    model.detach()
    engine = Engine(model, kv_bytes=1 << 20)
    engine.load("a", adapters["lora"])
    with pytest.raises(AdapterError, match="Another engine"):
        Engine(model)
    engine.close()
