"""Fetch, convert and check GPT-2's weights.

    python load_gpt2.py                           # 124M, from Hugging Face or else from OpenAI
    python load_gpt2.py --size 1558M --source openai
    python load_gpt2.py --from ~/gpt-2/models/124M --dtype float16     # no network

The result is a folder that generate.py, train_gpt2.py --init-from and Transformers load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2, SIZES, GPT2Config, size_name
from micrograd_gpt.runs.checkpoint import MODEL, STATE, save_pretrained
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import Tokenizer
from micrograd_gpt.weights.pretrained import (
    OPENAI_URL,
    HuggingFace,
    OpenAI,
    Source,
    Weights,
    build,
    open_release,
    open_weights,
    published_shape,
)

# The greedy continuation of "The dog" by openai-community/gpt2, 20 tokens in all, as published.
# fmt: off
PUBLISHED_IDS = {"124M": [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246,
                          286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]}
# fmt: on
PROMPT = [464, 3290]  # "The dog"


def main(argv: Sequence[str] | None = None) -> int:
    """Load, check, write, print; returns the exit status, 1 if the check fails.

    Everything is done before anything is printed, whoever reads it and however much of it; and
    weights that fail are not written.
    """
    args = parse_args(argv)
    size = size_name(args.size) if args.size else None
    if args.from_path is not None:
        weights = open_weights(args.from_path)
        found = published_size(weights.config)
        if size and found != size:
            raise UserError(f"{args.from_path} holds {found or 'no published size'}, not {size}")
        own_name = args.from_path.resolve().name.removesuffix(".safetensors")
        out = args.out or Path("models") / (f"gpt2-{found}" if found else own_name)
    else:
        size = found = size or "124M"
        openai = OpenAI(args.openai_url)
        sources: dict[str | None, tuple[Source, ...]] = {
            "huggingface": (HuggingFace(),),
            "openai": (openai,),
            None: (HuggingFace(), openai),
        }
        weights = open_release(size, sources[args.source], verify=True)
        out = args.out or Path("models") / f"gpt2-{size}"
    refuse_to_overwrite(out, weights.path)

    say(f"loading {weights.path}")
    model = build(weights)
    tokenizer = tokenizer_of(weights)
    # What comes from a local folder is OpenAI's only if the user says so, by --size.
    passed, findings = check(model, tokenizer, found, claimed=size is not None)
    if passed:
        write_folder(model, out, tokenizer, None if args.dtype == "float32" else args.dtype)
        say(f"wrote {out}, weights stored as {args.dtype}")
    else:
        say(f"the check failed: {out} is not written")
    print("\n".join([*parameter_table(model), *findings]))
    return 0 if passed else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", help=f"{', '.join(SIZES)} or an older name (default 124M, or what --from holds)"
    )
    parser.add_argument(
        "--source",
        choices=("huggingface", "openai"),
        help="where to fetch from (default: Hugging Face, then OpenAI if that fails)",
    )
    parser.add_argument(
        "--from",
        dest="from_path",
        type=Path,
        metavar="PATH",
        help="a local safetensors file, Hugging Face folder, checkpoint of ours, or OpenAI folder",
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default models/gpt2-SIZE, or of --from's name)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="what the written weights are stored as (default float32: exactly as loaded)",
    )
    parser.add_argument(
        "--openai-url",
        default=OPENAI_URL,
        metavar="URL",
        help="a mirror of OpenAI's models folder (Hugging Face's is set by HF_ENDPOINT)",
    )
    args = parser.parse_args(argv)
    if args.from_path is not None and args.source is not None:
        raise UserError("--from reads what is here and --source fetches: give one of them")
    return args


def published_size(config: GPT2Config) -> str | None:
    """Which of OpenAI's sizes a config is, or None."""
    for name in SIZES:
        if all(getattr(config, key) == value for key, value in published_shape(name).items()):
            return name
    return None


def refuse_to_overwrite(out: Path, source: Path) -> None:
    """UserError where `out` holds the weights at `source`, also by a link, or a training run."""
    try:
        # What is written is a file: an OpenAI folder inside of `out` is none of it.
        taken = [source] if source.is_dir() else [source.parent, source.resolve().parent]
        if out.resolve() in [folder.resolve() for folder in taken]:
            raise UserError(f"{out} is where the weights come from; choose another --out")
        if (out / STATE).exists():
            raise UserError(f"{out} holds a training run ({STATE}); choose another --out")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def tokenizer_of(weights: Weights) -> Tokenizer | None:
    """The tokenizer these weights were trained with; None, said on stderr, if it is not known."""
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    try:
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size != weights.config.vocab_size:
            raise UserError(f"{folder}'s tokenizer has another vocab_size than the model")
    except UserError as error:
        say(f"no tokenizer is written: {error}")
        return None
    return tokenizer


def write_folder(model: GPT2, out: Path, tokenizer: Tokenizer | None, dtype: str | None) -> None:
    """save_pretrained, but no file of `out` changes before all of them are written."""
    incoming = out / f".incoming.{os.getpid()}"
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        save_pretrained(model, incoming, tokenizer, dtype)
        # The weights first: a config.json left of another model is told by their shapes.
        for file in sorted(incoming.iterdir(), key=lambda file: (file.name != MODEL, file.name)):
            os.replace(file, out / file.name)
        if tokenizer is None:
            (out / "tokenizer.json").unlink(missing_ok=True)  # of what was here before
        incoming.rmdir()
    except BaseException as error:
        shutil.rmtree(incoming, ignore_errors=True)
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        if isinstance(error, UserError):
            raise UserError(str(error).replace(str(incoming), str(out))) from error
        raise


def parameter_table(model: GPT2) -> list[str]:
    """One line for each parameter: name, shape, dtype, count; then the total."""
    rows = [(name, str(p.shape), str(p.dtype), p.size) for name, p in model.named_parameters()]
    width, shape_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [
        f"{name:{width}}  {shape:{shape_width}}  {dtype}  {count:13,}"
        for name, shape, dtype, count in rows
    ]
    total = sum(row[3] for row in rows)
    return [*lines, f"{f'{len(rows)} parameters':{width + shape_width + 11}}  {total:13,}"]


def check(
    model: GPT2, tokenizer: Tokenizer | None, size: str | None, claimed: bool
) -> tuple[bool, list[str]]:
    """Continue "The dog" greedily and compare with the published ids.

    Returns False if they differ, and what was found, line by line. Without published ids, or where
    nobody said that these are OpenAI's weights (`claimed`) and they turn out not to be, there is
    nothing to compare with, and the check says so.
    """
    if size is None:
        return True, ["check: nothing to compare with, this is none of OpenAI's sizes"]
    ids = greedy(model, PROMPT, n_tokens=20)
    found = [f"greedy ids: {' '.join(map(str, ids))}"]
    if tokenizer is not None:
        found.append(f"greedy text: {tokenizer.decode(ids)!r}")
    if size not in PUBLISHED_IDS:
        verdict = f"nothing to compare with, no ids are published for {size}"
    elif ids == PUBLISHED_IDS[size]:
        verdict = f"passed, these are the ids published for OpenAI's {size}"
    elif claimed:
        published = " ".join(map(str, PUBLISHED_IDS[size]))
        return False, [*found, f"check: FAILED, published are {published}"]
    else:
        verdict = f"nothing to compare with, these are other weights than OpenAI's {size}"
    return True, [*found, f"check: {verdict}"]


def greedy(model: GPT2, prompt: list[int], n_tokens: int) -> list[int]:
    """`prompt` and the likeliest next token after it, again and again, up to n_tokens in all."""
    ids = list(prompt)
    with no_grad():
        while len(ids) < n_tokens:
            logits = model(np.array([ids]), last_only=True)  # (1, 1, V)
            ids.append(int(logits.data.argmax()))
    return ids


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
