"""What happens in a run. Terminal, files, TensorBoard, the lab and tests read the same events."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened. `plain()` is what --json prints and metrics.jsonl keeps."""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    def plain(self) -> dict[str, Any]:
        """The event as plain data, its kind under "event". `paged_mb` is there only when states are paged."""
        plain = {"event": self.kind, **asdict(self)}
        return {key: value for key, value in plain.items() if key != "paged_mb" or value is not None}


@dataclass(frozen=True)
class Planned(Event):
    """Settings were chosen so that the run fits its budget. Bytes are of the whole process.

    settings  what was chosen, as a plan says it;  gave_up  what differs from the recipe, as sentences
    """

    memory_gb: float
    needed_bytes: int
    settings: dict[str, Any]
    gave_up: tuple[str, ...]


@dataclass(frozen=True)
class Start(Event):
    """The run begins or goes on. Counts are of tokens unless they say otherwise.

    blocks   how they are computed: "fused", or "plain: " and why
    """

    n_steps: int
    first_step: int
    rows: int
    rows_cut: int
    rows_skipped: int
    tokens_per_epoch: int
    target_tokens_per_epoch: int
    parameters: int
    base: str
    dtype: str
    out: str
    blocks: str


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step; `loss` is the mean over its target tokens, before the update.

    growth     norm of dW over norm of W after the update (growth.py), about twenty times a run; None at other steps
    paged_mb   10^6 bytes of optimizer states that were read and written; None: states are not paged
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    target_tokens: int
    seconds: float
    tokens_per_s: float
    peak_rss_mb: float | None
    growth: float | None = None
    paged_mb: float | None = None


@dataclass(frozen=True)
class Eval(Event):
    """An evaluation on the validation rows after `step` steps."""

    step: int
    metric: str
    value: float
    loss: float | None
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is on the disk, whole."""

    step: int
    path: str


@dataclass(frozen=True)
class Done(Event):
    """The run is complete. `tokens` are non-pad tokens trained on; tokens_per_s and paged_mb are of the whole loop."""

    adapter: str | None
    seconds: float
    target_tokens: int
    tokens: int
    tokens_per_s: float
    peak_rss_mb: float | None
    steps: int
    loss: float
    best: float | None
    metric: str
    stopped_early: bool
    model: str | None = None
    paged_mb: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
