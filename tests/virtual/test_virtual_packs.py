"""In a pack every document has the virtual tokens before it: the same logits and gradients as alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    MambaConfig,
    NemotronConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from wearing import LENGTHS, METHODS, PLAIN, N, documents, one_at_a_time, wear

from deltaw.data.template import Example
from deltaw.errors import AdapterError, TargetError
from deltaw.methods import PrefixTuning, Prompt
from deltaw.model import attention
from deltaw.model.attention import explicit_attention, packs
from deltaw.model.model import Model
from deltaw.ops import native
from deltaw.ops.loss import summed_cross_entropy
from deltaw.train.loss import sft
from deltaw.train.step import step_gradient
from models import ARCHITECTURES, VOCAB, WINDOW, make_batch, make_ids, make_net, randomise

# float32 sums of a few dozen terms of order 1 in two orders, through two blocks
ATOL = 1e-5


def gradients(model: Model, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    for t in model.trainable().values():
        t.grad = None
    (summed_cross_entropy(logits, targets) / len(targets)).backward()
    return {n: t.grad.clone() for n, t in model.trainable().items()}


def compare(model: Model, docs: list[Tensor], atol: float = ATOL) -> None:
    predict = [list(range(len(d) // 2, len(d) - 1)) for d in docs]
    batch = make_batch(docs, predict)
    assert batch.n_targets > 3
    packed, alone = model.pack_logits(batch), one_at_a_time(model, docs, predict)
    torch.testing.assert_close(packed, alone, rtol=0, atol=atol)
    name = next(iter(model.run.use))
    model.use(None)
    bare = model.pack_logits(batch)
    model.use(name)
    assert float((bare - alone).detach().abs().max()) > 0.1, "the virtual tokens are seen"
    got, wanted = gradients(model, packed, batch.target_ids), gradients(model, alone, batch.target_ids)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        assert bool(grad.any()), name


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2"])
def test_a_pack_equals_its_documents_one_at_a_time(kind, method):
    compare(wear(kind, method), documents())


@pytest.mark.parametrize("method", METHODS)
def test_every_encoder_gets_the_same_gradients_from_a_pack(method):
    compare(wear("llama", method), documents())


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("lengths", [(3, 3, 9, 10, 31, 31), (7, 7, 7), (12,)])
def test_a_pack_sorted_by_length_equals_its_documents_too(lengths, method):
    compare(wear("mistral", method), documents(lengths))


@pytest.fixture
def without_kernels():
    with native.forced("reference"):
        yield


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "opt"])
def test_long_documents_take_torchs_attention_without_a_mask_and_stay_equal(kind, method, monkeypatch):
    monkeypatch.setattr(attention, "_EXPLICIT_UP_TO", 8)
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, v: Tensor, **how: object) -> Tensor:
        calls.append((q.shape[2], k.shape[2], how.get("attn_mask")))
        return sdpa(q, k, v, **how)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", seen)
    model = wear(kind, method)
    model.pack_logits(make_batch(documents()))
    assert {(31 + N, 31 + N, None), (17 + N, 17 + N, None)} <= set(calls)
    compare(model, documents())


def test_a_document_beyond_the_limit_stays_equal():
    n = attention._EXPLICIT_UP_TO + 8
    # 520-term sums
    compare(wear("llama", "prefix", max_position_embeddings=2 * n), documents((n, 5, 40)), atol=3 * ATOL)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_counts_virtual_tokens_as_positions(kind, method):
    assert N < WINDOW < 31
    model = wear(kind, method)
    doc = documents((31,))[0]
    narrow = model.pack_logits(make_batch([doc]))
    changes = {"sliding_window": None} if kind == "mistral" else {"layer_types": ["full_attention"] * 2}
    wide = wear(kind, method, **changes).pack_logits(make_batch([doc]))
    seen_by_all = WINDOW - N  # the first tokens, from which the first virtual token is still in the window
    torch.testing.assert_close(narrow[:seen_by_all], wide[:seen_by_all], rtol=0, atol=ATOL)
    assert float((narrow - wide)[seen_by_all:].detach().abs().amax(-1).min()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_blocks_that_are_computed_again_give_the_same_gradients(kind, method):
    examples = [Example(tuple(d.tolist()), (False,) + (True,) * (len(d) - 1), "row") for d in documents()]
    found = []
    for checkpointing in (False, True):
        model = wear(kind, method)
        loss, _, _ = step_gradient(model, examples, sft, micro_tokens=40, checkpointing=checkpointing, seed=3)
        found.append((loss, {n: t.grad for n, t in model.trainable().items()}))
    assert found[0][0] == found[1][0]
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name]), name


@pytest.mark.parametrize("method", [*PLAIN, "ptuning by lstm"])
def test_a_step_does_not_depend_on_how_it_is_split(method):
    examples = [Example(tuple(d.tolist()), (False,) + (True,) * (len(d) - 1), "row") for d in documents()]
    found = []
    for micro in (None, 12):
        model = wear("qwen2", method)
        if method == "ptuning by lstm":
            made = model.adapters["default"]
            made.spec = made.spec.model_copy(update={"dropout": 0.4})
        loss, tokens, _ = step_gradient(model, examples, sft, micro_tokens=micro, seed=3)
        assert tokens == sum(LENGTHS)
        found.append((loss, {n: t.grad for n, t in model.trainable().items()}))
    assert abs(found[0][0] - found[1][0]) < ATOL
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=0, atol=ATOL)


@pytest.mark.parametrize("method", PLAIN)
def test_documents_do_not_see_each_other(method):
    model = wear("llama", method)
    docs = documents()
    before = model.pack_logits(make_batch(docs))
    changed = [*docs[:2], (docs[2] + 1) % VOCAB, *docs[3:]]
    after = model.pack_logits(make_batch(changed))
    starts = torch.tensor([0, *(len(d) - 1 for d in docs)]).cumsum(0)
    for i in range(len(docs)):
        same = torch.equal(before[starts[i] : starts[i + 1]], after[starts[i] : starts[i + 1]])
        assert same == (i != 2 or len(docs[i]) == 1)


@pytest.mark.parametrize("method", PLAIN)
def test_the_base_computes_bit_for_bit_as_before_after_use_none_and_after_detach(method):
    model = wear("llama", method)
    batch, ids = make_batch(documents()), make_ids()
    bare = Model(make_net("llama"))
    model.use(None)
    assert torch.equal(model.pack_logits(batch), bare.pack_logits(batch))
    assert torch.equal(model.logits(ids), bare.logits(ids))
    model.use("default")
    model.detach()
    assert torch.equal(model.pack_logits(batch), bare.pack_logits(batch))


_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4}
_DEEP = {**_SIZES, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": None}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**_SIZES, num_hidden_layers=2),
    "gptj": lambda: GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, **_ENDS
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=WINDOW,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, **_ENDS,
    ),
    "nemotron": lambda: NemotronConfig(**_DEEP, num_key_value_heads=2, max_position_embeddings=64, **_ENDS),
    "qwen3": lambda: Qwen3Config(**_DEEP, num_key_value_heads=2, head_dim=12),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **{**_DEEP, "num_hidden_layers": 3}, attention_window_size=WINDOW
    ),
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, pad_token_id=None),
}  # fmt: skip


def other(kind: str) -> Model:
    torch.manual_seed(3)
    config = OTHERS[kind]()
    net = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim > 1:
                value.normal_().mul_(value.shape[-1] ** -0.5)
    return Model(net)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", [k for k in OTHERS if k not in ("recurrent_gemma", "mamba")])
def test_an_architecture_that_cannot_pack_computes_its_documents_one_by_one(kind, method, checkpointing):
    model = other(kind)
    assert packs(model.net) == (kind in ("qwen3", "nemotron"))  # Nemotron looks as if it could
    model.attach(METHODS[method])
    randomise(model, size=0.7)
    if not checkpointing:
        compare(model, documents())
        assert packs(model.net) == (kind == "qwen3")
        return
    examples = [Example(tuple(d.tolist()), (False,) + (True,) * (len(d) - 1), "row") for d in documents()]
    step_gradient(model, examples, sft, checkpointing=True)
    again = {n: t.grad.clone() for n, t in model.trainable().items()}
    alone = one_at_a_time(model, documents(), [list(range(len(d) - 1)) for d in documents()])
    for name, grad in gradients(model, alone, torch.cat([d[1:] for d in documents()])).items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=ATOL)


def test_a_model_whose_layers_differ_is_refused_by_name():
    for kind in ("llama", "bloom"):
        model = wear("llama", "prefix") if kind == "llama" else other("bloom")
        if kind == "bloom":
            model.attach(PrefixTuning(n_tokens=N, projection=False))
        made = model.adapters["default"]
        site = made.places["prefix"]
        made.places["prefix"] = replace(site, n_heads=site.n_heads * 2, head_dim=site.head_dim // 2)
        with pytest.raises(AdapterError, match=r"A prefix has \d heads of 4 features, and keys of layer 0 have"):
            model.pack_logits(make_batch(documents()))


def test_an_architecture_that_keeps_a_state_takes_a_prompt_and_refuses_a_prefix_by_name():
    model = other("recurrent_gemma")
    model.attach(PrefixTuning(n_tokens=N, projection=False))
    with pytest.raises(AdapterError, match=r"RecurrentGemmaForCausalLM does not read .* its layer 0.*method 'prompt'"):
        model.logits(make_ids())
    model.detach()
    model.attach(Prompt(n_tokens=N))
    compare(model, documents())
    mamba = other("mamba")
    with pytest.raises(TargetError, match="prefix"):
        mamba.attach(PrefixTuning(n_tokens=N, projection=False))
    mamba.attach(Prompt(n_tokens=N))
    compare(mamba, documents())


@torch.no_grad()
def taken_from_tokens(model: Model, method: str, ids: Tensor) -> None:
    """Give an adapter the embeddings, or the keys and values, that the base computes for real tokens."""
    model.use(None)
    (params,) = model.adapters["default"].sites.values()
    if method == "prompt":
        params["vectors"].copy_(model.net.get_input_embeddings()(ids))
    else:
        layers = model.net(input_ids=ids[None], use_cache=True).past_key_values.layers
        stacked = [t[0].transpose(0, 1).flatten(1) for layer in layers for t in (layer.keys, layer.values)]
        params["vectors"].copy_(torch.cat(stacked, 1))
    model.use("default")


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize(
    "kind", [*ARCHITECTURES, "gemma2", *(k for k in OTHERS if k not in ("recurrent_gemma", "mamba"))]
)
def test_vectors_of_real_tokens_compute_what_those_tokens_do(kind, method):
    model = Model(make_net(kind)) if kind in (*ARCHITECTURES, "gemma2") else other(kind)
    model.attach(METHODS[method])
    ids = make_ids(1, N, seed=9)[0]
    taken_from_tokens(model, method, ids)
    docs = documents((9, 31, 12))
    packed = model.pack_logits(make_batch(docs))
    model.use(None)
    whole = [model.logits(torch.cat([ids, d])[None])[0, N:-1] for d in docs]
    torch.testing.assert_close(packed, torch.cat(whole), rtol=0, atol=ATOL)


@pytest.mark.parametrize("method", PLAIN)
def test_bfloat16_packs_are_as_near_to_float32_as_single_documents_are(method):
    docs = documents()
    predict = [list(range(len(d) - 1)) for d in docs]
    wide, narrow = wear("llama", method), wear("llama", method, dtype=torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(wide.net.parameters(), narrow.net.parameters(), strict=True):
            a.copy_(b)
    with torch.no_grad():
        exact = one_at_a_time(wide, docs, predict)
        alone = one_at_a_time(narrow, docs, predict)
        packed = narrow.pack_logits(make_batch(docs))
    assert packed.dtype == alone.dtype == torch.bfloat16
    # both are the exact logits plus rounding: their mean errors agree within a quarter
    errors = [float((logits.float() - exact).abs().mean()) for logits in (packed, alone)]
    assert errors[0] < 1.25 * errors[1]


@pytest.mark.parametrize("window", [None, 1, 4, 12, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_explicit_attention_behind_keys_equals_the_definition(window, softcap):
    rng = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, 9, 6, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9 + N, 6, generator=rng, dtype=torch.float64)
    got = explicit_attention(q, k, v, 0.4, window, softcap)
    for n in range(2):
        for head in range(4):
            for i in range(9):
                seen = [j for j in range(i + N + 1) if window is None or j > i + N - window]
                scores = torch.stack([q[n, head, i] @ k[n, head // 2, j] * 0.4 for j in seen])
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                wanted = sum(p * v[n, head // 2, j] for p, j in zip(scores.softmax(0), seen, strict=True))
                torch.testing.assert_close(got[n, head, i], wanted, rtol=0, atol=1e-12)  # float64, 14 terms
