"""compress: an adapter at a lower rank, by rank or by error, from its factors alone."""

from __future__ import annotations

import json

import pytest
import torch
from made_bases import noisy, plain
from made_deltas import lora_change

from deltaw.core.adapter import Adapter
from deltaw.core.site import LinearSite
from deltaw.errors import BadInput, NotMergeable, WorkFailed
from deltaw.merge.combine import combine
from deltaw.merge.compress import compress
from deltaw.merge.factors import Keep, cut_dense, cut_factors, tails
from deltaw.methods.bitfit import BitFit
from deltaw.methods.dora import Dora
from deltaw.methods.ia3 import Ia3
from deltaw.methods.lora import Lora
from deltaw.methods.prompt import Prompt
from deltaw.methods.vera import Vera
from deltaw.model.base import load_base
from deltaw.model.load import load_tokenizer
from deltaw.store.peft import read_adapter, write_adapter
from models import make_fingerprint, make_ids, make_net, randomise

IDS = make_ids()


@pytest.fixture
def base(saved):
    return saved(make_net("llama"))


def falling(adapter, by=3.0):
    """An adapter whose singular values fall: each row of A is smaller than the one before."""
    for params in adapter.sites.values():
        if "A" in params:
            params["A"] *= by ** -torch.arange(len(params["A"]))[:, None]
    return adapter


def best(dense, rank):
    U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


@pytest.mark.parametrize(
    "spec",
    [
        Lora(rank=9, alpha=5, rslora=True, bias="all", save_modules=("norm",)),
        Lora(rank=6, alpha=5, rank_pattern={"q_proj": 8, "layers.1.mlp.up_proj": 2}, alpha_pattern={"v_proj": 3}),
        Vera(rank=12, targets=("q_proj", "down_proj")),
    ],
)
def test_each_place_becomes_its_best_approximation_of_that_rank(base, tmp_path, spec):
    adapter = falling(noisy(base, spec))
    report = compress(adapter, tmp_path / "out", rank=3)
    found = read_adapter(tmp_path / "out")
    for cut in report.sites:
        dense = vera_change(adapter, cut.site) if spec.name == "vera" else lora_change(adapter, cut.site)
        wanted = best(dense, 3)
        assert cut.rank == min(3, cut.rank_before)
        assert float((lora_change(found, cut.site) - wanted).norm() / wanted.norm()) < 1e-5
        assert cut.error == pytest.approx(float((dense - wanted).norm() / dense.norm()), rel=1e-5, abs=1e-7)
    assert report.n_parameters < report.n_parameters_before == adapter.n_parameters
    assert found.provenance["parents"] == [adapter.id] == [report.parent]
    assert json.loads(json.dumps(report.as_dict()))["adapter"] == found.id
    biases = {n: p["bias"] for n, p in adapter.sites.items() if "bias" in p}
    assert {n: p["bias"].tolist() for n, p in found.sites.items() if "bias" in p} == {
        n: b.tolist() for n, b in biases.items()
    }
    assert [(r.tensor, r.value.tolist()) for r in found.replaced] == [
        (r.tensor, r.value.tolist()) for r in adapter.replaced
    ]
    model = load_base(base)
    model.attach(found)
    assert model.logits(IDS).isfinite().all()


def vera_change(adapter, site):
    place = next(p for p in adapter.places if p.name == site)
    A0, B0 = adapter.shared["A0"].double(), adapter.shared["B0"].double()
    d, b = adapter.sites[site]["d"].double(), adapter.sites[site]["b"].double()
    return b[:, None] * (B0[: place.out_features] @ (d[:, None] * A0[:, : place.in_features]))


@pytest.mark.parametrize("error", [0.5, 0.05, 0.0])
def test_an_error_gets_the_lowest_rank_that_keeps_it(base, tmp_path, error):
    adapter = falling(noisy(base, Lora(rank=6, alpha=5)))
    report = compress(adapter, tmp_path / "out", error=error)
    ranks = set()
    for cut in report.sites:
        S = torch.linalg.svdvals(lora_change(adapter, cut.site))[:6]
        lost = [float(S[r:].norm() / S.norm()) for r in range(7)]
        assert cut.rank == next(r for r in range(1, 7) if lost[r] <= error)
        assert cut.error == pytest.approx(lost[cut.rank], rel=1e-6, abs=1e-12)
        assert report.error <= error
        ranks.add(cut.rank)
    assert max(ranks) == 6 if error == 0 else max(ranks) < 6
    assert len(ranks) == (2 if error == 0.05 else 1)  # places have ranks of their own


@pytest.mark.parity
def test_ranks_of_their_own_are_said_as_peft_says_them(base, tmp_path):
    from peft import PeftModel

    adapter = falling(noisy(base, Lora(rank=6, alpha=5)))
    compress(adapter, tmp_path / "out", error=0.05)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    model = load_base(base)
    model.attach(tmp_path / "out")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain(base), tmp_path / "out")(IDS).logits
        # two blocks of float32 sums of 32 to 40 terms
        torch.testing.assert_close(theirs, model.logits(IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_conv1d_and_embeddings_compress_too(saved, tmp_path, kind):
    base = saved(make_net(kind))
    names = ("c_attn", "c_fc", "wte") if kind == "gpt2" else ("q_proj", "embed_tokens")
    adapter = falling(noisy(base, Lora(rank=6, alpha=5, targets=names)))
    report = compress(adapter, tmp_path / "out", error=0.01)
    found = read_adapter(tmp_path / "out")
    assert {p.name: p.kind for p in found.places} == {p.name: p.kind for p in adapter.places}
    logits = []
    for one in (adapter, found):
        model = load_base(base)
        model.attach(one)
        with torch.no_grad():
            logits.append(model.logits(IDS))
    assert 0 < report.error <= 0.01
    apart = (logits[0] - logits[1]).abs().max()
    assert 0 < apart < 0.3


def test_a_rank_above_its_own_changes_nothing(base, tmp_path):
    adapter = noisy(base, Lora(rank=3, alpha=5))
    report = compress(adapter, tmp_path / "out", rank=50)
    found = read_adapter(tmp_path / "out")
    assert {c.rank for c in report.sites} == {3}
    assert report.error == 0.0
    for site in found.sites:
        torch.testing.assert_close(lora_change(found, site), lora_change(adapter, site), rtol=1e-6, atol=1e-7)


def test_new_vocabulary_stays_with_its_tokenizer(base, tmp_path):
    model = load_base(base)
    model.attach(Lora(rank=5, alpha=3, new_tokens=("<one>", "<two>")))
    randomise(model)
    write_adapter(model.adapter(), tmp_path / "grown", model.tokenizer)
    compress(tmp_path / "grown", tmp_path / "out", rank=2)
    before, after = (read_adapter(tmp_path / name) for name in ("grown", "out"))
    assert [(r.tensor, r.rows, r.value.tolist()) for r in after.replaced] == [
        (r.tensor, r.rows, r.value.tolist()) for r in before.replaced
    ]
    assert len(after.replaced) > 0
    for name in ("grown", "out"):
        assert load_tokenizer(tmp_path / name).convert_tokens_to_ids("<two>") == 54
    load_base(base).attach(tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (Dora(rank=2), "'dora' has gains, so that it is dense"),
        (Ia3(), "'ia3' has gains"),
        (BitFit(), "'bitfit' has no factors"),
        (Prompt(), "'prompt' has no change of weights"),
    ],
)
def test_what_has_no_factors_is_refused(base, tmp_path, spec, match):
    with pytest.raises(NotMergeable, match=match):
        compress(noisy(base, spec), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [({}, "give the rank to keep, or the error"), ({"rank": 0}, "rank is 0"), ({"error": 1.0}, "error is 1.0")],
)
def test_settings_that_make_no_sense_are_refused(base, tmp_path, settings, match):
    with pytest.raises(BadInput, match=match):
        compress(noisy(base), tmp_path / "out", **settings)


# The decomposition itself ------------------------------------------------------------------------------


def test_factors_and_the_dense_matrix_are_cut_alike_and_lose_the_tail():
    rng = torch.Generator().manual_seed(0)
    A, B = torch.randn(9, 24, generator=rng), torch.randn(40, 9, generator=rng)
    dense = B.double() @ A.double()
    S = torch.linalg.svdvals(dense)
    for rank in (1, 4, 9):
        one, two = cut_factors((A, B), Keep(rank), "x"), cut_dense(dense, Keep(rank), "x")
        for cut in (one, two):
            assert cut.rank == rank
            assert cut.error == pytest.approx(float(S[rank:].norm() / S.norm()), rel=1e-9, abs=1e-12)
            assert float((cut.B.double() @ cut.A.double() - best(dense, rank)).norm() / dense.norm()) < 1e-6
    torch.testing.assert_close(tails(S)[0], dense.norm())
    assert float(tails(S)[-1]) == 0.0


def test_no_dense_matrix_is_made(tmp_path):
    """One of these would have 320 GB."""
    n, rng = 200_000, torch.Generator().manual_seed(0)
    place = LinearSite("m.w", n, n)
    params = {
        "A": torch.randn(4, n, generator=rng),
        "B": torch.randn(n, 4, generator=rng) * torch.tensor([9, 3, 1, 0.1]),
    }
    adapter = Adapter(Lora(rank=4, alpha=4, targets=("w",)), {"m.w": params}, (place,), fingerprint=make_fingerprint())
    report = compress(adapter, tmp_path / "small", error=0.05)
    assert [c.rank for c in report.sites] == [3]
    report = combine([adapter, tmp_path / "small"], [1.0, -1.0], method="svd", rank=1, out=tmp_path / "rest")
    # what is left is the last direction: 0.1 of the first's 9
    assert report.sites[0].error < 1e-3
    assert report.sites[0].norm == pytest.approx(0.1 * n, rel=0.05)


def test_more_factors_than_rows_and_no_change_at_all():
    rng = torch.Generator().manual_seed(0)
    A, B = torch.randn(50, 24, generator=rng), torch.randn(40, 50, generator=rng)
    cut = cut_factors((A, B), Keep(), "x")
    assert cut.rank == 24
    assert float((cut.B.double() @ cut.A.double() - B.double() @ A.double()).norm()) < 1e-4
    nothing = cut_factors((torch.zeros(3, 24), B[:, :3]), Keep(error=0.1), "x")
    assert (nothing.rank, nothing.error, nothing.norm) == (1, 0.0, 0.0)
    with pytest.raises(WorkFailed, match="x: the change holds NaN"):
        cut_dense(torch.full((3, 4), float("nan")), Keep(), "x")


def test_patterns_say_each_rank_once_and_shortly():
    from deltaw.merge.as_adapter import ranks_as_settings

    ranks = {f"m.layers.{i}.{r}": n for i in range(12) for r, n in (("q", 5), ("o", 7), ("v", 2 + (i == 1)), ("up", 3))}
    ranks["m.layers.2.up"] = 4
    spec = Lora(**ranks_as_settings(ranks))
    assert spec.rank_pattern["o"] == 7
    assert not [key for key in spec.rank_pattern if key.endswith(".o")]
    for name, rank in ranks.items():
        assert (spec.rank_at(LinearSite(name, 9, 9)), spec.scale_at(LinearSite(name, 9, 9))) == (rank, 1.0)
