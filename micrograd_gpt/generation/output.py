"""Continuations as text on stdout, as they come.

`TextStream` turns a continuation's tokens into text that can be shown, `Output` shows several
continuations one after another, and `Writer` decodes a prompt into an `Output`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.generation.beam_search import beam_search
from micrograd_gpt.generation.context import Continuation
from micrograd_gpt.generation.filters import NO_TOKEN_LEFT
from micrograd_gpt.generation.sampling import decode, start_samples
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import say
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizers import StreamDecoder

SEPARATOR = "---------------"  # between samples


class Writer:
    """A model and its tokenizer that continue prompts on stdout, as text or as JSON.

    `template` is that of a model that was tuned on instructions.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        as_json: bool = False,
        template: Template | None = None,
    ) -> None:
        self.model, self.tokenizer, self.as_json = model, tokenizer, as_json
        self.template = template
        self._told_the_limit = False

    def answer(
        self, instruction: str, input: str, settings: Settings, stop_texts: Sequence[str] = ()
    ) -> bool:
        """Write the answers to one instruction, without its prompt; otherwise as `write`.

        The model needs a template. Raises UserError for an input that it has no place for.
        """
        assert self.template is not None, "only a tuned model answers"
        prompt = self.template.prompt(instruction, input)
        return self.write(prompt, settings, stop_texts, show_prompt=False)

    def write(
        self,
        prompt: str,
        settings: Settings,
        stop_texts: Sequence[str] = (),
        show_prompt: bool = True,
    ) -> bool:
        """Write the continuations of one prompt; False if Ctrl-C cut them short.

        As text, a continuation follows its prompt if `show_prompt`. Raises UserError for a prompt
        that cannot be encoded, and where memory runs out.
        """
        ids = prompt_ids(prompt, self.tokenizer)
        settings = replace(settings, vocab_size=self.tokenizer.vocab_size)
        limit = self.model.config.n_positions
        length = len(ids) + settings.max_new_tokens
        if length > limit and not self._told_the_limit:
            say(f"note: the model sees at most {limit} tokens, the latest ones of a longer text")
            self._told_the_limit = True
        rows = max(settings.num_samples, settings.num_beams)
        advice = (
            f"{rows} × {min(length, limit)} tokens are decoded at once; lower --num-samples, "
            "--num-beams or --max-new-tokens"
        )

        def hits_stop(new_ids: list[int]) -> bool:
            text = self.tokenizer.decode(new_ids)
            return any(stop in text for stop in stop_texts)

        samples = start_samples([ids], settings)
        how = prompt, self.tokenizer, stop_texts, self.as_json, show_prompt
        output = Output(samples, *how)
        try:
            with memory_errors(advice):
                if settings.num_beams > 1:
                    beams = beam_search(self.model, ids, settings, hits_stop)
                    Output(beams, *how).update()
                    return True
                output.update()
                for _ in decode(self.model, samples, settings):
                    output.update()
        except KeyboardInterrupt:
            for sample in samples:
                sample.stopped = sample.stopped or "interrupted"
            output.update()
            return False
        if any(sample.stopped == "no token left" for sample in samples):
            say(f"note: {NO_TOKEN_LEFT}")
        return True


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids to continue. An empty prompt starts after end-of-text, or else after a line end."""
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return [int(i) for i in tokenizer.encode(prompt or "\n")]


class Output:
    """Continuations on stdout, in order: the first unfinished one as it grows, then the next.

    A continuation ends where a stop text is found in it.
    """

    def __init__(
        self,
        continuations: Sequence[Continuation],
        prompt: str,
        tokenizer: Tokenizer,
        stop_texts: Sequence[str],
        as_json: bool,
        show_prompt: bool = True,
    ) -> None:
        self.prompt, self.as_json = prompt, as_json
        self.begin = prompt if show_prompt else ""
        self.waiting = [(c, TextStream(tokenizer, stop_texts)) for c in continuations]
        self.shown = ""  # of the first that is waiting

    def update(self) -> None:
        """Show what was decided since the last time."""
        for continuation, stream in self.waiting:
            stream.follow(continuation)
        while self.waiting:
            continuation, stream = self.waiting[0]
            if not self.as_json:
                self._show(self.begin + stream.text)
            if not continuation.stopped:
                break
            if self.as_json:
                self._show(json.dumps(self._describe(continuation, stream), ensure_ascii=False))
            self.waiting.pop(0)
            self._show(self.shown.removesuffix("\n") + "\n")
            if self.waiting and not self.as_json:
                self._show(self.shown + SEPARATOR + "\n")
            self.shown = ""

    def _show(self, text: str) -> None:
        """Write the part of `text` that comes after what was already shown."""
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text

    def _describe(self, continuation: Continuation, stream: TextStream) -> dict[str, Any]:
        """What --json says about one continuation; the ids include those of the stop."""
        ids, seconds = continuation.new_ids, continuation.seconds
        return {
            "prompt": self.prompt,
            "text": stream.text,
            "token_ids": ids,
            "log_probs": continuation.log_probs,
            "stopped": continuation.stopped,
            "tokens_per_second": round(len(ids) / seconds, 1) if seconds else None,
        }


class TextStream:
    """The text of a continuation's new tokens, as far as it can be shown.

    It has whole characters only, and nothing of a stop text, which may span tokens: characters
    that could be the start of one wait until it is clear that they are not. The prompt is not
    searched. `text` only ever grows, at its end.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()) -> None:
        self.text = ""
        self._tokenizer, self._stop_texts = tokenizer, stop_texts
        self._decoder, self._read, self._waiting = StreamDecoder(tokenizer), 0, ""
        self._closed = False

    def follow(self, continuation: Continuation) -> None:
        """Add the text of the tokens that are new since the last time.

        Where a stop text is found, the text ends before it and the continuation is `stopped`.
        """
        for token in continuation.ids[continuation.n_prompt + self._read :]:
            if self._closed:
                return
            self._read += 1
            if continuation.stopped != "end-of-text" or token != self._tokenizer.end_of_text:
                self._add(self._decoder.feed(token))
            if self._closed:
                continuation.stopped = "stop"
        if continuation.stopped and not self._closed:
            self.text += self._waiting
            self._closed = True

    def _add(self, characters: str) -> None:
        text, stops = self._waiting + characters, self._stop_texts
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            self.text += text[: min(found)]
            self._closed = True
            return
        begun = (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - max(begun, default=0)
        self.text += text[:shown]
        self._waiting = text[shown:]
