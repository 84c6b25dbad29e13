"""Real servers on loopback for the tests of HTTP: a tiny base, a registry of adapters, uvicorn in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.core.spec import MethodSpec
from deltaw.methods import Ia3, Lora
from deltaw.model.base import load_base
from deltaw.serve.app import make_app
from deltaw.serve.engine import Engine
from deltaw.serve.served import Served
from deltaw.serve.server import make_server
from deltaw.serve.settings import ServerSettings
from deltaw.store.registry import Registry
from models import make_net, randomise

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
OWN_TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
ADMIN = "an-admin-key-for-tests-only"
POSITIONS = 512


def save_tiny_base(folder: Path, seed: int = 0) -> Path:
    """A tiny random base whose tokenizer knows bytes, with a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(["<|end|>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    sizes = {"vocab_size": len(letters) + 1, "max_position_embeddings": POSITIONS}
    net = make_net("llama", seed=seed, eos_token_id=0, bos_token_id=None, **sizes)
    net.config.architectures = [type(net).__name__]
    net.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, spec: MethodSpec, seed: int, template: str | None = None) -> Path:
    """A noisy adapter of `base`, optionally with a chat template of its own."""
    model = load_base(base)
    model.attach(spec)
    randomise(model, seed=seed)
    model.adapter().save(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@dataclass(frozen=True)
class Made:
    """The files that servers of the tests serve."""

    base: Path
    registry: Path
    loose: Path  # the root of adapters that an admin may load
    foreign: Path  # an adapter of another base


def make_files(folder: Path) -> Made:
    """A base; a registry with `support` (two versions), `legal` and `foreign`; a folder of loose adapters."""
    base = save_tiny_base(folder / "base")
    loose = folder / "loose"
    for number in (1, 2):
        save_adapter(base, loose / f"v{number}", Lora(rank=number + 2, alpha=5), seed=number)
    save_adapter(base, loose / "ia3", Ia3(), seed=3, template=OWN_TEMPLATE)
    other = save_tiny_base(folder / "other", seed=9)
    foreign = save_adapter(other, folder / "foreign", Lora(rank=2, alpha=3), seed=4)
    registry = Registry(folder / "registry", create=True)
    for name, path in (("support", "v1"), ("support", "v2"), ("legal", "ia3")):
        registry.add(name, loose / path)
    registry.add("foreign", foreign)
    return Made(base, folder / "registry", loose, foreign)


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    app: FastAPI
    served: Served
    server: Any

    def client(self, key: str | None = None, **settings: Any) -> httpx.Client:
        """An HTTP client of it."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **settings)

    def idle(self, within_s: float = 10.0) -> bool:
        """Whether everything is let go of within some seconds."""
        until = time.monotonic() + within_s
        admission, engine = self.app.state.serving.admission, self.served.engine
        while time.monotonic() < until:
            stats = engine.stats()
            if not (admission.sequences or stats.running or stats.waiting or self.served.residency._pins):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def running(
    made: Made,
    settings: ServerSettings | None = None,
    *,
    registry: bool = True,
    kv_mb: int = 8,
    step_s: float = 0.0,
    **budgets: int,
) -> Iterator[Running]:
    """A server on a free port of loopback, in this process, with an engine of its own; step_s: more time a step."""
    model = load_base(made.base)
    engine = Engine(model, kv_bytes=kv_mb * 2**20, max_sequences=(settings or ServerSettings()).max_sequences)
    run = engine._runner.run
    engine._runner.run = lambda batch: (time.sleep(step_s), run(batch))[1]
    kept = Registry(made.registry) if registry else None
    served = Served(model, engine, "tiny", kept, (settings or ServerSettings()).adapter_roots, **budgets)
    app = make_app(served, settings)
    server = make_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app, served, server)
    finally:
        server.should_exit = True
        thread.join(10)
        engine.close()
        served.close()
        app.state.serving.close()
