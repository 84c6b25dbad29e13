"""A tokenizer as GGUF holds it. Its kind is read from its structure, never from a model's name.

Two kinds are written. Byte-level BPE is llama.cpp's "gpt2": tokens, merges, and `tokenizer.ggml.pre`, the word for how
text is cut before merging. SentencePiece's BPE is "llama": llama.cpp merges the pair with the best score, so the merges
must be those that scores can say. Unigram is neither.

llama.cpp normalises no text: where a tokenizer asks for NFC, text that is not in NFC already gets other tokens there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from deltaw.core.misfits import some

SPACE = "\u2581"
"""SentencePiece's mark for a space."""

_GPT2 = {"type": "ByteLevel", "use_regex": True}
_BYTES = {"type": "ByteLevel", "use_regex": False}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_SMALL}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRES: tuple[tuple[list[dict[str, Any]], bool, str], ...] = (
    ([_GPT2], False, "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _GPT2], False, "smollm"),
    ([_split(_QWEN2), _BYTES], False, "qwen2"),
    ([_split(_LLAMA3), _BYTES], True, "llama-bpe"),
    ([_split(_LLAMA3), _BYTES], False, "smaug-bpe"),
    ([_split(_TEKKEN), _BYTES], True, "tekken"),
)
"""How text is cut before merging, whether whole words skip the merges, and llama.cpp's word for the two (the table is
llama.cpp's, src/llama-vocab.cpp)."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for a GGUF file; `tokens`, `types` and `scores` have an entry for each row of the embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary_of(tokenizer: Any, n_rows: int, config: dict[str, Any]) -> tuple[Vocabulary | None, list[str]]:
    """A transformers tokenizer for an embedding of `n_rows` rows; None and sentences for what cannot be said.

    config  the base's settings, where a begin or end token may be named that the tokenizer does not name
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    if model.get("type") != "BPE":
        return None, [f"its tokenizer is a {model.get('type')} model; llama.cpp's are of BPE here"]
    problems = _odd_model(model)
    added = {token["id"]: token for token in whole["added_tokens"]}
    odd = [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if odd:
        problems.append(f"its tokens {some(odd)} take the space beside them; llama.cpp's cannot")
    ids = {**{text: i for text, i in model["vocab"].items()}, **{t["content"]: i for i, t in added.items()}}
    if len(ids) and max(ids.values()) >= n_rows:
        problems.append(f"its tokenizer has token number {max(ids.values())}, its embedding {n_rows} rows")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    byte_level = not model.get("byte_fallback")
    pre, space_prefix = "default", False
    if byte_level:
        pre, found = _byte_level(whole)
    else:
        space_prefix, found = _sentencepiece(whole, merges)
    problems += found
    if problems:
        return None, problems
    scores = None if byte_level else _scores(merges, model["vocab"], n_rows)
    special = _special(tokenizer, config)
    tokens, types = _tokens(model, added, n_rows, None if byte_level else special.get("unk", -1))
    front, back = _ends(tokenizer)
    template = tokenizer.chat_template
    return (
        Vocabulary(
            model="gpt2" if byte_level else "llama",
            pre=pre,
            tokens=tokens,
            types=types,
            scores=scores,
            merges=[" ".join(m) for m in merges] if byte_level else None,
            space_prefix=space_prefix,
            special=special,
            add_bos=front,
            add_eos=back,
            chat_template=template.get("default") if isinstance(template, dict) else template,
        ),
        [],
    )


def _odd_model(model: dict[str, Any]) -> list[str]:
    keys = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return [f"its tokenizer sets {key} to {model[key]!r}" for key in keys if model.get(key)]


def _byte_level(whole: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's word for how the tokenizer cuts text."""
    normalizer = whole.get("normalizer")
    problems = [] if normalizer in (None, {"type": "NFC"}) else [f"its tokenizer normalises text: {normalizer}"]
    steps = [step for step in _parts(whole.get("pre_tokenizer"), "pretokenizers")]
    if any(step.get("add_prefix_space") for step in steps):
        problems.append("its tokenizer puts a space in front of every text")
    plain = [{k: v for k, v in step.items() if k not in ("add_prefix_space", "trim_offsets")} for step in steps]
    ignores = bool(whole["model"].get("ignore_merges"))
    for wanted, ignore_merges, word in PRES:
        if plain == wanted and ignores == ignore_merges:
            return word, problems
    shown = json.dumps(plain, ensure_ascii=True)
    shown = shown if len(shown) < 200 else shown[:200] + "..."
    known = ", ".join(word for _, _, word in PRES)
    return "", [
        *problems,
        f"its tokenizer cuts text in a way whose name in llama.cpp is not known here (known: {known}): {shown}"
        + (", and looks whole words up before it merges" if ignores else ""),
    ]


def _sentencepiece(whole: dict[str, Any], merges: list[tuple[str, ...]]) -> tuple[bool, list[str]]:
    """Whether a space goes in front of a text, and what scores cannot say."""
    problems, prefix, marked = [], False, False
    for step in _parts(whole.get("normalizer"), "normalizers"):
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            marked = True
        else:
            problems.append(f"its tokenizer normalises text: {step}")
    for step in _parts(whole.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE and step.get("split") is False:
            prefix, marked = step.get("prepend_scheme") != "never", True
        elif not (marked and step.get("type") == "Split" and step.get("pattern") == {"String": " "}):
            problems.append(f"its tokenizer cuts text: {step}")
    if not marked:
        problems.append("its tokenizer does not write spaces as SentencePiece does")
    if whole["model"].get("ignore_merges"):
        problems.append("its tokenizer looks whole words up before it merges")
    given = {token["content"] for token in whole["added_tokens"]}  # found before anything is merged
    if not _by_score([m for m in merges if "".join(m) not in given], whole["model"]["vocab"]):
        problems.append("its merges are not in the order of any scores, so SentencePiece's rule gives other tokens")
    return prefix, problems


def _parts(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[inside]) if step.get("type") == "Sequence" else [step]


def _by_score(merges: list[tuple[str, ...]], vocab: dict[str, int]) -> bool:
    """Whether merges that make the same token stand together, and none that SentencePiece would do is missing."""
    made: list[str] = []
    for merge in merges:
        whole = "".join(merge)
        if not made or made[-1] != whole:
            made.append(whole)
    if len(set(made)) != len(made):
        return False
    known = set(merges)
    return all(
        (token[:i], token[i:]) in known
        for token in made
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    )


def _scores(merges: list[tuple[str, ...]], vocab: dict[str, int], n_rows: int) -> list[float]:
    """The rank of each token's first merge, negative: the best score is merged first."""
    scores = [0.0] * n_rows
    rank = 0
    done: set[str] = set()
    for merge in merges:
        whole = "".join(merge)
        if whole not in done:
            done.add(whole)
            rank += 1
            scores[vocab[whole]] = -float(rank)
    return scores


def _tokens(
    model: dict[str, Any], added: dict[int, Any], n_rows: int, unknown: int | None
) -> tuple[list[str], list[int]]:
    """Texts and kinds by row; a row that no token has is called [PAD7].

    unknown  the number of SentencePiece's unknown token, -1 where it has none; None: the tokens are byte-level
    """
    texts = {i: text for text, i in model["vocab"].items()}
    tokens, types = [], []
    for i in range(n_rows):
        text, kind = texts.get(i, f"[PAD{i}]"), TokenType.NORMAL if i in texts else TokenType.UNUSED
        if i in added:
            text = added[i]["content"]
            kind = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
            text = text if added[i]["special"] or unknown is None else text.replace(SPACE, " ")
        if unknown is not None:
            if i == unknown:
                kind = TokenType.UNKNOWN
            elif kind == TokenType.NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                kind = TokenType.BYTE
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _special(tokenizer: Any, config: dict[str, Any]) -> dict[str, int]:
    """Numbers of the tokens with a role."""
    found = {}
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id", None)
        number = config.get(f"{role}_token_id") if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            found[role] = number
    return found


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its begin and end tokens around a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    front = len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id
    return front, len(ids) > len(bare) + front and ids[-1] == tokenizer.eos_token_id
