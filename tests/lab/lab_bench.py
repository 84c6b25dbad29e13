"""A lab's pictures as tests ask for them."""

from __future__ import annotations

from typing import Any

from deltaw.lab.base import Lab
from deltaw.lab.controls import read
from deltaw.lab.picture import Picture
from deltaw.lab.pictures import pictures_of
from deltaw.lab.server import shown

STARTER = "smollm2-135m-instruct"


class Bench:
    """A lab with its pictures: `bench(13, rank=4)` is picture 13's plain data at these controls."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pictures: dict[int, Picture] = pictures_of(lab)

    def __call__(self, number: int, **given: Any) -> dict[str, Any]:
        picture = self.pictures[number]
        return picture.compute(self.lab, read(picture.controls, given))

    def shown(self, number: int, **given: Any) -> dict[str, Any]:
        """What the server answers, asked until nothing of it is still made, as the page does."""
        found = shown(self.lab, self.pictures[number], given)
        while found["data"].get("pending"):
            found = shown(self.lab, self.pictures[number], given)
        return found

    def act(self, number: int, **given: Any) -> dict[str, Any]:
        picture = self.pictures[number]
        assert picture.act is not None
        found = picture.act(self.lab, read(picture.controls, given))
        while number == 9 and found["data"]["step"] < given.get("step", 0):  # as the page does
            found = picture.act(self.lab, read(picture.controls, given))
        return found


def numbers(plain: dict[str, Any]) -> dict[str, Any]:
    """The values of the numbers that a picture shows, by key."""
    return {n["key"]: n["value"] for n in plain["numbers"]}


def texts(plain: dict[str, Any]) -> dict[str, str]:
    """The same as the page writes them."""
    return {n["key"]: n["shown"] for n in plain["numbers"]}
