"""Tiny bases with adapters of every method, and what `generate` says one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from deltaw.core.adapter import Adapter
from deltaw.core.spec import MethodSpec
from deltaw.methods import BitFit, Dora, Houlsby, Ia3, Lora, PrefixTuning, Prompt, PTuning, Vera
from deltaw.model.generate import generate
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.serve.engine import Engine
from deltaw.serve.fast import make_runner
from deltaw.serve.runner import GenericRunner
from deltaw.serve.types import Output, Request, Sampling
from models import make_net, make_tokenizer, randomise

END = 2
ALL = "all-linear"
RUNNERS = [GenericRunner, make_runner]
METHODS: dict[str, MethodSpec] = {
    "lora": Lora(rank=3, alpha=5, targets=ALL),
    "rslora": Lora(rank=7, alpha=3, rslora=True, bias="all", targets=ALL),
    "dora": Dora(rank=2, alpha=5, targets=ALL),
    "ia3": Ia3(),
    "vera": Vera(rank=6, targets=ALL),
    "bitfit": BitFit(add=True),
    "houlsby": Houlsby(bottleneck=5),
    "parallel": Houlsby(bottleneck=3, act="tanh", scale=1.5, placement="parallel"),
    "prompt": Prompt(n_tokens=5, start="random"),
    "prefix": PrefixTuning(n_tokens=19, projection=False),
    "ptuning": PTuning(n_tokens=4, hidden=9),
}


def base(kind: str, quantised: bool = False) -> Model:
    """A tiny float32 base, dense or in nf4, whose answers end with END."""
    net = make_net(kind)
    if quantised:
        quantise_network(net, Format("nf4", 64, True))
    model = Model(net, make_tokenizer())
    model.net.generation_config.eos_token_id = END
    return model


def adapter_of(model: Model, spec: MethodSpec, seed: int = 1) -> Adapter:
    """A finished adapter with noise in it; the model is bare again."""
    model.attach(spec)
    randomise(model, seed=seed, size=0.5 if spec.sits == "linear" else 0.8)
    made = model.adapter()
    model.detach()
    return made


def alone(model: Model, adapter: Adapter | None, prompt: Sequence[int], most: int) -> list[int]:
    """What `generate` answers to one prompt by itself."""
    if adapter is not None:
        model.attach(adapter)
    try:
        return generate(model, [list(prompt)], most)[0]
    finally:
        model.detach()


@dataclass
class Heard:
    """What one request gave."""

    outputs: list[Output] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)
        if output.finished is not None:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [o.token for o in self.outputs if o.token is not None]

    @property
    def text(self) -> str:
        return "".join(o.text for o in self.outputs)

    @property
    def finished(self) -> str | None:
        return self.outputs[-1].finished

    def wait(self, *, broken: bool = False) -> Heard:
        """Wait for the end, which is an error only where it should be."""
        assert self.over.wait(60), "no end within a minute"
        assert (self.finished == "error") == broken, self.outputs[-1].error
        return self


def ask(
    engine: Engine, prompt: Sequence[int], sampling: Sampling | None = None, adapter: str | None = None, **more: object
) -> Heard:
    """Submit a request, greedy unless told otherwise."""
    heard = Heard()
    sampling = sampling or Sampling(temperature=0.0, **more)  # type: ignore[arg-type]
    engine.submit(Request("r", tuple(prompt), sampling, adapter), heard)
    return heard


def n_free(engine: Engine) -> int:
    """Pages that nobody holds."""
    return engine.pages.n_pages - engine.pages.n_used
