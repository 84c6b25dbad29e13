"""Text to token batches: rows and their checks, which tokens are targets, and packing."""

from deltaw.data.pack import Batch, collate, plan_epoch, split_micro
from deltaw.data.report import length_statistics, marked
from deltaw.data.source import Row, data_hash, read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import Encoded, Example, encode, encode_all, prompt_ids

__all__ = [
    "Batch",
    "DataSpec",
    "Encoded",
    "Example",
    "Row",
    "collate",
    "data_hash",
    "encode",
    "encode_all",
    "length_statistics",
    "marked",
    "plan_epoch",
    "prompt_ids",
    "read_rows",
    "split_micro",
]
