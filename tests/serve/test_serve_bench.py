"""The load test, against a real server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.errors import DataError, NotFound, ServeError, WorkFailed
from deltaw.serve.load_test import Load, Seen, percentiles, pick_models, read_prompts, run_load, summary

NAMES = [f"a{i}" for i in range(20)]


def test_serve_bench_traffic_is_as_it_is_named():
    def picked(traffic, n=2000):
        return Counter(pick_models(Load(traffic, requests=n), "base", NAMES))

    assert picked("none") == {"base": 2000}
    assert picked("identical") == {"a0": 2000}
    assert set(picked("uniform").values()) == {100}
    skewed = [n for _, n in picked("skewed").most_common()]
    harmonic = sum(1 / k for k in range(1, 21))
    assert skewed[0] / 2000 == pytest.approx(1 / harmonic, rel=0.15)
    assert skewed[0] > 5 * skewed[-1]
    with pytest.raises(ServeError, match="lists none"):
        pick_models(Load("uniform"), "base", [])
    with pytest.raises(ServeError, match="Unknown traffic"):
        pick_models(Load("zipf"), "base", NAMES)


def test_serve_bench_figures_are_counted_right():
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    assert percentiles([3.0, 1.0, 2.0, 4.0, 5.0]) == {"p50": 3.0, "p90": pytest.approx(4.6), "p99": pytest.approx(4.96)}
    good = Seen("a", 10.0, None, 10.5, 12.0, [0.25, 0.75], 7, 3)
    bad = Seen("b", 10.0, "429 queue_full", ended_s=10.1)
    found = summary([good, bad, good], 4.0)
    assert found["errors"] == {"429 queue_full": 1}
    assert (found["requests"], found["models"], found["output_tokens"], found["prompt_tokens"]) == (3, 2, 6, 14)
    assert (found["output_tokens_per_s"], found["requests_per_s"]) == (1.5, 0.5)
    assert found["ttft_ms"] == {"p50": 500.0, "p90": 500.0, "p99": 500.0}
    assert found["inter_token_ms"]["p50"] == 500.0
    assert found["latency_ms"]["p99"] == 2000.0


def test_serve_bench_prompts_are_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n\n{"messages": [{"role": "user", "content": "x"}]}\n')
    assert read_prompts(rows) == ({"prompt": "a"}, {"messages": [{"role": "user", "content": "x"}]})
    for text in ("", "{", '{"text": "a"}'):
        rows.write_text(text)
        with pytest.raises(DataError):
            read_prompts(rows)
    with pytest.raises(NotFound):
        read_prompts(tmp_path / "none.jsonl")


def test_serve_bench_measures_a_server(http, tmp_path):
    found = asyncio.run(
        run_load(http.url, Load("uniform", requests=10, concurrency=4, prompt_tokens=9, output_tokens=6))
    )
    assert found["errors"] == {}
    assert (found["models"], found["prompt_tokens"], found["output_tokens"]) == (2, 90, 60)
    assert found["latency_ms"]["p50"] >= found["ttft_ms"]["p50"] > 0
    assert found["output_tokens_per_s"] == pytest.approx(60 / found["seconds"], rel=0.01)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"prompt": "abc"}\n')
    command = ["bench-serve", "--url", f"{http.url}/v1", "--prompts", str(rows), "--requests", "4", "--rate", "200"]
    done = CliRunner().invoke(app, [*command, "--traffic", "none", "--output-tokens", "3", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["requests"], told["errors"], told["models"], told["rate"]) == (4, {}, 1, 200.0)
    failed = CliRunner().invoke(app, [*command, "--model", "nobody", "--traffic", "identical"])
    assert isinstance(failed.exception, WorkFailed)
    assert "4 x 404 model_not_found" in failed.stdout


def test_serve_bench_runs_a_server_of_its_own(made):
    command = ["bench-serve", "--base", str(made.base), "--adapter", f"mine={made.loose / 'v1'}", "--requests", "3"]
    done = CliRunner().invoke(app, [*command, "--prompt-tokens", "5", "--output-tokens", "2", "--kv-mb", "8"])
    assert done.exit_code == 0, done.output
    assert "3 requests over 1 models" in done.stdout
    assert "errors: none" in done.stdout


def test_serve_bench_says_what_it_needs():
    for words in ([], ["--url", "http://127.0.0.1:1", "--base", "x"]):
        assert isinstance(CliRunner().invoke(app, ["bench-serve", *words]).exception, ServeError)
    gone = CliRunner().invoke(app, ["bench-serve", "--url", "http://127.0.0.1:1"])
    assert isinstance(gone.exception, WorkFailed)
