"""How good a model is at rows: exact, json, choice, perplexity."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError

from deltaw.data.pack import collate, split_micro
from deltaw.data.source import Row
from deltaw.data.spec import DataSpec
from deltaw.data.task import CAUSAL, Task, label_number
from deltaw.data.template import Example, encode_all, prompt_ids
from deltaw.errors import DataError, RecipeError, WorkFailed, near
from deltaw.model.classify import label_scores
from deltaw.model.generate import generate
from deltaw.model.limits import refuse_beyond
from deltaw.model.model import Model

METRICS = ("exact", "json", "choice", "perplexity")
_TOKENS_AT_A_TIME = 4096


def evaluate_rows(
    model: Model,
    rows: Sequence[Row],
    metric: str,
    spec: DataSpec,
    *,
    labels: list[str] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    predictions: bool = False,
) -> dict[str, Any]:
    """One metric over `rows`: {"metric", "value", "n", "seconds", ...}.

    exact       share of rows whose greedy answer, stripped, is the completion, stripped
    json        share whose answer parses to the same JSON value as the completion
    choice      share whose completion is the most likely of `labels` (or of the row's own "choices"), by the
                summed log-likelihood of the answer and its end token
                A text classifier has one likeliest label: exact and choice are both the share that is the completion
    perplexity  exp of the mean negative log-likelihood of target tokens; rows of text have no end token here

    max_new_tokens  longest answer; None: the longest completion and 8 tokens, for json twice that (it may be indented)
    predictions     also return what was answered, under "predictions"; answers then run to their end, while
                    otherwise one that can no longer become the completion is cut short

    Raises RecipeError for an unknown metric, DataError for rows that it cannot judge.
    """
    check_metric(metric)
    check_rows(rows, metric, labels, model.task)
    began = time.perf_counter()
    if model.kind == "classify":
        result = _classified(model, rows, spec, predictions)
    elif metric == "perplexity":
        result = _perplexity(model, rows, spec)
    elif metric == "choice":
        result = _choice(model, rows, spec, labels, predictions)
    else:
        result = _answers(model, rows, metric, spec, max_new_tokens, batch_size, predictions)
    return {"metric": metric, **result, "seconds": round(time.perf_counter() - began, 3)}


def check_metric(metric: str) -> None:
    """Raise RecipeError, with the near name, for a metric that does not exist."""
    if metric not in METRICS:
        raise RecipeError(f"Unknown metric {metric!r}.{near(metric, METRICS)} Known: {', '.join(METRICS)}.")


def check_rows(rows: Sequence[Row], metric: str, labels: list[str] | None = None, task: Task = CAUSAL) -> None:
    """Raise DataError for a row that `metric` cannot judge, RecipeError for a metric that the base has no answer to."""
    if task.kind == "classify":
        if metric not in ("exact", "choice"):
            raise RecipeError(
                f"Metric {metric!r} is of answers in words, and this base is a text classifier: use exact, "
                "the share of texts that get their label."
            )
        for row in rows:
            label_number(row, task.labels)
        return
    for row in rows:
        if metric in ("exact", "json"):
            text = completion_of(row).strip()
            if metric == "json" and _parsed(text) is None:
                raise DataError(f"{row.where}: the completion is no JSON: {text[:60]!r}. Use --metric exact.")
        elif metric == "choice":
            _check_options(row, labels if labels is not None else row.choices)


def _check_options(row: Row, options: Sequence[str] | None) -> None:
    if not options:
        raise DataError(f"{row.where}: metric 'choice' needs --labels, or a list under \"choices\" in each row.")
    if row.prompt is None or row.completion is None:
        raise DataError(f"{row.where}: metric 'choice' needs prompt/completion rows.")
    if row.completion.strip() not in [o.strip() for o in options]:
        raise DataError(f"{row.where}: completion {row.completion!r} is none of the labels {options[:8]}.")


def data_spec(model: Model, template: str | None, max_tokens: int) -> DataSpec:
    """How rows become text for an evaluation: as the adapter in use was trained, unless `template` says."""
    in_use = [model.adapters[name] for name in model.run.use]
    provenance = in_use[0].provenance if in_use else {}
    trained = provenance.get("recipe", {}).get("data", {})
    shape = {k: trained[k] for k in ("template", "separator", "append_end") if k in trained}
    if "template" in provenance:  # rows of messages are chats whatever the recipe says of prompts
        shape["template"] = provenance["template"]
    if template is not None:
        shape["template"] = template
    try:
        return DataSpec(**shape, max_tokens=max_tokens)
    except ValidationError as error:
        raise RecipeError(f"template={template!r}: write plain or chat. ({error.error_count()} problem)") from None


def completion_of(row: Row) -> str:
    """What a row's answer should be: its completion, or the first turn of the assistant."""
    if row.completion is not None:
        return row.completion
    for message in row.messages or []:
        if message.get("role") == "assistant" and message.get("tool_calls"):
            raise DataError(
                f"{row.where}: the assistant's first turn calls tools, which is no text to compare an answer with.\n"
                "  Measure such rows by loss or perplexity."
            )
        if message.get("role") == "assistant":
            return str(message["content"])
    raise DataError(f"{row.where}: no completion to compare an answer with.")


def _answers(
    model: Model,
    rows: Sequence[Row],
    metric: str,
    spec: DataSpec,
    max_new_tokens: int | None,
    batch_size: int,
    predictions: bool,
) -> dict[str, Any]:
    wanted = [completion_of(row).strip() for row in rows]
    tokenizer = model.tokenizer
    prompts = [prompt_ids(row, tokenizer, spec, model.task) for row in rows]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted]
    most = max_new_tokens or (max(lengths) + 8) * (2 if metric == "json" else 1)
    hopeless: Callable[[int, list[int]], bool] | None = None
    if metric == "exact" and not predictions:

        def hopeless(i: int, tokens: list[int]) -> bool:
            so_far = tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
            if so_far.endswith("\ufffd"):  # a character that is not complete yet
                return False
            return not (wanted[i].startswith(so_far) or so_far.rstrip() == wanted[i])

    answers = generate(model, prompts, most, batch_size=batch_size, give_up=hopeless)
    texts = [tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]
    right = [
        text == want if metric == "exact" else _parsed(text) == _parsed(want)
        for text, want in zip(texts, wanted, strict=True)
    ]
    result: dict[str, Any] = {"value": sum(right) / len(rows), "n": len(rows)}
    if predictions:
        result["predictions"] = [
            {"where": row.where, "answer": text, "wanted": want, "right": ok}
            for row, text, want, ok in zip(rows, texts, wanted, right, strict=True)
        ]
    return result


def _parsed(text: str) -> str | None:
    """`text` as canonical JSON, equal for equal values (1 and 1.0, not 1 and true); None when it is no JSON."""
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):  # an answer may be nothing but brackets
        return None


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _classified(model: Model, rows: Sequence[Row], spec: DataSpec, predictions: bool) -> dict[str, Any]:
    task = model.task
    encoded = encode_all(rows, model.tokenizer, spec.model_copy(update={"too_long": "cut"}), task)
    refuse_beyond(model.net, encoded.examples, model.n_before)
    scores = label_scores(model, [e.input_ids[:-1] for e in encoded.examples])
    wanted = [e.input_ids[-1] for e in encoded.examples]
    picked = scores.argmax(-1).tolist()
    right = [p == w for p, w in zip(picked, wanted, strict=True)]
    result: dict[str, Any] = {"value": sum(right) / len(rows), "n": len(rows), "rows_cut": encoded.n_cut}
    if predictions:
        result["predictions"] = [
            {"where": row.where, "answer": task.labels[p], "wanted": task.labels[w], "right": p == w}
            for row, p, w in zip(rows, picked, wanted, strict=True)
        ]
    return result


@torch.no_grad()
def log_likelihoods(model: Model, examples: Sequence[Example]) -> list[float]:
    """The summed log-likelihood of each example's target tokens."""
    refuse_beyond(model.net, examples, model.n_before)
    lengths = [len(e.input_ids) for e in examples]
    sums = [0.0] * len(examples)
    for micro in split_micro(range(len(examples)), lengths, _TOKENS_AT_A_TIME):
        chosen = [examples[i] for i in micro]
        batch = collate(chosen)
        for part, logits in _by_rows(model.pack_logits(batch)):
            targets = batch.target_ids[part, None].to(logits.device)
            scores = logits.float().log_softmax(-1).gather(1, targets).squeeze(1).cpu()
            owner = torch.searchsorted(batch.bounds, batch.predict_at[part], right=True) - 1
            for doc, score in zip(owner.tolist(), scores.double().tolist(), strict=True):
                sums[micro[doc]] += score
    if not all(map(math.isfinite, sums)):
        bad = next(e.where for e, s in zip(examples, sums, strict=True) if not math.isfinite(s))
        raise WorkFailed(f"{bad}: its log-likelihood is not finite: the adapter or the base is broken.")
    return sums


def _by_rows(logits: torch.Tensor, rows: int = 256) -> list[tuple[slice, torch.Tensor]]:
    return [(slice(s, s + rows), logits[s : s + rows]) for s in range(0, logits.shape[0], rows)]


def _perplexity(model: Model, rows: Sequence[Row], spec: DataSpec) -> dict[str, Any]:
    texts = all(row.text is not None for row in rows)  # plain text has no end that could be predicted
    spec = spec.model_copy(update={"append_end": False}) if texts else spec
    encoded = encode_all(rows, model.tokenizer, spec, model.task)
    total = sum(log_likelihoods(model, encoded.examples))
    return {
        "value": math.exp(min(-total / encoded.n_targets, 700.0)),  # beyond it a float overflows
        "n": len(encoded.examples),
        "target_tokens": encoded.n_targets,
        "rows_cut": encoded.n_cut,
    }


def _choice(
    model: Model, rows: Sequence[Row], spec: DataSpec, labels: list[str] | None, predictions: bool
) -> dict[str, Any]:
    candidates: list[Row] = []
    spans: list[tuple[int, list[str], int]] = []
    for row in rows:
        options = labels if labels is not None else row.choices or ()
        answer = [o.strip() for o in options].index((row.completion or "").strip())
        spans.append((len(candidates), list(options), answer))
        candidates += [replace(row, completion=option) for option in options]
    whole = spec.model_copy(update={"too_long": "error"})
    examples = encode_all(candidates, model.tokenizer, whole, model.task).examples
    scores = log_likelihoods(model, examples)
    picked = []
    for start, options, _ in spans:
        part = scores[start : start + len(options)]
        picked.append(part.index(max(part)))
    right = [p == answer for p, (_, _, answer) in zip(picked, spans, strict=True)]
    result: dict[str, Any] = {"value": sum(right) / len(rows), "n": len(rows)}
    if predictions:
        result["predictions"] = [
            {"where": row.where, "answer": options[p], "wanted": options[answer], "right": p == answer}
            for row, p, (_, options, answer) in zip(rows, picked, spans, strict=True)
        ]
    return result
