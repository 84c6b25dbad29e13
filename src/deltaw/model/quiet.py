"""What transformers switches for the whole process, held by one thread at a time and put back.

While it makes a network, transformers changes torch's default dtype and stops the initialisers of torch.nn: for every
thread. Two that do so at once put back each other's values, and from then on every tensor made without a dtype is
bfloat16. So networks are made inside `making`, and deltaw's own tensors all say their dtype (tests/house).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from huggingface_hub.errors import StrictDataclassError

UNUSABLE = (
    ValueError, OSError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a config that makes no network."""

_making = threading.RLock()
_switches = threading.Lock()
_inside: list[ExitStack] = []  # one entry a block; the first holds what restores


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars, log lines and warnings inside the block; restored after the last of them."""
    with _switches:
        _inside.append(_silenced() if not _inside else _inside[0])
    try:
        yield
    finally:
        with _switches:
            restoring = _inside.pop()
            if not _inside:
                restoring.close()


@contextmanager
def making() -> Iterator[None]:
    """The same, and no other thread makes a network or a tokenizer meanwhile."""
    with _making, quiet():
        yield


def _silenced() -> ExitStack:
    from transformers.utils import logging

    stack = ExitStack()
    stack.callback(logging.set_verbosity, logging.get_verbosity())
    if logging.is_progress_bar_enabled():
        stack.callback(logging.enable_progress_bar)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return stack
