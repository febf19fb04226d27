"""Continuations as text on stdout, as they come.

`TextStream` turns a continuation's tokens into text that can be shown, `Output` shows several
continuations one after another, and `Writer` decodes a prompt into an `Output`.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from micrograd_gpt.arrays.devices import device_of
from micrograd_gpt.arrays.edits import edited_parts
from micrograd_gpt.arrays.edits import say_once as say_edited
from micrograd_gpt.arrays.memory import check_room, memory_errors
from micrograd_gpt.arrays.stand_ins import highest_level, report
from micrograd_gpt.generation.beam_search import beam_search
from micrograd_gpt.generation.context import BYTES_OF_TEXT, Continuation, check_memory
from micrograd_gpt.generation.filters import NO_TOKEN_LEFT
from micrograd_gpt.generation.sampling import Sample, decode, start_samples
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.work import Do, one_by_one
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizers import StreamDecoder

SEPARATOR = "---------------"  # between samples


class Writer:
    """A model and its tokenizer that continue prompts on stdout, as text or as JSON.

    `template` is that of a model that was tuned on instructions. With `special_tokens`, a
    `<|endoftext|>` in a prompt is the token. At most `batch_size` prompts are decoded at once.
    `do` does all batches, as several processes may; each shows those that it decodes as they grow,
    and then those of the others.
    `texts` are the continuations of the latest prompts, in order, the best of a prompt first where
    they come from a beam search.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        as_json: bool = False,
        template: Template | None = None,
        special_tokens: bool = False,
        batch_size: int = 16,
        do: Do = one_by_one,
    ) -> None:
        self.model, self.tokenizer, self.as_json = model, tokenizer, as_json
        self.template = template
        self.texts: Sequence[Continuation] = ()
        self.special_tokens, self.batch_size = special_tokens, batch_size
        self._do = do
        self._told_the_limit = False

    def answer(
        self,
        instructions: Sequence[str],
        input: str,
        settings: Settings,
        stop_texts: Sequence[str] = (),
    ) -> bool:
        """Write the answers to instructions, without their prompts; otherwise as `write`.

        The model needs a template. Raises UserError for an input that it has no place for.
        """
        assert self.template is not None, "only a tuned model answers"
        prompts = [self.template.prompt(instruction, input) for instruction in instructions]
        return self.write(prompts, settings, stop_texts, show_prompt=False)

    def write(
        self,
        prompts: Sequence[str],
        settings: Settings,
        stop_texts: Sequence[str] = (),
        show_prompt: bool = True,
    ) -> bool:
        """Write the continuations of the prompts, in order; False if Ctrl-C cut them short.

        As text, a continuation follows its prompt if `show_prompt`. Raises UserError for a prompt
        that cannot be encoded, and where memory runs out.
        """
        ids = self._encoded(prompts)
        settings = replace(settings, vocab_size=self.tokenizer.vocab_size)
        longest = max(map(len, ids)) + settings.max_new_tokens
        rows = min(len(ids), self.batch_size) * settings.num_samples
        if settings.num_beams > 1:
            rows = settings.num_beams
        lower = "lower --num-samples, --num-beams, --batch-size or --max-new-tokens"
        at_once = f"{rows} × {min(longest, self.model.config.n_positions)} tokens"
        check_memory(self.model, rows, longest, settings.use_cache, lower)
        texts = len(ids) * settings.num_samples
        fewer = "lower --num-samples, or give fewer prompts at a time"
        check_room(texts * BYTES_OF_TEXT, f"{texts:,} texts", fewer)
        self._tell_the_limit(longest)
        if device_of(self.model.transformer.wte.weight.data) == "cpu":
            report()  # loads the kernels: what they say comes before the text
        if highest_level() != "definitions":
            for name in edited_parts():
                say_edited(name)
        output = Output(self.tokenizer, stop_texts, self.as_json, show_prompt)
        try:
            with memory_errors(f"{at_once} are decoded at once; {lower}"):
                if settings.num_beams > 1:
                    self._search(prompts, ids, settings, output)
                else:
                    self._decode(prompts, ids, settings, output)
        except KeyboardInterrupt:
            output.interrupt()
            return False
        if any(text.stopped == "no token left" for text in self.texts):
            say(f"note: {NO_TOKEN_LEFT}")
        return True

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt; UserError, which says which one it is, where one has none."""
        ids = []
        unknown = 0
        for number, prompt in enumerate(prompts, 1):
            try:
                ids.append(prompt_ids(prompt, self.tokenizer, self.special_tokens))
            except UserError as error:
                which = f"prompt {number}: " if len(prompts) > 1 else ""
                raise UserError(f"{which}{error}") from error
            unknown += bool(self.tokenizer.count_unknown(ids[-1]))
        if unknown:
            which = "the prompt has" if len(prompts) == 1 else f"{counted(unknown, 'prompt')} with"
            say(
                f"note: {which} words that the tokenizer does not know: the model sees none of them"
            )
        return ids

    def _tell_the_limit(self, length: int) -> None:
        limit = self.model.config.n_positions
        if length > limit and not self._told_the_limit:
            say(f"note: the model sees at most {limit} tokens, the latest ones of a longer text")
            self._told_the_limit = True

    def _decode(
        self,
        prompts: Sequence[str],
        ids: list[list[int]],
        settings: Settings,
        output: Output,
    ) -> None:
        samples = start_samples(ids, settings)  # of all, so that equal prompts differ
        at_once = self.batch_size * settings.num_samples

        def show(batch: list[Sample], first: int) -> None:
            for place, sample in enumerate(batch, first):
                output.add(sample, prompts[place // settings.num_samples])
            output.update()

        def decode_batch(first: int) -> list[Sample]:
            batch = samples[first : first + at_once]
            show(batch, first)
            for sample in decode(self.model, batch, settings):
                output.update(sample)
            return batch

        found: list[Sample] = []
        self.texts = found
        for batch in self._do(partial(decode_batch, i) for i in range(0, len(samples), at_once)):
            if not samples[len(found)].stopped:  # another process has decoded them
                show(batch, len(found))
            found += batch

    def _search(
        self,
        prompts: Sequence[str],
        ids: list[list[int]],
        settings: Settings,
        output: Output,
    ) -> None:
        def hits_stop(new_ids: list[int]) -> bool:
            text = self.tokenizer.decode(new_ids)
            return any(stop in text for stop in output.stop_texts)

        found: list[Continuation] = []
        self.texts = found
        searches = (partial(beam_search, self.model, row, settings, hits_stop) for row in ids)
        for prompt, beams in zip(prompts, self._do(searches), strict=True):
            found += beams
            for beam in beams:
                output.add(beam, prompt)
            output.update()


def prompt_ids(prompt: str, tokenizer: Tokenizer, allow_special: bool = False) -> list[int]:
    """The ids to continue. An empty prompt starts after end-of-text, or else after a line end."""
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return [int(i) for i in tokenizer.encode(prompt or "\n", allow_special)]


class Output:
    """Continuations on stdout, in order: the first unfinished one as it grows, then the next.

    A continuation ends where a stop text is found in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_texts: Sequence[str],
        as_json: bool,
        show_prompt: bool = True,
    ) -> None:
        self.tokenizer, self.stop_texts = tokenizer, stop_texts
        self.as_json, self.show_prompt = as_json, show_prompt
        self.waiting: deque[tuple[Continuation, str, TextStream]] = deque()
        self.streams: dict[int, TextStream] = {}  # of those that wait, by id()
        self.shown = ""  # of the first that is waiting
        self._n_begun, self._n_finished = 0, 0

    def add(self, continuation: Continuation, prompt: str) -> None:
        """Have the continuation of this prompt shown after those that were added before."""
        stream = TextStream(self.tokenizer, self.stop_texts)
        self.waiting.append((continuation, prompt, stream))
        self.streams[id(continuation)] = stream

    def update(self, changed: Continuation | None = None) -> None:
        """Show what was decided since the last time, if `changed` is given of that one only: there
        may be thousands, of which each token changes one."""
        if changed is not None:
            self.streams[id(changed)].follow(changed)
        else:
            for continuation, _, stream in self.waiting:
                stream.follow(continuation)
        while self.waiting:
            continuation, prompt, stream = self.waiting[0]
            if not self.as_json:
                if self._n_begun == self._n_finished:
                    sys.stdout.write((SEPARATOR + "\n") if self._n_begun else "")
                    self._n_begun += 1
                self._show((prompt if self.show_prompt else "") + stream.text)
            if not continuation.stopped:
                break
            if self.as_json:
                self._show(json.dumps(describe(continuation, prompt, stream), ensure_ascii=False))
            self.waiting.popleft()
            del self.streams[id(continuation)]
            self._show(self.shown.removesuffix("\n") + "\n")
            self._n_finished += 1
            self.shown = ""

    def interrupt(self) -> None:
        """End what is unfinished where it is, and show it."""
        for continuation, _, _ in self.waiting:
            continuation.stopped = continuation.stopped or "interrupted"
        self.update()

    def _show(self, text: str) -> None:
        """Write the part of `text` that comes after what was already shown."""
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text


def describe(continuation: Continuation, prompt: str, stream: TextStream) -> dict[str, Any]:
    """What --json says about one continuation; the ids include those of the stop."""
    ids, seconds = continuation.new_ids, continuation.seconds
    return {
        "prompt": prompt,
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
