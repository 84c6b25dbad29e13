"""A pack of documents computes what its documents compute one at a time: logits and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    NemotronConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deltaw import Lora
from deltaw.data.template import Example
from deltaw.errors import DataError, ShapeError
from deltaw.model import attention
from deltaw.model.attention import Documents, explicit_attention, packs
from deltaw.model.model import Model
from deltaw.ops import native
from deltaw.ops.loss import summed_cross_entropy
from deltaw.train.loss import sft
from deltaw.train.step import step_gradient
from models import ARCHITECTURES, VOCAB, WINDOW, make_batch, make_ids, make_net, randomise

# float32 sums of a few dozen terms of order 1 in two orders, through two blocks: each form is within 9e-6 of float64
ATOL = 2e-5
LENGTHS = (9, 2, 31, 2, 17, 30, 3, 1)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [make_ids(1, n, seed=20 + i)[0] for i, n in enumerate(lengths)]


def wear(kind: str, **changes: object) -> Model:
    model = Model(make_net(kind, **changes))
    model.attach(Lora(rank=3, alpha=5))
    randomise(model)
    return model


def one_at_a_time(model: Model, docs: list[Tensor], predict: list[list[int]]) -> Tensor:
    """Logits at the predicted places, each document alone through the model's own attention."""
    rows = [model.logits(d[None])[0][torch.tensor(p, dtype=torch.long)] for d, p in zip(docs, predict, strict=True)]
    return torch.cat(rows)


def gradients(model: Model, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    for t in model.trainable().values():
        t.grad = None
    (summed_cross_entropy(logits, targets) / len(targets)).backward()
    return {n: t.grad.clone() for n, t in model.trainable().items()}


def compare(model: Model, docs: list[Tensor], atol: float = ATOL) -> None:
    # the last half of each document is predicted, as completions are
    predict = [list(range(len(d) // 2, len(d) - 1)) for d in docs]
    batch = make_batch(docs, predict)
    assert batch.n_targets > 3
    packed, alone = model.pack_logits(batch), one_at_a_time(model, docs, predict)
    torch.testing.assert_close(packed, alone, rtol=0, atol=atol)
    assert float(alone.detach().abs().max()) > 0.5
    got, wanted = gradients(model, packed, batch.target_ids), gradients(model, alone, batch.target_ids)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        assert bool(grad.any()), name


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2"])
def test_a_pack_equals_its_documents_one_at_a_time(kind):
    compare(wear(kind), documents(), atol=2 * ATOL)


@pytest.fixture
def without_kernels():
    with native.forced("reference"):
        yield


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("lengths", [LENGTHS, (3, 3, 9, 10, 31, 31)], ids=["mixed", "sorted"])
def test_grouped_documents_equal_their_documents_where_no_kernel_runs(kind, lengths):
    compare(wear(kind), documents(lengths))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("lengths", [(3, 3, 9, 10, 31, 31), (7, 7, 7), (12,)])
def test_a_pack_sorted_by_length_equals_its_documents_too(kind, lengths):
    compare(wear(kind), documents(lengths))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kind", ["gpt2", "phi", "opt"])
def test_long_documents_take_torchs_attention_and_stay_equal(kind, monkeypatch):
    monkeypatch.setattr(attention, "_EXPLICIT_UP_TO", 8)
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or sdpa(*a, **k)
    )
    model = wear(kind)
    model.pack_logits(make_batch(documents()))
    assert {shape[2] for shape in calls} >= {17, 31}
    compare(model, documents())


def test_a_document_beyond_the_limit_stays_equal():
    n = attention._EXPLICIT_UP_TO + 8
    compare(wear("llama", max_position_embeddings=2 * n), documents((n, 5, 40)), atol=3 * ATOL)  # 520-term sums


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_shorter_than_a_document_hides_what_lies_behind_it(kind):
    assert max(LENGTHS) > 2 * WINDOW
    model = wear(kind)
    compare(model, documents())
    doc = documents((31,))[0]
    narrow = model.pack_logits(make_batch([doc]))
    wide = wear(kind, **({"sliding_window": None} if kind == "mistral" else {"layer_types": ["full_attention"] * 2}))
    unlimited = wide.pack_logits(make_batch([doc]))
    torch.testing.assert_close(narrow[: WINDOW - 1], unlimited[: WINDOW - 1], rtol=0, atol=ATOL)
    assert float((narrow - unlimited).detach().abs().max()) > 0.01


OTHERS = {
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gptj": lambda: GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64,
                               bos_token_id=1, eos_token_id=2),
    "gpt_neo": lambda: GPTNeoConfig(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=WINDOW,
                                    attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
                                    bos_token_id=1, eos_token_id=2),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=40,
                                                    num_hidden_layers=3, num_attention_heads=4, pad_token_id=None,
                                                    attention_window_size=WINDOW),
    "nemotron": lambda: NemotronConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                       bos_token_id=1, eos_token_id=2, pad_token_id=None),
    "qwen3": lambda: Qwen3Config(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, head_dim=12, pad_token_id=None),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_that_cannot_pack_computes_its_documents_one_by_one(kind):
    torch.manual_seed(3)
    config = OTHERS[kind]()
    net = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim > 1:
                value.normal_().mul_(value.shape[-1] ** -0.5)
    assert packs(net) == (kind in ("qwen3", "nemotron"))  # Nemotron looks as if it could
    model = Model(net)
    model.attach(Lora(rank=3, alpha=5))
    randomise(model)
    compare(model, documents())
    assert packs(net) == (kind == "qwen3")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_finds_out_that_a_model_loses_its_documents(checkpointing):
    net = MODEL_FOR_CAUSAL_LM_MAPPING[NemotronConfig](OTHERS["nemotron"]())
    own = net.config._attn_implementation
    model = Model(net)
    model.attach(Lora(rank=3, alpha=5))
    randomise(model)
    examples = [Example(tuple(d.tolist()), (False,) + (True,) * (len(d) - 1), "row") for d in documents()]
    grads: dict[str, Tensor] = {}
    loss, _, n = step_gradient(model, examples, sft, micro_tokens=20, checkpointing=checkpointing)
    grads |= {k: t.grad.clone() for k, t in model.trainable().items()}
    alone = one_at_a_time(model, documents(), [list(range(len(d) - 1)) for d in documents()])
    targets = torch.cat([d[1:] for d in documents()])
    wanted = gradients(model, alone, targets)
    assert abs(loss - float(summed_cross_entropy(alone.detach(), targets)) / n) < 1e-5
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=ATOL)
    assert net.config._attn_implementation == own


def test_all_eight_architectures_pack():
    assert all(packs(make_net(kind)) for kind in (*ARCHITECTURES, "gemma2"))


def test_an_attention_scale_of_the_base_is_kept():
    compare(wear("gpt2", scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False), documents())


def test_documents_do_not_see_each_other():
    model = wear("llama")
    docs = documents()
    before = model.pack_logits(make_batch(docs))
    changed = [*docs[:2], (docs[2] + 1) % VOCAB, *docs[3:]]
    after = model.pack_logits(make_batch(changed))
    starts = torch.tensor([0, *(len(d) - 1 for d in docs)]).cumsum(0)
    for i in range(len(docs)):
        same = torch.equal(before[starts[i] : starts[i + 1]], after[starts[i] : starts[i + 1]])
        assert same == (i != 2 or len(docs[i]) == 1)


def test_the_order_of_documents_does_not_matter():
    model = wear("mistral")
    docs = documents((9, 2, 31, 17))
    order = [2, 0, 3, 1]
    parts = model.pack_logits(make_batch(docs)).split([len(d) - 1 for d in docs])
    moved = model.pack_logits(make_batch([docs[i] for i in order]))
    torch.testing.assert_close(moved, torch.cat([parts[i] for i in order]), rtol=0, atol=ATOL)


def test_bfloat16_packs_are_as_near_to_float32_as_single_documents_are():
    docs = documents()
    predict = [list(range(len(d) - 1)) for d in docs]
    wide = make_net("llama")
    narrow = make_net("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            a.copy_(b)
    exact = one_at_a_time(Model(wide), docs, predict)
    model = Model(narrow)
    alone = one_at_a_time(model, docs, predict).float()
    packed = model.pack_logits(make_batch(docs)).float()
    # both are the exact logits plus rounding: their mean errors agree within a quarter
    errors = [float((logits - exact).abs().mean()) for logits in (packed, alone)]
    assert errors[0] < 1.25 * errors[1]
    assert float((packed - alone).abs().max()) < 16 * errors[1]  # by other code: fused, and the model's own


def test_the_models_own_attention_is_back_after_a_pack():
    model = wear("llama")
    before = model.net.config._attn_implementation
    ids = make_ids()
    logits = model.logits(ids)
    model.pack_logits(make_batch(documents()))
    assert model.net.config._attn_implementation == before
    assert torch.equal(model.logits(ids), logits)
    with pytest.raises(IndexError):
        model.pack_logits(make_batch([torch.tensor([1, VOCAB + 7, 1])]))
    assert model.net.config._attn_implementation == before


def test_padded_rows_equal_rows_alone():
    model = wear("llama")
    ids = make_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    logits = model.logits(ids, mask)
    torch.testing.assert_close(logits[0], model.logits(ids[:1])[0], rtol=0, atol=ATOL)
    torch.testing.assert_close(logits[1, :6], model.logits(ids[1:, :6])[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "ids",
    [[[1, 2]], "w1 w2", torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 0, dtype=torch.long)],
    ids=["list", "text", "one row", "floats", "no token"],
)
def test_what_is_no_tensor_of_token_ids_is_refused(ids):
    with pytest.raises(ShapeError, match="input_ids must be"):
        wear("llama").logits(ids)


@pytest.mark.parametrize(
    ("token", "what"), [(VOCAB, f"row 2: token {VOCAB} is not among the {VOCAB}"), (-100, "row 2: -100 is no token")]
)
def test_an_id_without_a_vector_is_refused_where_it_stands(token, what):
    with pytest.raises(DataError, match=f"input_ids, {what}"):
        wear("llama").logits(torch.tensor([[1, 2], [3, token]]))


def test_groups_hold_every_token_once_and_documents_of_like_length():
    bounds = torch.tensor([0, 9, 11, 42, 44, 61, 91, 94, 95])
    grouped = Documents.of(bounds)
    assert sorted(torch.cat([g.put for g in grouped.groups]).tolist()) == list(range(95))
    assert sum(g.n for g in grouped.groups) == 8
    assert len(grouped.groups) < 8
    assert not grouped.in_order
    for g in grouped.groups:
        assert len(g.real) == len(g.put) <= g.n * g.length
        if g.start is not None:
            assert torch.equal(g.put, torch.arange(g.start, g.start + len(g.put)))


def test_a_pack_sorted_by_length_is_grouped_where_it_stands():
    grouped = Documents.of(torch.tensor([0, 2, 4, 13, 30, 61, 92]))
    assert grouped.in_order
    assert [g.start for g in grouped.groups] == [0, 4, 30]
    assert torch.equal(torch.cat([g.put for g in grouped.groups]), torch.arange(92))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_explicit_attention_equals_the_definition(window, softcap):
    rng = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, 9, 6, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 6, generator=rng, dtype=torch.float64)
    got = explicit_attention(q, k, v, 0.4, window, softcap)
    for n in range(2):
        for head in range(4):
            for i in range(9):
                seen = [j for j in range(i + 1) if window is None or j > i - window]
                scores = torch.stack([q[n, head, i] @ k[n, head // 2, j] * 0.4 for j in seen])
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                wanted = sum(p * v[n, head // 2, j] for p, j in zip(scores.softmax(0), seen, strict=True))
                torch.testing.assert_close(got[n, head, i], wanted, rtol=0, atol=1e-12)  # float64, 9 terms
