"""A tiny base in Hugging Face layout, rows it can learn, and a recipe for them; all made in code."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models import make_net

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
END, VOCAB = 0, len(SPECIAL) + len(LETTERS)

# lengths all differ a little, so that the order of rows shows
ROWS = [
    {"prompt": f"{word} {'o' * (i % 5)}?", "completion": answer}
    for i, (word, answer) in enumerate(
        [("ab", "yes"), ("cd", "no"), ("efg", "yes"), ("h", "no"), ("ijkl", "maybe"), ("mn", "no"),
         ("opq", "yes"), ("rs", "maybe"), ("t", "no"), ("uv", "yes"), ("wxy", "no")]
    )
]  # fmt: skip
VALID = [{"prompt": "ba ?", "completion": "yes"}, {"prompt": "dc oo?", "completion": "no"}]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; the end token is the padding token too."""
    words = {word: i for i, word in enumerate([*SPECIAL, *LETTERS])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHATML,
    )


def save_base(folder: Path, seed: int = 0, kind: str = "llama", **changes: object) -> Path:
    """A tiny random model (Llama by default) with its tokenizer, as a folder."""
    sizes = {"vocab_size": VOCAB, "eos_token_id": END, "bos_token_id": None, **changes}
    net = make_net(kind, seed, **sizes)
    net.get_output_embeddings().weight.data.mul_(4)  # a normed state of 32 numbers can then be sure of a token
    net.config.architectures = [type(net).__name__]
    net.generation_config.eos_token_id = END
    net.generation_config.bos_token_id = None
    net.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe(folder: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe of 6 steps or so; `sections` are laid over it: recipe(base, train={"lr": 1e-3})."""
    plain: dict[str, Any] = {
        "base": {"path": str(folder), "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 3, "alpha": 5},
        "data": {"max_tokens": 64},
        "train": {"epochs": 2, "tokens_per_step": 60, "lr": 0.01, "save_every_s": 1000},
        "eval": {},
    }
    for name, changes in copy.deepcopy(sections).items():
        if name == "adapter" and changes.get("method", "lora") != "lora":
            plain[name] = changes
        else:
            plain[name] = {**plain.get(name, {}), **changes}
    return plain


def run(plain: dict[str, Any], out: Path, rows: Any = None, valid: Any = None, **options: Any) -> list[Any]:
    """Every event of a run."""
    from deltaw.train.run import train

    return list(train(plain, out, train_rows=ROWS if rows is None else rows, valid_rows=valid, **options))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def events_in(out: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def plain_transformers(folder: Path, **options: Any) -> Any:
    """The folder as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    return net.eval()
