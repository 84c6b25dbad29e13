"""What went wrong with a run or an adapter, from its files, and from its base where there is one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.core.checkpoint_files import checkpoint_files
from deltaw.core.fingerprint import HARD, cache_dir, fingerprint_folder
from deltaw.core.misfits import not_finite
from deltaw.diagnose.bands import Band, bands
from deltaw.diagnose.curve import FEWEST_STEPS, Curve, Log, read_curve, read_log
from deltaw.diagnose.facts import Facts, Finding, Trial
from deltaw.diagnose.findings import findings
from deltaw.diagnose.general import Change, Forgetting, forgetting, on_rows
from deltaw.diagnose.precision import Rounded, rounding
from deltaw.diagnose.sites import SiteRow, measure_alone, measure_on, total
from deltaw.diagnose.trial import try_rank
from deltaw.errors import AdapterError, BadInput, DataError, NotFound
from deltaw.merge.checkpoint import Checkpoint
from deltaw.merge.rounded import RoundedCheckpoint
from deltaw.merge.source import Source
from deltaw.model.base import labels_for, load_base
from deltaw.model.load import folder_format, resolve_base
from deltaw.model.quantised import Format
from deltaw.model.starter import STARTERS
from deltaw.store.describe import RUN, WHOLE, describe_run, is_adapter, is_run
from deltaw.store.peft import read_adapter

Say = Callable[[str], None]
GENERAL, TEXT = Path("data/general_mcq/questions.jsonl"), Path("data/ppl/wiki.jsonl")
"""What forgetting is measured on by default: this project's own files, where the working folder has them."""


@dataclass
class Diagnosis:
    """What was found.

    findings  what is wrong; empty for a healthy run
    not_made  checks that were left out, each with why
    rows      places;  log, curve: of the run;  rounded: by number format, what a merge would leave of the update
    bands     how large steps and update are, beside what is usual
    """

    path: str
    adapter: str | None
    method: str | None
    base: str | None
    findings: list[Finding]
    not_made: list[dict[str, str]]
    rate: float | None
    scale: float | None
    rows: list[SiteRow]
    bands: list[Band]
    log: Log | None
    curve: Curve | None
    rounded: dict[str, Rounded]
    forgetting: Forgetting | None
    data: Change | None
    trial: Trial | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "path": self.path,
            "adapter": self.adapter,
            "method": self.method,
            "base": self.base,
            "findings": [f.plain() for f in self.findings],
            "not_made": self.not_made,
            "learning_rate": self.rate,
            "scale": self.scale,
            "curve": None if self.curve is None else asdict(self.curve),
            "evaluations": [asdict(e) for e in self.log.evals] if self.log else [],
            "merge": {n: {"kept": r.kept, "error": r.error, "lost": r.lost} for n, r in self.rounded.items()},
            "forgetting": None if self.forgetting is None else asdict(self.forgetting),
            "data": None if self.data is None else asdict(self.data),
            "trial": None if self.trial is None else asdict(self.trial),
            "bands": [asdict(b) for b in self.bands],
            "places": [r.plain() for r in self.rows],
        }


def diagnose(
    path: str | Path,
    base: str | Path | None = None,
    *,
    alone: bool = False,
    data: str | Path | None = None,
    merged: str | Path | None = None,
    merge_dtype: str = "bfloat16",
    check_forgetting: bool = False,
    general: str | Path | None = None,
    text: str | Path | None = None,
    limit: int | None = None,
    rank: int | None = None,
    say: Say | None = None,
) -> Diagnosis:
    """Look for the failures of docs/diagnosis.md in a run or an adapter. Nothing is written.

    path              the folder of a run or of an adapter
    base              the base it belongs to; None: the one it names, where that is a folder or a starter in the cache
    alone             leave the base out: what the log and the adapter tell by themselves, in a fraction of a second
    data              rows to measure the loss on with and without the adapter; for `rank`: the run's training rows
    merged            a folder that this adapter was merged into: what is left of the update there
    merge_dtype       what a merge would be written in: float32, bfloat16, float16, nf4, fp4, int4, int8
    check_forgetting  answer general questions and read general text before and after (minutes)
    general, text     rows for that instead of data/general_mcq and data/ppl;  limit: the first rows of each
    rank              train the same steps with this rank and compare (takes as long as the run)
    say               called with a sentence before each long step

    Raises NotFound, AdapterError, RunError, BaseError, DataError, BadInput for what cannot be read or used.
    """
    work = _Work(Path(path), data=_file(data), merge_dtype=merge_dtype, say=say or (lambda _: None))
    work.read()
    if alone:
        work.skip("norms of the weights, base and merging", "the base was left out")
    else:
        work.find_base(base)
    work.measure(None if merged is None else Path(merged))
    if check_forgetting or general is not None or text is not None:
        work.forget(_file(general), _file(text), limit)
    elif limit is not None:
        raise BadInput("--limit is of the rows of --forgetting, which is not asked for: add it, or leave --limit out.")
    else:
        work.skip("forgetting", "it takes minutes: ask for it with --forgetting")
    if data is not None and rank is None:
        work.on_data()
    if rank is not None:
        work.try_rank(rank)
    return work.result()


def _file(path: str | Path | None) -> Path | None:
    if path is not None and not Path(path).is_file():
        raise DataError(f"{path} is no file. Give a file of rows (JSON lines).")
    return None if path is None else Path(path)


@dataclass
class _Work:
    """One diagnosis while it is made."""

    path: Path
    data: Path | None
    merge_dtype: str
    say: Say
    run: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    not_made: list[dict[str, str]] = field(default_factory=list)

    def skip(self, check: str, why: str) -> None:
        """A check that is not made."""
        self.not_made.append({"check": check, "why": why})

    def read(self) -> None:
        """The run's log and the adapter."""
        rounding(self.merge_dtype)
        if not self.path.exists():
            raise NotFound(f"No run and no adapter at {self.path}: there is no such folder.")
        self.run = next((p for p in (self.path, self.path.resolve().parent) if is_run(p)), None)
        if self.run is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an unfinished run is said below
                self.identity = describe_run(self.run)["identity"] if self.run == self.path else _identity(self.run)
        if is_adapter(self.path) or self.run is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.adapter = read_adapter(self.path)
            self.facts |= {"bad": tuple(not_finite(self.adapter.tensors())), "moves_else": bool(self.adapter.replaced)}
        elif (self.path / WHOLE).is_dir():
            self.skip("spectrum, norms and merging", "the run trained a whole model, which is no adapter")
        else:
            self.skip("spectrum, norms and merging", "the run has left no adapter")
        self._read_log()

    def _read_log(self) -> None:
        log = read_log(self.run) if self.run is not None else None
        self.facts |= {"log": log, "curve": None if log is None else read_curve(log.steps), **self._settings()}
        if log is None:
            self.skip("loss curve", "an adapter alone has none: give the folder of its run")
            return
        if not log.finished:
            self.skip("the rest of the run", f"it is not done: step {len(log.steps)} of {log.n_steps}")
        if self.facts["curve"] is None:
            self.skip("loss curve", f"{len(log.steps)} steps, of which {FEWEST_STEPS} finite ones or more are needed")
        if not any(e.loss is not None for e in log.evals):
            self.skip("overfitting", "the run has no loss on validation rows")

    def _settings(self) -> dict[str, Any]:
        """Rate, alpha and rank as they were set."""
        recipe = self.identity.get("recipe") or (self.adapter.provenance.get("recipe") if self.adapter else None) or {}
        train, own = recipe.get("train", {}), recipe.get("adapter", {})
        if not own and self.adapter is not None:
            own = self.adapter.spec.model_dump(mode="json")
        rate, rank, alpha = train.get("lr"), own.get("rank"), own.get("alpha")
        if rate is not None:
            rate *= (train.get("optimizer") or {}).get("lora_plus_ratio", 1.0)
        else:
            self.skip("steps against weights", "neither a run nor the adapter tells the learning rate")
        scale = None if not rank or alpha is None else alpha / (rank**0.5 if own.get("rslora") else rank)
        return {"rate": rate, "alpha": alpha, "rank": rank, "scale": scale}

    def find_base(self, given: str | Path | None) -> None:
        """The base's folder, and whether it is the adapter's."""
        named = (self.identity.get("recipe") or {}).get("base", {}).get("path") or (
            self.adapter.provenance.get("base") if self.adapter else None
        )
        if given is not None:
            self.folder = resolve_base(given, say=self.say)
        elif isinstance(named, str) and (Path(named).is_dir() or _cached(named)):
            self.folder = resolve_base(named)
        else:
            self.skip("norms of the weights, base and merging", f"{named} is not here: give the base as --base")
            return
        found = fingerprint_folder(self.folder)
        if self.adapter is None:
            return
        if self.adapter.fingerprint is None:
            self.skip("identity of the base", "the adapter does not say which base it was trained on (a foreign file)")
            return
        apart = self.adapter.fingerprint.differences(found)
        hard = [f"{k}: it has {mine}, this base {its}" for k, (mine, its) in apart.items() if k in HARD]
        if hard:
            names = f"it was trained on {self.adapter.fingerprint.short()}, this is {found.short()}"
            self.facts["mismatch"] = (names, *hard)

    def measure(self, merged: Path | None) -> None:
        """Rows of the places; what rounding leaves."""
        if merged is not None and (self.adapter is None or self.folder is None or self.facts.get("mismatch")):
            self.skip("the merged model", "it needs the adapter and the base that it was trained on (--base)")
        if self.adapter is None:
            return
        if self.folder is not None and not self.facts.get("mismatch") and not self.facts["bad"]:
            try:
                self._measure_on(self.adapter, self.folder, merged)
                return
            except AdapterError as problem:
                self.facts["mismatch"] = (str(problem).rstrip("."),)
        rows, others = measure_alone(self.adapter)
        self.facts["rows"] = rows
        if self.facts.get("mismatch") or self.facts["bad"]:
            why = "the base is another one" if self.facts.get("mismatch") else "the adapter holds NaN or Inf"
            self.skip("norms of the weights and merging", why)
        if others:
            self.skip("spectrum", f"{len(others)} places need their base's weights, or hold no plain finite change")

    def _measure_on(self, adapter: Adapter, folder: Path, merged: Path | None) -> None:
        own = folder_format(folder)
        names = [self.merge_dtype] + ([str(own)] if own and str(own) != self.merge_dtype else [])
        self.say("reading the base's weights")
        with _opened(folder, adapter) as checkpoint:
            source = Source(folder, checkpoint, adapter, "float32", own)
            written = None
            if merged is None:
                rows = measure_on(adapter, source, {n: rounding(n) for n in names})
            else:
                into = resolve_base(merged)
                with _opened(into, adapter) as other:
                    written = Source(into, other, adapter, "float32", folder_format(into))
                    names.append("written")
                    self.facts["written_in_bits"] = folder_format(into) is not None
                    rows = measure_on(adapter, source, {n: rounding(n) for n in names[:-1]}, written)
        self.facts["rows"] = rows
        sums = {n: total(rows, n) for n in names}
        self.facts["rounded"] = {n: r for n, r in sums.items() if r is not None}
        if not rows:
            self.skip("spectrum, norms and merging", f"method {adapter.spec.name!r} changes no linear map")
        elif adapter.spec.sits == "linear" and all(r.rank is None for r in rows):
            self.skip("rank", f"method {adapter.spec.name!r} has none")

    def _model(self) -> Any:
        """The base as the adapter was trained on it, with the adapter attached; None where that cannot be."""
        assert self.adapter is not None
        assert self.folder is not None
        how = Format.parse(self.adapter.fingerprint.format) if self.adapter.fingerprint else None
        if folder_format(self.folder) is not None:
            how = None
        as_quantised: dict[str, Any] = (
            {} if how is None else {"format": how.name, "block": how.block, "double_quant": how.double_quant}
        )
        self.say("loading the base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what differs from the adapter's base is said already
            labels = labels_for(self.folder, self.path, None)
            model = load_base(self.folder, dtype="auto", labels=labels, **as_quantised)
            model.attach(self.adapter, name="it")
        return model

    def _can_compute(self, check: str) -> bool:
        if self.adapter is None or self.folder is None or self.facts.get("mismatch") or self.facts["bad"]:
            self.skip(check, "it needs a finite adapter and the base that it was trained on (--base)")
            return False
        return True

    def forget(self, general: Path | None, text: Path | None, limit: int | None) -> None:
        """General ability before and after."""
        general = general or (GENERAL if GENERAL.is_file() else None)
        text = text or (TEXT if TEXT.is_file() else None)
        if general is None and text is None:
            raise BadInput(f"--forgetting: neither {GENERAL} nor {TEXT} is here. Give --general and --text.")
        if not self._can_compute("forgetting"):
            return
        for what, file in (("general questions", general), ("perplexity on general text", text)):
            if file is None:
                self.skip(what, "there is no file for it: give --general or --text")
        self.say("answering general questions without and with the adapter")
        self.facts["forgetting"] = forgetting(self._model(), "it", general, text, limit)

    def on_data(self) -> None:
        """The loss on the given rows before and after."""
        assert self.data is not None
        if self._can_compute("rows of --data"):
            self.facts["data"] = on_rows(self._model(), "it", self.data)

    def try_rank(self, rank: int) -> None:
        """The same steps with another rank."""
        if self.run is None or self.facts["log"] is None:
            raise BadInput(f"--try-rank {rank} repeats a run: give the folder of a run, not of an adapter.")
        self.say(f"training the same steps with rank {rank}")
        self.facts["trial"] = try_rank(self.identity, self.facts["log"], rank, self.folder, self.data, self.say)

    def result(self) -> Diagnosis:
        """Facts into findings."""
        facts = Facts(**self.facts)
        scale = facts.median(lambda r: r.scale)
        if scale is not None:
            self.facts["scale"] = scale
            facts = Facts(**self.facts)
        return Diagnosis(
            path=str(self.path),
            adapter=None if self.adapter is None else self.adapter.id,
            method=self.adapter.spec.name if self.adapter else self.identity["recipe"]["adapter"]["method"],
            base=None if self.folder is None else str(self.folder),
            findings=findings(facts),
            not_made=self.not_made,
            rate=facts.rate,
            scale=facts.scale,
            rows=facts.rows,
            bands=bands(facts),
            log=facts.log,
            curve=facts.curve,
            rounded=facts.rounded,
            forgetting=facts.forgetting,
            data=facts.data,
            trial=facts.trial,
        )


def _identity(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / RUN).read_text(encoding="utf-8"))
    return found


def _cached(name: str) -> bool:
    return name in STARTERS and (cache_dir() / "bases" / name).is_dir()


def _opened(folder: Path, adapter: Adapter) -> Checkpoint:
    checkpoint_files(folder)  # a folder that is no model is said in a sentence
    how = folder_format(folder)
    if how is None:
        return Checkpoint(folder)
    return RoundedCheckpoint(folder, how, "float32", adapter.provenance.get("labels") or None)
