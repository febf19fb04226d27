"""What a model answers to the questions of a file, for judges, human or not.

A question is a JSON object with one of

    prompt                 a text to continue
    instruction, input     put into the template that the model was tuned with; input may be missing
    messages               a conversation (tuning/conversations.py), whose last answer is asked for:
                           one that stands there is the right one, and there may be none

and perhaps the right answer, `output`. All that it has is in its answer's row too, beside the
fields OF_ANSWERS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from micrograd_gpt.evaluation.answers import PROMPTS_AT_ONCE, Answer, answers, of_like_length
from micrograd_gpt.evaluation.estimates import mean_and_error
from micrograd_gpt.evaluation.items import text_field
from micrograd_gpt.evaluation.records import Row
from micrograd_gpt.evaluation.running import Batch, Task
from micrograd_gpt.generation.context import check_memory
from micrograd_gpt.generation.output import prompt_ids
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE
from micrograd_gpt.text.json_objects import read_objects
from micrograd_gpt.text.template import Template
from micrograd_gpt.tuning.conversations import Conversation, Turn, turns_of
from micrograd_gpt.tuning.instructions import encode

OF_ANSWERS = ("item", "answer", "stopped", "right")  # the fields that an answer's row adds


class Question(NamedTuple):
    """A prompt, or a conversation whose last answer is asked for; its fields; where it stands."""

    asked: str | Conversation
    expected: str  # the right answer, or "" where it is not known
    fields: Row
    place: str


def read_questions(path: str | Path, encoding: str = "utf-8") -> list[Question]:
    """The questions of a .jsonl file, one a line, or of a .json file, which holds a list of them.

    Raises UserError, naming the place, for an object that is none.
    """
    objects = list(read_objects(path, encoding))
    for place, fields in objects:
        if taken := [name for name in OF_ANSWERS if name in fields]:
            raise UserError(
                f"{place}: {taken[0]!r} is what a field of the answers is called: give it another "
                "name ('output' for the right answer)"
            )
    return [_question(fields, place) for place, fields in objects]


def _question(fields: Row, place: str) -> Question:
    if "messages" in fields:  # whatever stands beside them: data sets repeat the first as a prompt
        conversation = turns_of(_answered(fields["messages"]), place)
        right = conversation[-1].output or fields.get("output")
        expected = right if isinstance(right, str) else ""  # a score or a list is for other tools
        return Question(conversation, expected, fields, place)
    names = [name for name in ("prompt", "instruction") if name in fields]
    if len(names) != 1:
        raise UserError(
            f"{place}: a question has either a prompt, or an instruction, or messages; this one "
            f"has {', '.join(fields) or 'no fields'}"
        )
    asked = text_field(fields, names[0], place)
    input, expected = (text_field(fields, name, place, "") for name in ("input", "output"))
    if names == ["prompt"]:
        return Question(asked, expected, fields, place)
    return Question([Turn(asked, expected, input)], expected, fields, place)


def _answered(messages: Any) -> Any:
    """The messages of a question, which may end with the user's, with an answer that is unknown."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_open = isinstance(last, dict) and last.get("role") == "user"
    return [*messages, {"role": "assistant", "content": None}] if is_open else messages


class GenerationTask(Task):
    """Questions to a model; UserError for one that it cannot be asked.

    Args:
        template: what an instruction is put into; None for a model that was not tuned on any.
        settings: how to decode; `stop_texts` end an answer too.
    """

    unit = "answer"

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        template: Template | None,
        settings: Settings,
        stop_texts: Sequence[str] = (),
    ) -> None:
        self.questions, self.tokenizer, self.template = questions, tokenizer, template
        self.settings, self.stop_texts = settings, stop_texts
        self.prompts = [self._prompt(question) for question in questions]

    def _prompt(self, question: Question) -> list[int]:
        try:
            if isinstance(question.asked, str):
                return prompt_ids(question.asked, self.tokenizer)
            if self.template is None:
                raise UserError(
                    f"the model was not tuned on instructions (no {PROMPT_TEMPLATE}): give a prompt"
                )
            *earlier, last = question.asked
            prompt = self.template.prompt(last.instruction, last.input, last.system)
            ids = self.tokenizer.encode(prompt).tolist()
            if earlier:
                ids = encode(earlier, self.template, self.tokenizer).ids.tolist() + ids
            return ids
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error

    def __len__(self) -> int:
        return len(self.questions)

    def check(self, model: GPT2) -> None:
        longest = model.config.n_positions
        too_long = sum(len(prompt) > longest for prompt in self.prompts)
        unknown = sum(map(bool, map(self.tokenizer.count_unknown, self.prompts)))
        self.tell("prompt", too_long, longest, unknown)
        if self.template and any(isinstance(question.asked, str) for question in self.questions):
            say(
                "note: this model was tuned on instructions, and a prompt is continued without "
                "their template: call the field instruction to have it answered"
            )

    def batches(self, model: GPT2, items: Sequence[int], batch_size: int | None) -> Iterator[Batch]:
        prompts = [self.prompts[item] for item in items]
        for places in of_like_length(prompts, batch_size or PROMPTS_AT_ONCE):
            yield partial(self._answer, model, [items[place] for place in places])

    def _answer(self, model: GPT2, items: list[int]) -> list[tuple[int, Row]]:
        prompts = [self.prompts[item] for item in items]
        longest = max(map(len, prompts)) + self.settings.max_new_tokens
        check_memory(model, len(prompts), longest, advice="lower --batch-size")
        how = (self.settings, self.stop_texts, len(items), items)
        found = answers(model, self.tokenizer, prompts, *how)
        return [(items[place], self._row(items[place], answer)) for place, answer in found]

    def _row(self, item: int, answer: Answer) -> Row:
        question = self.questions[item]
        row = {**question.fields, "answer": answer.text, "stopped": answer.stopped}
        if question.expected:
            row["right"] = answer.text.strip() == question.expected.strip()
        return row

    def report(self, rows: Sequence[Row]) -> Row:
        """How many answers there are, and how many equal the expected ones, but for spaces around
        them; None where none is expected."""
        right = [row["right"] for row in rows if "right" in row]
        exact, error = mean_and_error(right) if right else (None, None)
        return {
            "answers": len(rows),
            "cut_off": sum(row["stopped"] == "length" for row in rows),
            "with_expected": len(right),
            "exact_match": exact,
            "exact_match_stderr": error,
        }
