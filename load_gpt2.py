"""Fetch, convert, check and export GPT-2's weights.

    python load_gpt2.py                           # 124M, from Hugging Face or else from OpenAI
    python load_gpt2.py --size 1558M --source openai
    python load_gpt2.py --from ~/gpt-2/models/124M --dtype float16     # no network
    python load_gpt2.py --from distilbert/distilgpt2                   # a model on the Hub
    python load_gpt2.py --from ckpt.pt --out mine                      # nanoGPT's checkpoint
    python load_gpt2.py --from mine --merge adapter --out merged       # LoRA folded in
    python load_gpt2.py --from out --export model.gguf                 # a file for llama.cpp

The result is a folder that generate.py, train_gpt2.py --init-from and Transformers load, or with
--export one file that llama.cpp runs.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while the rest is imported ends the script quietly
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from micrograd_gpt import no_grad
from micrograd_gpt.arrays import stand_ins
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs.folders import check_target
from micrograd_gpt.support import cli
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import without, written_as_set
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE
from micrograd_gpt.text.template import first_template, save_template
from micrograd_gpt.text.tokenizer_files import model_tokenizer
from micrograd_gpt.weights import gguf_file
from micrograd_gpt.weights.adapters import naming_base, open_language_adapter, with_adapter
from micrograd_gpt.weights.config import GENERATION, SIZES, is_gpt2, published_shape, size_name
from micrograd_gpt.weights.formats import Weights, is_adapter
from micrograd_gpt.weights.names import find, open_local, own_name, size_named
from micrograd_gpt.weights.pretrained import build
from micrograd_gpt.weights.releases import (
    OPENAI_URL,
    HuggingFace,
    OpenAI,
    Source,
    open_release,
    ways_out,
)
from micrograd_gpt.weights.saving import copy_tokenizer, write_model

# The greedy continuation of "The dog" by openai-community/gpt2, 20 tokens in all, as published.
# fmt: off
PUBLISHED_IDS = {"124M": [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246,
                          286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]}
# fmt: on
PROMPT = [464, 3290]  # "The dog"


def main(argv: Sequence[str] | None = None) -> int:
    """Load, check, write, print; returns the exit status, 1 if the check fails.

    Weights that fail the check are not written. Printing comes last, so that nothing depends on
    whether, and how far, somebody reads the output.
    """
    args = parse_args(argv)
    stand_ins.highest_level()  # said now if MICROGRAD_GPT_KERNELS names none
    adapter = open_language_adapter(args.merge) if args.merge is not None else None
    told_by = None if args.model or args.size else adapter
    if told_by:
        args.model = told_by.base
    claimed = size_name(args.size) if args.size is not None else None
    named = size_named(args.model) if args.model else claimed or "124M"
    if args.openai_url and (not named or args.source == "huggingface"):
        raise UserError("--openai-url is for what is fetched from OpenAI: leave it out")
    if args.source and not named:
        raise UserError(f"--source is for OpenAI's sizes, and {args.model} is none: leave it out")
    adapters = [Path(given) for given in (args.model, args.merge) if given and is_adapter(given)]
    told = args.out or args.export
    if named or (told and not Path(args.model).exists()):  # before anything is fetched
        check_target(target(args, named), adapters, args.overwrite)
    with naming_base(told_by):
        weights = open_named(named, args) if named else open_local(find(args.model))
    weights = with_adapter(weights, adapter) if adapter else weights
    size = named or published_size(weights.config)
    if claimed and size != claimed:
        raise UserError(f"{args.model} holds {size or 'no published size'}, not {claimed}")
    out = target(args, size)
    check_target(out, [weights.path, *adapters], args.overwrite)
    tokenizer = exportable_tokenizer(weights) if args.export else tokenizer_of(weights)

    say(f"loading {weights.path}")
    model = build(weights)
    # Weights of OpenAI's shape are theirs only if the user says so, by --size
    is_claimed = bool(claimed or named) and not args.merge
    passed, findings = check(model, tokenizer, size, claimed=is_claimed)
    if passed:
        if args.export:
            assert tokenizer
            gguf_file.write_gguf(out, model, tokenizer, args.dtype, name_of(args, size))
        else:
            write_folder(model, out, tokenizer, args.dtype, (args.merge, weights.folder))
    written = f"wrote {out}, weights stored as {args.dtype}"
    say(written if passed else f"the check failed: {out} is not written")
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
        dest="model",
        type=cli.some_text,
        metavar="MODEL",
        help="a local Hugging Face folder, checkpoint of ours or OpenAI folder, a file of one"
        " (.safetensors, pytorch_model.bin, nanoGPT's ckpt.pt), or a model on the Hugging Face Hub:"
        " OWNER/NAME or OWNER/NAME@REVISION",
    )
    parser.add_argument(
        "--merge",
        type=cli.some_text,
        metavar="ADAPTER",
        help="fold in a LoRA adapter, ours or PEFT's (into --from, or else the model it names)",
    )
    parser.add_argument(
        "--out",
        type=cli.some_path,
        help="folder to write (default models/gpt2-SIZE, or models/ and the name of --from, or of"
        " --merge)",
    )
    parser.add_argument(
        "--export",
        type=cli.some_path,
        metavar="FILE.gguf",
        help="write this file, tokenizer included, instead of a folder: llama.cpp runs it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="even if there is another model (default: off)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="the type to store the weights in (default float32: exactly as loaded)",
    )
    parser.add_argument(
        "--openai-url",
        type=cli.some_text,
        metavar="URL",
        help="a mirror of OpenAI's models folder (Hugging Face's is set by HF_ENDPOINT)",
    )
    args = parser.parse_args(argv)
    if args.model is not None and args.source is not None:
        raise UserError("--from says where the model is, and so does --source: give one of them")
    if args.export is not None and args.out is not None:
        raise UserError("--export writes a file and --out a folder: give one of them")
    if args.export is not None and args.export.suffix != ".gguf":
        raise UserError(f"--export writes GGUF: end {args.export} in .gguf")
    return args


def open_named(size: str, args: argparse.Namespace) -> Weights:
    """OpenAI's weights of this size, fetched if need be and verified."""
    url = args.openai_url or OPENAI_URL
    known: dict[str, Source] = {"huggingface": HuggingFace(), "openai": OpenAI(url)}
    tried = [known[args.source]] if args.source else [*known.values()]  # in the order of trying
    return open_release(size, tried, verify=True, advice=ways_out(tried))


def name_of(args: argparse.Namespace, size: str | None) -> str:
    """What the result is called."""
    return f"gpt2-{size}" if size and not args.merge else own_name(args.merge or args.model)


def target(args: argparse.Namespace, size: str | None) -> Path:
    """The folder, or with --export the file, to write."""
    return args.export or args.out or Path("models") / name_of(args, size)


def published_size(config: GPT2Config) -> str | None:
    """Which of OpenAI's sizes a config is, or None."""
    for size in SIZES:
        shape = published_shape(size)
        if is_gpt2(config) and all(getattr(config, key) == shape[key] for key in shape):
            return size
    return None


def own_tokenizer(weights: Weights) -> Tokenizer:
    """The tokenizer that these weights were trained with; UserError if it is unknown."""
    return model_tokenizer(weights.folder, weights.config.vocab_size)


def exportable_tokenizer(weights: Weights) -> Tokenizer:
    """The tokenizer to export with these weights; UserError if llama.cpp cannot run them."""
    tokenizer = own_tokenizer(weights)
    gguf_file.check_exportable(weights.config, tokenizer)
    return tokenizer


def tokenizer_of(weights: Weights) -> Tokenizer | None:
    """The tokenizer that these weights were trained with; None, and why on stderr, if unknown."""
    try:
        return own_tokenizer(weights)
    except UserError as error:
        say(f"no tokenizer is written (any files of one are copied as they are): {error}")
        return None


def write_folder(
    model: GPT2,
    out: Path,
    tokenizer: Tokenizer | None,
    dtype: str,
    sources: Sequence[str | Path | None] = (None,),
) -> None:
    """Write the model into `out`, as a set that has nothing of an earlier model. Its tokenizer, if
    there is none to write, is copied from the last of the folders `sources`; its prompt template
    comes from the first with one.
    """
    template = first_template([folder for folder in sources if folder and tokenizer])
    with written_as_set(out) as new:
        write_model(model, new, tokenizer, None if dtype == "float32" else dtype)
        if template:
            save_template(template, new)
        else:
            without(new / PROMPT_TEMPLATE)
        without(new / GENERATION)
        copy_tokenizer(None if tokenizer else sources[-1], new)


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

    Returns False if they differ, and the findings, line by line. There is nothing to compare with,
    and the check says so, if no ids are published, or if nobody `claimed` that these are OpenAI's
    weights and they turn out not to be.
    """
    if size is None:
        return True, ["check: nothing to compare with, this is not one of OpenAI's sizes"]
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
        return False, [*found, f"check: FAILED, the published ids are {published}"]
    else:
        verdict = f"nothing to compare with, these are not OpenAI's weights for {size}"
    return True, [*found, f"check: {verdict}"]


def greedy(model: GPT2, prompt: list[int], n_tokens: int) -> list[int]:
    """Extend `prompt` to n_tokens in all, always by the likeliest next token."""
    ids = list(prompt)
    with no_grad():
        while len(ids) < n_tokens:
            logits = model(np.array([ids]), last_only=True)  # (1, 1, V)
            ids.append(int(logits.data.argmax()))
    return ids


if __name__ == "__main__":
    cli.run(main)
