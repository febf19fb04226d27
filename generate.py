"""Prompt in, text out.

    python generate.py --prompt "The "                     # with what train_gpt2.py trained
    echo "Once upon a time" | python generate.py --model 124M --temperature 0.7
    python generate.py                                     # an interactive prompt

Text goes to stdout as it is decided, whole characters only; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError

if TYPE_CHECKING:
    from micrograd_gpt.generation.context import Continuation
    from micrograd_gpt.generation.filters import Settings
    from micrograd_gpt.gpt2 import GPT2
    from micrograd_gpt.text.tokenizers import Tokenizer

SEPARATOR = "---------------"  # between samples

HELP = """\
Type a text to have it continued. Ctrl-C stops it, Ctrl-D (or /quit) leaves.
  /set temperature 0.7    change a setting (the flags of --help that shape the text)
  /unset temperature      back to its default
  /help                   this text, and the settings"""


# The flags that shape the text, which can be changed at the interactive prompt, and what is used
# when one is left out.
DECODING: dict[str, Any] = {
    "max_new_tokens": 200,  # a paragraph
    "num_samples": 1,
    "stop": (),
    "ignore_eos": False,
    "seed": 0,
    "greedy": False,
    "temperature": 0.8,  # a small model's second thoughts are worse than its first
    "top_k": 40,  # Radford et al. 2019, section 3.8 and its samples
    "top_p": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": "false",
    "speculate": None,
    "no_kv_cache": False,
}


def main(argv: list[str] | None = None) -> int:
    from micrograd_gpt.arrays.backend import memory_errors, set_tf32

    flags = make_parser().parse_args(argv)
    if sys.stdout is None:
        raise UserError("stdout is closed: send it to a file, a pipe or a terminal")
    choices = {name: value for name, value in vars(flags).items() if name in DECODING}
    resolve(choices)  # what is wrong with the flags is said before a large model is loaded
    prompt = read_prompt(flags.prompt)
    set_tf32(flags.tf32, flags.device)
    smaller = "--dtype bfloat16, or --device cpu" if flags.device != "cpu" else "a smaller --model"
    with memory_errors(f"the weights do not fit; try {smaller}"):
        model, tokenizer = load(flags.model, flags.device, flags.dtype)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    if prompt is None:
        return converse(model, tokenizer, choices, flags.json)
    return 0 if continue_text(model, tokenizer, prompt, choices, flags.json) else 130


# --------------------------------------------------------------------------------- flags, settings


def make_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; - or a pipe reads it from stdin "
        "(without the last line end); left out on a terminal: an interactive prompt. An empty one "
        "starts a new text",
    )
    add(
        "--model",
        metavar="M",
        help="a checkpoint folder, or a size: 124M, 355M, 774M, 1558M "
        "(default: the folder out if it holds a checkpoint, else 124M)",
    )
    add("--device", choices=["cpu", "gpu", "cuda"], default="cpu", help="(default: cpu)")
    add(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16"],
        default="float32",
        help="of the weights; half precision is faster on a GPU only (default: float32)",
    )
    add("--tf32", action="store_true", help="with --device gpu: round products to 11 bits")
    add(
        "--json",
        action="store_true",
        help="one JSON object a sample: prompt, text, token_ids, "
        "log_probs (the model's, natural logarithms), stopped (why), tokens_per_second",
    )
    add = parser.add_argument_group("how much").add_argument
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"(default: {DECODING['max_new_tokens']}, a paragraph)",
    )
    add(
        "--num-samples",
        type=int,
        metavar="N",
        help="continuations, decoded as one batch; with "
        "--num-beams, how many of the beams found are shown (default: 1)",
    )
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", default=None, help="go on after end-of-text")
    add = parser.add_argument_group("which token comes next").add_argument
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of the random choices; the same seed and flags give the same text (default: 0)",
    )
    add(
        "--greedy",
        action="store_true",
        default=None,
        help="always the likeliest token, as --temperature 0",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="below 1 keeps to likely tokens, above 1 takes chances "
        f"(default: {DECODING['temperature']}, to keep a small model's words whole)",
    )
    add(
        "--top-k",
        type=int,
        metavar="K",
        help="only the K likeliest tokens; 0: all "
        f"(default: {DECODING['top_k']}, as for the samples in GPT-2's paper)",
    )
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="only the likeliest tokens that together have probability P (default: 1, all)",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens at least P times as likely as the likeliest (default: 0, all)",
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1 makes tokens that were used less likely (default: 1)",
    )
    add(
        "--no-repeat-ngram-size",
        type=int,
        metavar="N",
        help="never repeat N tokens in a row (default: 0, off)",
    )
    add = parser.add_argument_group("beam search, in place of random choices").add_argument
    add("--num-beams", type=int, metavar="N", help="how many texts are in play (default: 1, off)")
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="above 0 favours longer texts (default: 1: log-probability a token counts)",
    )
    add(
        "--early-stopping",
        nargs="?",
        const="true",
        choices=["true", "false", "never"],
        help="true: stop at --num-beams finished texts; never: only when no better one is possible "
        "(default: false, when none is likely)",
    )
    add = parser.add_argument_group("speed").add_argument
    add(
        "--speculate",
        choices=["prompt-lookup"],
        help="guess the next tokens from what the text "
        "has said before and check them in one pass: the same text, sooner if it repeats itself; "
        "only while one sample is running",
    )
    add(
        "--no-kv-cache",
        action="store_true",
        default=None,
        help="read the whole text again for "
        "each token: slow, and saves 2 × n_layer × n_embd × positions × 4 bytes a sample",
    )
    return parser


def resolve(choices: dict[str, Any], end_of_text: int | None = None) -> Settings:
    """The settings that the user's choices (None: no choice) and the defaults come to.

    Raises UserError for choices that are out of range or contradict each other.
    """
    from micrograd_gpt.generation.filters import Settings

    chosen = {name: value for name, value in choices.items() if value is not None}
    settings = DECODING | chosen
    stop, greedy = settings.pop("stop"), settings.pop("greedy")
    if "" in stop:
        raise UserError("--stop needs a text that is not empty")
    if greedy and chosen.get("temperature"):
        raise UserError("--greedy and --temperature contradict each other: leave out one")
    if greedy:
        settings["temperature"] = 0.0
    if settings["num_beams"] > 1:  # takes neither; the defaults are for random choices
        settings |= {name: chosen.get(name) for name in ("temperature", "top_k")}
        settings["temperature"] = settings["temperature"] or 0.0
    early_stopping = {"true": True, "false": False, "never": "never"}
    settings["early_stopping"] = early_stopping[settings["early_stopping"]]
    settings["end_of_text"] = None if settings.pop("ignore_eos") else end_of_text
    settings["use_cache"] = not settings.pop("no_kv_cache")
    return Settings(**settings)


def read_prompt(given: str | None) -> str | None:
    """The prompt of the flag or of stdin; None: ask on the terminal. UserError if not UTF-8."""
    if given is not None and given != "-":
        return given
    if sys.stdin is None:
        raise UserError("stdin is closed: give the text with --prompt")
    if given is None and sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert it to UTF-8"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def load(name: str | None, device: str, dtype: str) -> tuple[GPT2, Tokenizer]:
    """The model and its tokenizer; UserError where there are none, or they do not fit."""
    from micrograd_gpt.arrays.precision import emulation_note
    from micrograd_gpt.gpt2 import GPT2
    from micrograd_gpt.text.tokenizer_files import load_tokenizer
    from micrograd_gpt.text.tokenizers import GPT2Tokenizer
    from micrograd_gpt.weights.pretrained import from_pretrained

    given = name
    if name is None:
        name = "out" if Path("out", "config.json").exists() else "124M"
        say(f"no --model given: using {name}")
    if note := emulation_note(dtype, device):
        say(note)
    tokenizer = load_tokenizer(name) if Path(name).is_dir() else GPT2Tokenizer()
    try:
        model = from_pretrained(GPT2, name, device, dtype)
    except UserError as error:
        if given is None and name == "124M":  # a newcomer without network
            raise UserError(f"{error}; or train a model first: python train_gpt2.py") from error
        raise
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: put the tokenizer.json it was trained with beside it"
        )
    return model, tokenizer


# ------------------------------------------------------------------------------------------- text


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids to continue. An empty prompt starts after end-of-text, or else after a line end."""
    if prompt:
        return [int(i) for i in tokenizer.encode(prompt)]
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return [int(i) for i in tokenizer.encode("\n")]


def continue_text(
    model: GPT2, tokenizer: Tokenizer, prompt: str, choices: dict[str, Any], as_json: bool
) -> bool:
    """Write the continuations of one prompt to stdout; False if Ctrl-C cut them short."""
    from micrograd_gpt.arrays.backend import memory_errors
    from micrograd_gpt.generation.beam_search import beam_search
    from micrograd_gpt.generation.filters import NO_TOKEN_LEFT
    from micrograd_gpt.generation.sampling import decode, start_samples

    settings = resolve(choices, tokenizer.end_of_text)
    stop_texts = choices["stop"] or ()
    ids = prompt_ids(prompt, tokenizer)
    n_positions = model.config.n_positions
    if len(ids) + settings.max_new_tokens > n_positions:
        say_once(f"note: the model sees at most {n_positions} tokens; of a longer text, the latest")

    def hits_stop(new_ids: list[int]) -> bool:
        return any(stop in tokenizer.decode(new_ids) for stop in stop_texts)

    samples = start_samples([ids], settings)
    output = Output(samples, prompt, tokenizer, stop_texts, as_json)
    rows = max(settings.num_samples, settings.num_beams)
    advice = (
        f"{rows} × {min(len(ids) + settings.max_new_tokens, n_positions)} tokens are decoded at "
        "once; lower --num-samples, --num-beams or --max-new-tokens"
    )
    try:
        with memory_errors(advice):
            if settings.num_beams > 1:
                beams = beam_search(model, ids, settings, hits_stop)
                Output(beams, prompt, tokenizer, stop_texts, as_json).update()
                return True
            output.update()
            for _ in decode(model, samples, settings):
                output.update()
        if any(sample.stopped == "no token left" for sample in samples):
            say(f"note: {NO_TOKEN_LEFT}")
        return True
    except KeyboardInterrupt:
        for sample in samples:
            sample.stopped = sample.stopped or "interrupted"
        output.update()
        return False


class Output:
    """Continuations on stdout, in order: the first unfinished one as it grows, then the next.

    Finding a stop text ends the continuation it is in.
    """

    def __init__(
        self,
        continuations: Sequence[Continuation],
        prompt: str,
        tokenizer: Tokenizer,
        stop_texts: Sequence[str],
        as_json: bool,
    ) -> None:
        from micrograd_gpt.generation.sampling import TextStream

        self.prompt, self.as_json = prompt, as_json
        self.waiting = [(c, TextStream(tokenizer, stop_texts)) for c in continuations]
        self.shown = ""  # of the first that is waiting

    def update(self) -> None:
        """Show what was decided since the last time."""
        for continuation, stream in self.waiting:
            stream.follow(continuation)
        while self.waiting:
            continuation, stream = self.waiting[0]
            if not self.as_json:
                self.show(self.prompt + stream.text)
            if not continuation.stopped:
                break
            if self.as_json:
                self.show(json.dumps(self.describe(continuation, stream.text), ensure_ascii=False))
            self.waiting.pop(0)
            self.show(self.shown.removesuffix("\n") + "\n")
            if self.waiting and not self.as_json:
                self.show(self.shown + SEPARATOR + "\n")
            self.shown = ""

    def show(self, text: str) -> None:
        """Write what `text` has more than was shown before."""
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text

    def describe(self, continuation: Continuation, text: str) -> dict[str, Any]:
        """What --json says about one continuation; the ids include those of the stop."""
        ids, seconds = continuation.new_ids, continuation.seconds
        return {
            "prompt": self.prompt,
            "text": text,
            "token_ids": ids,
            "log_probs": continuation.log_probs,
            "stopped": continuation.stopped,
            "tokens_per_second": round(len(ids) / seconds, 1) if seconds else None,
        }


# ------------------------------------------------------------------------------- interactive


def converse(model: GPT2, tokenizer: Tokenizer, choices: dict[str, Any], as_json: bool) -> int:
    """Continue one text after another as they are typed, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # not on Windows, whose terminal has a history itself
        import readline  # noqa: F401 - input() then edits lines and remembers them
    say("Type a text to have it continued; /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = ask("> ")
            if line.startswith("/"):
                if line.strip() in ("/quit", "/exit"):
                    return 0
                choices = command(line, choices)
            else:
                continue_text(model, tokenizer, line, choices, as_json)
                choices = choices | {"seed": (choices["seed"] or 0) + 1}  # another text each time
        except EOFError:
            say("")
            return 0
        except KeyboardInterrupt:  # the line typed so far is dropped
            say("")
        except UserError as error:
            say(f"error: {error}")


def ask(question: str) -> str:
    """A line typed on the terminal; the question goes to stderr where stdout is not a terminal."""
    try:
        if sys.stdout.isatty():
            return input(question)
        print(question, end="", file=sys.stderr, flush=True)
        return input()
    except UnicodeDecodeError:
        raise UserError("that was not UTF-8 text") from None


def command(line: str, choices: dict[str, Any]) -> dict[str, Any]:
    """Do what a line that begins with "/" says; returns the choices that hold from now on."""
    try:
        name, *words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line!r} cannot be read: {error}") from None
    if name == "/help":
        say(HELP)
        values = DECODING | {key: value for key, value in choices.items() if value is not None}
        used = {key: value for key, value in values.items() if value is not None}
        used = {key: value for key, value in used.items() if value is not False and value != ()}
        say("settings: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in used.items()))
        return choices
    if name not in ("/set", "/unset"):
        raise UserError(f"no such command: {line!r}; /help lists them")
    if not words:
        raise UserError(f"{name} needs a setting; /help lists them")
    if extra := words[2 if name == "/set" else 1 :]:
        raise UserError(f"{name} takes no {extra[0]!r}: put quotes around a value with spaces")
    key = words[0].lstrip("-").replace("-", "_")
    if key not in DECODING:
        raise UserError(f"no such setting: {words[0]!r}; /help lists them")
    value = None
    if name == "/set":
        flag = "--" + key.replace("_", "-")
        value = getattr(make_parser().parse_args(["=".join([flag, *words[1:]])]), key)
    changed = choices | {key: value}
    resolve(changed)
    return changed


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


say_once = functools.cache(say)


if __name__ == "__main__":
    cli.run(main)
