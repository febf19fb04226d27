"""From an instruction to the prompt that a tuned model was taught to answer.

A template is a text with places for what differs from one instruction to the next:

    {system}         how to behave, from a conversation's system message
    {instruction}    what to do, or what the user of a conversation says
    {input}          what to do it to
    {output}         where the answer begins; nothing follows it

A paragraph, which is what stands between empty lines, is left out where it has no place but
{system} or {input}, and there is none. In a conversation, the turns after the first follow on the
end-of-text of the answer before them, and have no system message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from micrograd_gpt.support.cli import listed, say, say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, reading, write_text
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE, TOKENIZER_CONFIG

NEEDED = "instruction", "output"
OPTIONAL = {"system": "a system message", "input": "an input"}
PLACE = re.compile(r"\{(system|instruction|input|output)\}")

CHAT_TEMPLATE = "chat_template.jinja"  # Transformers' own, where it is not in the settings

DEFAULT = """\
{system}

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""


class Template:
    """A template, given as text; UserError where it lacks a place that it needs."""

    def __init__(self, text: str = DEFAULT) -> None:
        self.text = text.removesuffix("\n")  # which editors end a file with
        places = PLACE.findall(self.text)
        for name in NEEDED:
            if places.count(name) != 1:
                count = f"has {places.count(name)} places" if name in places else "has no place"
                raise UserError(f"the template {count} {{{name}}}: it needs one")
        if not self.text.endswith("{output}"):
            raise UserError(
                "the template goes on after {output}: end with it, the answer comes last"
            )
        self._paragraphs = self.text.removesuffix("{output}").split("\n\n")

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        """The text that the answer to an instruction follows.

        Raises UserError for an input or a system message that the template has no place for.
        """
        values = {"instruction": instruction, "input": input, "system": system}
        given = {name for name, value in values.items() if value}
        for name, what in OPTIONAL.items():
            if name in given and f"{{{name}}}" not in self.text:
                raise UserError(f"the template has no place for {what}: add {{{name}}} to it")
        *before, last = self._paragraphs
        kept = [paragraph for paragraph in before if _is_kept(paragraph, given)]
        return PLACE.sub(lambda place: values[place[1]], "\n\n".join([*kept, last]))

    def conversation(self, messages: Iterable[Mapping[str, str]], end_of_text: str) -> str:
        """The text of messages {"role": …, "content": …} so far: end_of_text after each answer, and
        no system message where the template has no place for one, which is said."""
        text = system = ""
        for message in messages:
            if message["role"] == "system":
                system = message["content"]
                if "{system}" not in self.text:
                    say_once("note: the template has no place for a system message: left out")
                    system = ""
            elif message["role"] == "user":
                text += self.prompt(message["content"], system=system)
                system = ""
            else:
                text += message["content"] + end_of_text
        return text

    def chat_template(self) -> str:
        """The template in Transformers' form: Jinja, which turns a list of messages into text.

        It gives the same text as `conversation`. A message has no input of its own, so {input} is
        left out, or empty.
        """
        *before, last = self._paragraphs
        turn = ""
        for paragraph in before:
            text = _as_jinja(paragraph + "\n\n")
            if _is_kept(paragraph, set()):
                turn += text
            elif _is_kept(paragraph, {"system"}):
                turn += f"{{%- if ns.system -%}}{text}{{%- endif -%}}"
        return (
            "{%- set ns = namespace(system='') -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] -%}"
            f"{{%- elif message['role'] == 'user' -%}}{turn}{_as_jinja(last)}"
            "{%- set ns.system = '' -%}"
            "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
            "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}"
            "{%- endif -%}{%- endfor -%}"
        )


def _is_kept(paragraph: str, given: set[str]) -> bool:
    """Whether a paragraph stays where nothing but the names `given` has a value."""
    places = set(PLACE.findall(paragraph))
    return not places or "instruction" in places or not places.isdisjoint(given)


def _as_jinja(paragraph: str) -> str:
    """The text of a paragraph as an expression of Jinja."""
    values = {"instruction": "message['content']", "system": "ns.system", "input": "''"}
    parts = [
        # Every other part is the name of a place. Jinja reads the escapes that JSON has.
        values[part] if i % 2 else json.dumps(part, ensure_ascii=False)
        for i, part in enumerate(PLACE.split(paragraph))
    ]
    return "{{ " + " + ".join(parts) + " }}"


def read_template(path: str | Path) -> Template:
    """The template in a file; UserError, naming it, where it cannot be one."""
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return Template(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def template_of(folder: str | Path) -> Template | None:
    """The template that the model in `folder` was tuned with; None: with none."""
    path = Path(folder) / PROMPT_TEMPLATE
    return read_template(path) if path.exists() else None


def first_template(folders: Sequence[str | Path]) -> Template | None:
    """The first template in these folders of models. Where there is none, stderr says which of them
    have one that only Transformers reads."""
    if template := next(filter(None, map(template_of, folders)), None):
        return template
    for folder in map(Path, folders):
        settings = read_json(folder / TOKENIZER_CONFIG) or {}
        if settings.get("chat_template") or (folder / CHAT_TEMPLATE).exists():
            say(
                f"note: the chat template in {folder} is left out: the template that is read here "
                f"is {PROMPT_TEMPLATE}"
            )
    return None


def choose_template(path: str | Path | None, folder: str | Path | None) -> Template:
    """The template in a file, or else that of the model in a folder, or else the default. Stderr
    says what looks like a place in the file and is none: it may be misspelt."""
    if path is not None:
        template = read_template(path)
        braces = dict.fromkeys(re.findall(r"\{ *\w+ *\}", template.text))
        if others := [text for text in braces if not PLACE.fullmatch(text)]:
            say(
                f"note: {path}: {listed(others)} will be part of every prompt as it stands: the "
                "places are {system}, {instruction}, {input} and {output}"
            )
        return template
    return first_template([folder] if folder else []) or Template()


def save_template(template: Template, folder: str | Path) -> None:
    """Write the template into a model's folder, and its chat template into the settings of the
    tokenizer that is there already. UserError if that fails.

    Transformers renders a conversation as one text, in which end-of-text is typed out; so there it
    must be found in a text, as in the texts of any other chat model.
    """
    path = Path(folder) / TOKENIZER_CONFIG
    chat = {"split_special_tokens": False, "chat_template": template.chat_template()}
    settings = (read_json(path) or {}) | chat
    write_text(path, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    write_text(Path(folder) / PROMPT_TEMPLATE, template.text + "\n")
