"""Whether llama.cpp runs what load_gpt2.py --export writes as we run it: token by token.

    pip install -e ".[gguf]" llama-cpp-python       # the latter compiles llama.cpp: some minutes
    python benchmarks/in_llama_cpp.py               # trains a small model first, for a minute
    python benchmarks/in_llama_cpp.py --model out   # a model of your own

Each model is exported, and both sides tokenize some prompts and continue them greedily. A row says
how many continuations are the same to the last token, and by how much the logits along them differ
at most, relative to the largest. They do differ, mostly because llama.cpp looks GELU up in a table
of 16-bit numbers. Below the trained model stand relatives of GPT-2 with random weights, which have
no clear favourites: a near-tie can then fall either way.

Exits with 1 if a prompt is tokenized otherwise, if the trained model goes on otherwise, or if
logits differ by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np

from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support import cli
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import AddedToken, BytePairTokenizer, GPT2Tokenizer, gpt2_merges
from micrograd_gpt.text.merges import SPELLING
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.variants import VariantConfig, VariantGPT2
from micrograd_gpt.weights.gguf_file import write_gguf

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "The ",
    "The value of",
    "def f(x):\n    return",
    "It didn't matter;   there were 1234 others\t—",
    "Два пса — 二匹の犬 🐕‍🦺 ½ x²\r\n\r\n",
    f"One.{END_OF_TEXT}[PAD]<s>The dog's tail",
)
TOLERANCE = 2e-3  # a few roundings to 11 bits
SIZE = {"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": 128}
RELATIVES = {  # GPT-2's relatives that llama.cpp can run, as their config.json has them
    "scores divided by the layer": {"scale_attn_by_inverse_layer_idx": True},
    "scores not divided": {"scale_attn_weights": False},
    "n_inner 200": {"n_inner": 200},
    "a head of its own": {"tie_word_embeddings": False},
    "layer_norm_epsilon 0.01": {"layer_norm_epsilon": 0.01},
}


def main() -> int:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the folder of a model, instead of training one")
    parser.add_argument("--new-tokens", type=int, default=48, help="in each continuation (48)")
    args = parser.parse_args()
    if not (common.installed("llama_cpp") and common.installed("gguf")):
        return 1
    results = []
    with tempfile.TemporaryDirectory() as work:
        for name, model, tokenizer in models(args.model, Path(work)):
            file = Path(work) / "model.gguf"
            write_gguf(file, model, tokenizer)
            results.append((name, *compare(file, model, tokenizer, args.new_tokens)))
    common.print_table(
        ["model", "prompts", "tokenized alike", "continued alike", "logits differ by"],
        [
            [name, str(len(PROMPTS)), str(tokenized), str(continued), f"{difference:.1e}"]
            for name, tokenized, continued, difference in results
        ],
    )
    good = all(tokenized == len(PROMPTS) and d < TOLERANCE for _, tokenized, _, d in results)
    return 0 if good and results[0][2] == len(PROMPTS) else 1


def models(folder: str | None, work: Path) -> Iterator[tuple[str, GPT2, Tokenizer]]:
    """The models to compare: a trained one, and untrained ones of other shapes and vocabularies."""
    name = folder or str(train(work / "trained"))
    yield folder or "trained here, gpt2", GPT2.from_pretrained(name), load_tokenizer(name)
    gpt2 = GPT2Tokenizer()
    for relative, settings in RELATIVES.items():
        yield relative, untrained(gpt2.vocab_size, **settings), gpt2
    yield "50,304 ids, of which 47 are padding", untrained(50304), gpt2
    for tokenizer in (ByteTokenizer(), byte_pairs()):
        yield f"{tokenizer.name} tokenizer", untrained(tokenizer.vocab_size), tokenizer


def train(out: Path) -> Path:
    """Train a small model with GPT-2's tokens on Python's manual; returns its folder."""
    shape = ["--n-layer", "3", "--n-head", "4", "--n-embd", "96", "--block-size", "128"]
    run = ["--tokenizer", "gpt2", "--batch-size", "8", "--max-steps", "200", "--out", str(out)]
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *shape, *run]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def untrained(vocab_size: int, **settings: object) -> GPT2:
    """A model with random weights, large enough that its attention has favourites."""
    model = VariantGPT2(VariantConfig(vocab_size=vocab_size, **SIZE, **settings), seed=1)
    rng = np.random.default_rng(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * rng.standard_normal(parameter.shape, np.float32)
    return model.eval()


def byte_pairs() -> BytePairTokenizer:
    """GPT-2's first 500 merges with ids in another order, and added tokens."""
    merges = gpt2_merges()[:500]
    tokens = ["</s>", *("".join(pair) for pair in reversed(merges)), *SPELLING]
    added = [AddedToken("</s>", 0, special=True, normalized=False)]
    for text, special in (("<s>", True), ("dog", False), ("[PAD]", True)):
        added.append(AddedToken(text, len(tokens) + len(added) - 1, special, normalized=False))
    return BytePairTokenizer(
        {token: id for id, token in enumerate(tokens)},
        merges,
        added,
        {"eos_token": 0, "bos_token": added[1].id, "pad_token": added[3].id},
    )


def compare(
    file: Path, model: GPT2, tokenizer: Tokenizer, new_tokens: int
) -> tuple[int, int, float]:
    """The prompts that are tokenized alike, and continued alike, and the logits' difference."""
    import llama_cpp

    theirs = llama_cpp.Llama(
        str(file),
        n_ctx=model.config.n_positions,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # keys and values as exact as ours
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    tokenized, continued, difference = 0, 0, 0.0
    for prompt in PROMPTS:
        tokenized += all(
            tokenizer.encode(prompt, allow_special=special).tolist()
            == theirs.tokenize(prompt.encode(), add_bos=True, special=special)
            for special in (False, True)
        )
        ids = tokenizer.encode(prompt).tolist()
        ours = model.generate(ids, max_new_tokens=new_tokens, temperature=0)
        continued += continuation(theirs, ids, new_tokens) == list(ours)
        with no_grad():
            logits = model(np.array([ours]))[0].data[:, : tokenizer.vocab_size]  # (T, V)
        theirs.reset()
        theirs.eval([int(id) for id in ours])
        error = np.abs(theirs.scores[: len(ours)] - logits).max() / np.abs(logits).max()
        difference = max(difference, float(error))
    return tokenized, continued, difference


def continuation(llama: object, ids: list[int], new_tokens: int) -> list[int]:
    """The ids and `new_tokens` more, by llama.cpp, always the likeliest."""
    ids = list(ids)
    llama.reset()
    llama.eval(ids)
    for _ in range(new_tokens):
        ids.append(int(llama.scores[len(ids) - 1].argmax()))
        llama.eval(ids[-1:])
    return ids


if __name__ == "__main__":
    cli.run(main)
