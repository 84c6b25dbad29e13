"""What TRL and `datasets` make of the same rows. They come with the `peers` extra: `make test-all`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw.data import DataSpec, collate, encode_all, read_rows
from deltaw.model.load import load_tokenizer
from deltaw.model.model import Model
from deltaw.train.loss import sft

DATA = Path(__file__).parents[2] / "data"

pytestmark = [pytest.mark.slow, pytest.mark.starter, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["supersense", "address_json"])
def test_trl_learns_the_same_tokens_from_the_same_rows_with_the_same_loss(name, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    rows = read_rows(DATA / name / "train.jsonl")[:24]
    ours = encode_all(rows, tokenizer, DataSpec()).examples
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
        )
    )
    config = SFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=512,
    )
    pairs = Dataset.from_list([{"prompt": r.prompt, "completion": f" {r.completion}"} for r in rows])
    trainer = SFTTrainer(net, args=config, train_dataset=pairs, processing_class=tokenizer)
    theirs = list(trainer.train_dataset)
    assert [tuple(t["input_ids"]) for t in theirs] == [e.input_ids for e in ours]
    assert [tuple(label != -100 for label in t["labels"]) for t in theirs] == [e.is_target for e in ours]
    batch = trainer.data_collator(theirs)
    with torch.no_grad():
        wanted = net.eval()(**batch).loss
        pack = collate(ours)
        got = sft(Model(net), pack) / pack.n_targets
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # means of float32 losses near 11


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_tables_are_read_through_datasets_as_the_lines_they_came_from(ending, tmp_path):
    from datasets import Dataset

    lines = [json.loads(line) for line in (DATA / "supersense" / "test.jsonl").read_text().splitlines()[:7]]
    table, path = Dataset.from_list(lines), tmp_path / f"rows.{ending}"
    {"parquet": table.to_parquet, "csv": table.to_csv, "json": table.to_json}[ending](str(path))
    read = read_rows(path)
    assert [(r.prompt, r.completion) for r in read] == [(r["prompt"], r["completion"]) for r in lines]
    assert [r.line for r in read] == list(range(1, 8))
