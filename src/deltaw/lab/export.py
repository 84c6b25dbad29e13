"""A static site of the pictures: the same page, with data recorded at chosen positions of the controls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

from deltaw.errors import BadInput
from deltaw.lab.base import Lab
from deltaw.lab.controls import drawn, read
from deltaw.lab.pictures import pictures_of
from deltaw.lab.server import ASSETS
from deltaw.store.files import whole_folder


def write_site(
    lab: Lab, out: Path, say: Callable[[str], None] | None = None, only: Collection[int] | None = None
) -> int:
    """Write the site into the new folder `out`, whole or not at all; returns how many positions were recorded.

    data/pictures.json holds the frames, data/N/0-2-1.json picture N at the first, third and second recorded position
    of its controls; what the library refuses is left out. Served by any web server; browsers
    do not run a page's modules from file://.

    only  numbers of pictures; None: all

    Raises RunError where `out` holds something.
    """
    recorded = 0
    with whole_folder(out) as folder:
        shutil.copytree(ASSETS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("work"))
        pictures = {n: p for n, p in pictures_of(lab).items() if only is None or n in only}
        frames = {"base": lab.label, "recorded": True, "pictures": [p.plain() for p in pictures.values()]}
        _write(folder / "data" / "pictures.json", frames)
        page = folder / "index.html"
        page.write_text(
            page.read_text(encoding="utf-8").replace('content="live"', 'content="recorded"'), encoding="utf-8"
        )
        for number, picture in pictures.items():
            parts = drawn(picture.controls)
            compute = picture.act or picture.compute
            for at in product(*(range(len(p["recorded"])) for p in parts)):
                given = {p["name"]: p["recorded"][i] for p, i in zip(parts, at, strict=True)}
                try:
                    plain = compute(lab, read(picture.controls, given))
                except BadInput:  # this base has no such position, or settings clash: the page says so
                    continue
                _write(folder / "data" / str(number) / f"{'-'.join(map(str, at))}.json", plain)
                recorded += 1
            if say is not None:
                say(f"picture {number} of {len(pictures)}: recorded")
    return recorded


def _write(path: Path, plain: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, separators=(",", ":")), encoding="ascii")
