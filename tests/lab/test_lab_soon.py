"""Answers in parts: what is there at once, the rest when it is asked for again, and nothing half made is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from lab_bench import Bench

from deltaw.errors import TargetError
from deltaw.lab import counts
from deltaw.lab.controls import read
from deltaw.lab.server import shown
from deltaw.lab.soon import Soon

PATIENCE_S = 60


def until(get: Callable[[], dict[str, Any]], size: int) -> dict[str, Any]:
    """What `get` gives as soon as it has so many parts."""
    end = time.monotonic() + PATIENCE_S
    while len(found := get()) < size:
        assert time.monotonic() < end
    return found


def test_lab_soon_gives_what_is_there_and_the_rest_later_made_once():
    soon, gate = Soon(), threading.Event()
    made: list[str] = []
    makers = {"a": lambda: made.append("a") or 1, "b": lambda: (gate.wait(PATIENCE_S) and made.append("b")) or 2}
    assert until(lambda: soon.get("x", makers), 1) == {"a": 1}
    assert soon.get("x", makers) == {"a": 1}
    gate.set()
    assert until(lambda: soon.get("x", makers), 2) == {"a": 1, "b": 2}
    assert made == ["a", "b"]


def test_lab_soon_another_question_drops_what_has_not_begun_and_asking_again_makes_it():
    soon, gate, begun = Soon(), threading.Event(), threading.Event()
    made: list[str] = []

    def slow() -> str:
        begun.set()
        assert gate.wait(PATIENCE_S)
        return "slow"

    first = {"a": slow, "b": lambda: made.append("x's b") or "b"}
    second = {"a": lambda: made.append("y's a") or "a"}
    assert soon.get("x", first) == {}
    assert begun.wait(PATIENCE_S)
    assert soon.get("y", second) == {}
    gate.set()
    assert until(lambda: soon.get("y", second), 1) == {"a": "a"}
    assert made == ["y's a"]
    assert until(lambda: soon.get("x", first), 2) == {"a": "slow", "b": "b"}


def test_lab_soon_says_what_went_wrong_and_tries_anew():
    soon = Soon()
    wrong = [True]

    def make() -> int:
        if wrong.pop():
            raise TargetError("nothing to train")
        return 3

    with pytest.raises(TargetError, match="nothing to train"):
        soon.get("x", {"a": make})
    wrong.append(False)
    assert until(lambda: soon.get("x", {"a": make}), 1) == {"a": 3}


def test_lab_soon_a_picture_with_bars_to_come_is_not_kept_and_the_whole_one_is_the_librarys(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
):
    gate = threading.Event()
    real = counts.planned
    calls: list[str] = []

    def slow(lab: Any, c: Any, method: str) -> Any:
        calls.append(method)
        assert method == "full" or gate.wait(PATIENCE_S)
        return real(lab, c, method)

    monkeypatch.setattr(counts, "planned", slow)
    picture, given = tiny.pictures[11], {"model": "tiny", "rank": 3, "batch": 2, "length": "128"}

    def ask() -> dict[str, Any]:
        return shown(tiny.lab, picture, given)

    partly = until(lambda: {b["method"]: b for b in ask()["data"]["bars"]}, 1)
    assert list(partly) == ["full"]
    assert ask()["data"]["pending"] == ["LoRA", "QLoRA"]
    assert [n["shown"] for n in ask()["numbers"][1:]] == ["being computed"] * 2
    gate.set()
    whole = tiny.shown(11, **given)
    assert whole == picture.compute(tiny.lab, read(picture.controls, given))
    assert whole["data"]["pending"] == []
    assert calls[:3] == ["full", "LoRA", "QLoRA"]
    before = len(calls)
    assert tiny.shown(11, **given) is whole
    assert len(calls) == before


def test_lab_soon_what_a_base_cannot_have_is_said(tiny: Bench, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> Any:
        raise TargetError("nothing to train")

    with monkeypatch.context() as patch:
        patch.setattr(counts, "planned", refused)
        with pytest.raises(TargetError, match="nothing to train"):
            tiny.shown(11, model="tiny", rank=4)
    assert tiny.shown(11, model="tiny", rank=4)["data"]["pending"] == []
