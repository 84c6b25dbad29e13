"""The thirteen pictures of a lab."""

from __future__ import annotations

from deltaw.lab import blocks, counts, levels, live, lowrank
from deltaw.lab.base import Lab
from deltaw.lab.picture import Picture
from deltaw.lab.words import WORDS

_MAKERS = {
    1: (lowrank.decomposition_controls, lowrank.decomposition, None),
    2: (counts.efficiency_controls, counts.efficiency, None),
    3: (blocks.architecture_controls, blocks.architecture, None),
    4: (levels.precision_controls, levels.precision, None),
    5: (counts.cost_controls, counts.cost, None),
    6: (lowrank.directions_controls, lowrank.directions, None),
    7: (lowrank.forward_controls, lowrank.forward, None),
    8: (counts.fraction_controls, counts.trainable_fraction, None),
    9: (live.start_controls, live.zero_start, live.step_on),
    10: (live.answer_controls, live.adapters, live.answer),
    11: (counts.memory_controls, counts.memory, None),
    12: (blocks.methods_controls, blocks.methods, None),
    13: (lowrank.plateau_controls, lowrank.plateau, None),
}
_SOON = {11: counts.memory_soon}


def pictures_of(lab: Lab) -> dict[int, Picture]:
    """Every picture by its number, with controls that fit the lab's base."""
    return {n: Picture(n, WORDS[n], make(lab), show, act, _SOON.get(n)) for n, (make, show, act) in _MAKERS.items()}
