"""Each rule on facts that are known: it speaks where it should and is silent beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaw.diagnose.curve import Curve, EvalPoint, Log, StepPoint
from deltaw.diagnose.facts import Facts, Trial
from deltaw.diagnose.findings import findings
from deltaw.diagnose.general import Change, Forgetting
from deltaw.diagnose.precision import Rounded
from deltaw.diagnose.sites import SiteRow
from deltaw.diagnose.spectrum import summarise

WELL = Curve(
    start=4.0, final=0.4, best=0.35, means=(2.0, 1.0, 0.6, 0.5, 0.45, 0.4, 0.37, 0.35), noise=0.02, moved=0.9,
    has_fallen=True, plateau_step=75, plateau_lr=0.85, rise=0.01, has_risen=False, peak=1.0,
)  # fmt: skip
STEPS = tuple(StepPoint(i, 1.0, 1e-3, 1.0, i / 100) for i in range(1, 101))
LOG = Log(STEPS, (), 100, 50, True)


def row(values=(1.0, 0.5, 0.2, 0.05), weight=100.0, reach=1.0, name="model.layers.0.mlp.up_proj", scale=2.0) -> SiteRow:
    spectrum = summarise(torch.tensor(values, dtype=torch.float64))
    return SiteRow(name, "up_proj", 0, (40, 32), len(values), scale, spectrum, spectrum.norm, weight, None, reach, {})


HEALTHY = Facts(rows=[row()] * 3, log=LOG, curve=WELL, rate=1e-3, scale=2.0, alpha=8.0, rank=4)


def kinds(facts: Facts) -> list[str]:
    return [f.kind for f in findings(facts)]


def test_diagnose_findings_are_none_for_a_healthy_run():
    assert kinds(HEALTHY) == []
    assert kinds(Facts()) == []
    assert kinds(Facts(rows=[row()])) == []


def test_diagnose_findings_rank_too_low_needs_a_high_plateau_and_a_flat_spectrum():
    high = replace(WELL, final=1.6, best=1.55, moved=0.6, plateau_step=50, plateau_lr=0.6)
    flat = [row((1.0, 0.9, 0.8, 0.7))] * 2 + [row()]
    (found,) = findings(replace(HEALTHY, rows=flat, curve=high))
    assert found.kind == "rank_too_low"
    assert "step 50" in found.message
    assert "2 of 3 places" in found.message
    assert "rank 16" in found.remedy
    assert kinds(replace(HEALTHY, rows=[row((1.0,))], curve=high)) == ["rank_too_low"]
    assert kinds(replace(HEALTHY, rows=flat)) == []  # the loss is low
    assert kinds(replace(HEALTHY, curve=high)) == []  # the spectrum falls off
    assert kinds(replace(HEALTHY, rows=[row((1.0, 0.9, 0.8, 0.7)), row(), row()], curve=high)) == []  # at a minority
    assert kinds(replace(HEALTHY, rows=flat, curve=replace(high, plateau_step=None, plateau_lr=None))) == []
    floor = replace(high, final=3.6, moved=0.1)  # text: most of the loss is the text's own
    assert kinds(replace(HEALTHY, rows=flat, curve=floor)) == []
    two = [row((1.0, 0.2))]
    assert kinds(replace(HEALTHY, rows=two, curve=high)) == ["rank_too_low"]
    assert kinds(replace(HEALTHY, rows=two, curve=replace(high, final=0.7))) == []


def test_diagnose_findings_rank_is_judged_by_a_trial_where_there_is_one():
    better = Trial(rank=2, other=8, steps=100, loss=0.6, reached=0.4, gain=0.2, noise=0.01)
    (found,) = findings(replace(HEALTHY, trial=better))
    assert found.kind == "rank_too_low"
    assert "0.4 with rank 8 instead of 0.6 with rank 2" in found.message
    assert kinds(replace(HEALTHY, trial=replace(better, gain=0.02))) == []
    assert kinds(replace(HEALTHY, trial=replace(better, noise=0.1))) == []
    assert kinds(replace(HEALTHY, trial=replace(better, other=1))) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"peak": 3.0}, ["alpha_misconfigured"]),
        ({"has_risen": True, "rise": 0.5}, ["alpha_misconfigured"]),
        ({"final": 6.0, "has_fallen": False, "moved": -0.5}, ["alpha_misconfigured"]),  # not "diverged" too
        ({}, []),
    ],
)
def test_diagnose_findings_steps_too_large_need_the_loss_as_witness(change, wanted):
    large = [row(weight=4.0, reach=30.0)]
    assert kinds(replace(HEALTHY, rows=large, curve=replace(WELL, **change))) == wanted


def test_diagnose_findings_alpha_is_blamed_where_the_scale_is_unusual():
    wild = [row(weight=4.0, reach=50.0, scale=100.0)]
    (found,) = findings(replace(HEALTHY, rows=wild, scale=100.0, alpha=400.0))
    assert found.kind == "alpha_misconfigured"
    assert "alpha is 400 at rank 4" in found.message
    assert "5.0%" in found.message
    assert "Set alpha to about 8" in found.remedy
    (by_rate,) = findings(replace(HEALTHY, rows=[row(weight=4.0, reach=1.0)], rate=0.05, curve=replace(WELL, peak=9.0)))
    assert "Lower the learning rate to about 0.003" in by_rate.remedy
    assert kinds(replace(HEALTHY, rows=[row(weight=1e3, reach=1.0, scale=100.0)], scale=100.0, rate=1e-5)) == []


def test_diagnose_findings_alpha_without_base_and_without_run():
    alone = [row(weight=None, reach=None)]
    assert kinds(replace(HEALTHY, rows=alone, rate=0.05, curve=replace(WELL, peak=9.0))) == ["alpha_misconfigured"]
    assert kinds(replace(HEALTHY, rows=alone, rate=0.05)) == []
    foreign = Facts(rows=[row(weight=0.2, reach=None)], scale=2.0)
    assert kinds(foreign) == ["alpha_misconfigured"]  # six times the weight itself
    assert kinds(Facts(rows=[row(weight=1e5, reach=None)], scale=2.0)) == ["alpha_misconfigured"]
    assert kinds(Facts(rows=[row(weight=20.0, reach=None)], scale=2.0)) == []


def test_diagnose_findings_steps_too_small():
    small = [row((1e-3, 5e-4), weight=100.0, reach=1.0)]
    slow = replace(WELL, final=3.7, moved=0.075, plateau_step=None, plateau_lr=None)
    facts = replace(HEALTHY, rows=small, rate=5e-6, curve=slow)
    (found,) = findings(facts)
    assert found.kind == "alpha_misconfigured"
    assert "0.05%" in found.message
    assert "Raise the learning rate to about 0.001" in found.remedy
    assert kinds(replace(facts, rate=2e-5)) == ["alpha_misconfigured"]  # 0.2 %, and the loss barely moved
    assert kinds(replace(facts, rate=2e-5, curve=replace(slow, moved=0.5))) == []
    assert kinds(replace(facts, rate=7e-5)) == []
    assert kinds(replace(facts, rate=7e-5, scale=0.01)) == ["alpha_misconfigured"]  # an unusual scale too
    assert (
        kinds(replace(facts, curve=replace(slow, moved=0.5, plateau_step=50, plateau_lr=0.6))) == []
    )  # it had settled
    assert kinds(replace(facts, curve=None)) == []  # a run of a few steps


def test_diagnose_findings_tensors_that_do_nothing_or_are_broken():
    zero = row((0.0, 0.0), name="model.layers.1.self_attn.v_proj")
    (found,) = findings(Facts(rows=[zero, zero]))
    assert found.kind == "no_update"
    (some,) = findings(replace(HEALTHY, rows=[zero, row(), row()]))
    assert (some.kind, some.where) == ("dead_places", (zero.name,))
    assert kinds(Facts(rows=[zero], moves_else=True)) == []
    assert kinds(Facts(rows=[replace(zero, spectrum=None, bias_moved=0.3)])) == []
    (broken,) = findings(Facts(bad=("x:A", "x:B")))
    assert broken.kind == "not_finite"
    assert "x:A" in broken.message
    (other,) = findings(Facts(mismatch=("its weights are ab, this base has cd",)))
    assert other.kind == "base_mismatch"
    assert "ab, this base has cd" in other.message


def test_diagnose_findings_diverged_and_nothing_learned():
    back = replace(WELL, final=2.0, rise=0.45, has_risen=True)
    assert kinds(replace(HEALTHY, curve=back)) == ["diverged"]
    still = replace(
        WELL, means=(4.0,) * 8, final=3.99, best=3.9, moved=0.0025, has_fallen=False, plateau_step=13, plateau_lr=0.2
    )
    assert kinds(replace(HEALTHY, curve=still)) == ["nothing_learned"]
    assert kinds(replace(HEALTHY, curve=still, log=replace(LOG, steps=STEPS[:20]))) == []


def test_diagnose_findings_overfitting():
    falling = tuple(replace(s, loss=2.0 / s.step) for s in STEPS)
    evals = (EvalPoint(25, 1.0, True), EvalPoint(50, 0.8, True), EvalPoint(100, 1.4, False))
    log = replace(LOG, steps=falling, evals=evals)
    (found,) = findings(replace(HEALTHY, log=log))
    assert found.kind == "overfitting"
    assert "from 0.8 to 1.4" in found.message
    assert kinds(replace(HEALTHY, log=replace(log, evals=(*evals[:2], EvalPoint(100, 0.83, False))))) == []
    assert kinds(replace(HEALTHY, log=replace(log, steps=STEPS))) == []  # training did not fall


def test_diagnose_findings_merge_forgetting_and_rows():
    fine, lost = Rounded(100, 20, 1.0, 0.99, 0.6), Rounded(100, 90, 1.0, 0.1, 0.9)
    assert kinds(replace(HEALTHY, rounded={"bfloat16": fine, "written": fine})) == []
    (merge,) = findings(replace(HEALTHY, rounded={"bfloat16": fine, "written": lost}))
    assert merge.kind == "merge_precision"
    assert "as it was merged, 90% of the changed weights are the base's again, and 10%" in merge.message
    assert "bfloat16" not in merge.message
    (bits,) = findings(replace(HEALTHY, rounded={"nf4": fine}))
    assert "merged in nf4, rounding has 0.6 times" in bits.message
    assert kinds(replace(HEALTHY, rounded={"written": fine}, written_in_bits=True)) == ["merge_precision"]
    assert kinds(replace(HEALTHY, rounded={"bfloat16": replace(lost, n_lost=70)})) == ["merge_precision"]
    assert kinds(replace(HEALTHY, rounded={"bfloat16": replace(lost, n_lost=70, along=0.6)})) == []
    kept = Forgetting(200, 70, 66, 20, 16, 20.0, 22.0)
    assert kinds(replace(HEALTHY, forgetting=kept)) == []
    (text,) = findings(replace(HEALTHY, forgetting=replace(kept, perplexity_after=41.0)))
    assert text.kind == "forgetting"
    assert "from 20 to 41" in text.message
    (answers,) = findings(replace(HEALTHY, forgetting=replace(kept, right_after=45, lost=30, gained=5)))
    assert "45 are answered right instead of 70" in answers.message
    assert Forgetting(10, 5, 4, 3, 1, None, None).chance == pytest.approx(5 / 16)
    assert kinds(replace(HEALTHY, data=Change(8, 2.0, 1.0))) == []
    assert kinds(replace(HEALTHY, data=Change(8, 2.0, 2.0))) == ["no_help"]


def test_diagnose_findings_a_run_that_died_early():
    def log(*points, finished=False):
        return Log(tuple(StepPoint(i, *p, 0.1) for i, p in enumerate(points, 1)), (), 60, 50, finished)

    nothing = Facts(curve=None)
    calm = ((11.0, 5.0, 9.0), (10.0, 5.0, 40.0), (9.0, 5.0, 2.0))
    blown = ((11.0, 5.0, 9.0), (10.0, 5.0, 5e18))
    risen = ((1.2, 1.0, 9.0), (24.0, 1.0, 30.0))
    assert kinds(replace(nothing, log=log(*calm))) == []
    assert kinds(replace(nothing, log=log(*blown))) == kinds(replace(nothing, log=log(*risen))) == ["diverged"]
    assert kinds(replace(nothing, log=log(*blown, finished=True))) == kinds(replace(nothing, log=log(blown[0]))) == []
    (found,) = findings(replace(nothing, log=log(*blown), rate=5.0, scale=2.0, alpha=16.0, rank=8))
    assert found.kind == "alpha_misconfigured"
    assert "stopped after step 2" in found.message
