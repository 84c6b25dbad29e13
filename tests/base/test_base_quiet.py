"""What transformers switches for the whole process is put back, however many threads make networks."""

from __future__ import annotations

import threading

import torch
from transformers import LlamaConfig
from transformers.utils import logging

from deltaw.model.empty import network_from
from deltaw.model.quiet import making, quiet

SMALL = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
).to_dict()


def test_base_quiet_threads_that_make_networks_leave_the_default_dtype():
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    start = threading.Barrier(len(dtypes))
    found: list[torch.dtype] = []

    def make(dtype: torch.dtype) -> None:
        start.wait()
        found.extend(network_from(SMALL, dtype).get_input_embeddings().weight.dtype for _ in range(12))

    threads = [threading.Thread(target=make, args=(dtype,)) for dtype in dtypes]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)  # what would be left if this failed spoils every test after it
    assert sorted(map(str, found)) == sorted(str(dtype) for dtype in dtypes * 12)


def test_base_quiet_one_thread_makes_at_a_time():
    inside, most = [], []

    def make() -> None:
        with making(), making():  # a loader inside a loader is one
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_base_quiet_ends_with_the_last_block():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    first, second = quiet(), quiet()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        second.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()
