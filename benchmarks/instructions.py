"""Instructions whose answers can be checked: made here, then answered by a model.

    python benchmarks/instructions.py write data              # data/train.json, data/test.json
    python benchmarks/instructions.py score data/test.json --model tuned

Three tasks in many phrasings, with and without an input: reverse a word, add two numbers, pick the
longer of two words. The words are made up. No word, and no pair of numbers, is in both files. An
answer counts if it is right to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import write_text
from micrograd_gpt.text.template import Template, template_of
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.tuning.conversations import read_conversations
from micrograd_gpt.weights.pretrained import from_pretrained

LETTERS = "bdfgklmnprstvz", "aeiou"
WORDS = 8_000  # to make up, some of them more than once
LARGEST = 20  # number to add
BATCH = 50  # instructions answered at once
# What may be asked, as (instruction, input)
PHRASINGS = {
    "reverse": [
        ("Reverse the word {0}.", ""),
        ("Write {0} backwards.", ""),
        ("Spell {0} from its last letter to its first.", ""),
        ("What is {0} read from right to left?", ""),
        ("Reverse this word.", "{0}"),
        ("Write it backwards.", "{0}"),
    ],
    "add": [
        ("What is {0} plus {1}?", ""),
        ("Add {0} and {1}.", ""),
        ("{0} + {1} =", ""),
        ("How much is {0} and {1} together?", ""),
        ("Add these numbers.", "{0} {1}"),
        ("What is the sum?", "{0} + {1}"),
    ],
    "longer": [
        ("Which is longer, {0} or {1}?", ""),
        ("Pick the longer word: {0}, {1}.", ""),
        ("Which of {0} and {1} has more letters?", ""),
        ("Pick the longer word.", "{0} {1}"),
        ("Which word is longer?", "{0} or {1}"),
    ],
}
Item = dict[str, str]


def main() -> int:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="make the data")
    write.add_argument("folder", type=Path)
    write.add_argument("--train", type=cli.positive_int, default=20_000, help="items (20000)")
    write.add_argument("--test", type=cli.positive_int, default=600, help="items (600)")
    score = commands.add_parser("score", help="have a model answer, and count what is right")
    score.add_argument("file", type=Path)
    score.add_argument("--model", required=True, help="the folder of a model, tuned or not")
    given = parser.parse_args()
    if given.command == "write":
        write_data(given.folder, given.train, given.test)
    else:
        print_score(given.file, given.model)
    return 0


# ------------------------------------------------------------------------------------- making them


def write_data(folder: Path, train: int, test: int) -> None:
    """Write both files; the same ones each time."""
    rng = np.random.default_rng(0)
    words = sorted({made_up_word(rng) for _ in range(WORDS)})
    numbers = range(1, LARGEST + 1)
    pairs = [f"{a} {b}" for a in numbers for b in numbers if a <= b]
    (train_words, test_words), (train_pairs, test_pairs) = (
        split(things, rng) for things in (words, pairs)
    )
    for name, count, words, pairs in (
        ("train", train, train_words, train_pairs),
        ("test", test, test_words, test_pairs),
    ):
        items = list(made(count, words, pairs, rng))
        content = "[\n" + ",\n".join(map(json.dumps, items)) + "\n]\n"
        write_text(folder / f"{name}.json", content)
        print(f"{folder / name}.json: {len(items):,} items")


def made_up_word(rng: np.random.Generator) -> str:
    """A word of 3 to 6 letters: consonants and vowels in turn."""
    letters = [str(rng.choice(list(LETTERS[i % 2]))) for i in range(rng.integers(3, 7))]
    return "".join(letters)


def split(things: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Nine tenths of some things, and the others."""
    shuffled = [things[i] for i in rng.permutation(len(things))]
    return shuffled[len(things) // 10 :], shuffled[: len(things) // 10]


def made(
    count: int, words: list[str], pairs: list[str], rng: np.random.Generator
) -> Iterator[Item]:
    """Items of the three tasks in turn."""
    tasks: dict[str, Callable[[], tuple[list[str], str]]] = {
        "reverse": lambda: reverse(words, rng),
        "add": lambda: add(pairs, rng),
        "longer": lambda: longer(words, rng),
    }
    for i in range(count):
        task = list(tasks)[i % len(tasks)]
        parts, answer = tasks[task]()
        instruction, input = PHRASINGS[task][rng.integers(len(PHRASINGS[task]))]
        yield {
            "task": task,
            "instruction": instruction.format(*parts),
            "input": input.format(*parts),
            "output": answer,
        }


def reverse(words: list[str], rng: np.random.Generator) -> tuple[list[str], str]:
    word = str(rng.choice(words))
    return [word], word[::-1]


def add(pairs: list[str], rng: np.random.Generator) -> tuple[list[str], str]:
    parts = [str(part) for part in rng.permutation(str(rng.choice(pairs)).split())]
    return parts, str(sum(map(int, parts)))


def longer(words: list[str], rng: np.random.Generator) -> tuple[list[str], str]:
    while True:
        parts = [str(word) for word in rng.choice(words, 2)]
        if len(parts[0]) != len(parts[1]):
            return parts, max(parts, key=len)


# ----------------------------------------------------------------------------------- scoring them


def print_score(file: Path, name: str) -> None:
    """Say which part of the answers is right, task by task."""
    turns = [conversation[0] for conversation in read_conversations(file)]
    tasks = [item.get("task", "all") for item in json.loads(file.read_text("utf-8"))]
    right, asked = Counter[str](), Counter(tasks)
    template = template_of(name) or Template()
    prompts = [template.prompt(turn.instruction, turn.input, turn.system) for turn in turns]
    for task, turn, answer in zip(tasks, turns, answers(name, prompts), strict=True):
        right[task] += answer == turn.output
    for task, count in asked.items():
        print(f"{task:10} {right[task]:4} of {count:4} right, {right[task] / count:.1%}")
    print(
        f"{'in all':10} {right.total():4} of {len(tasks):4} right, {right.total() / len(tasks):.1%}"
    )


def answers(name: str, prompts: list[str]) -> list[str]:
    """How a model continues the prompts, greedily, up to end-of-text."""
    model, tokenizer = from_pretrained(GPT2, name), load_tokenizer(name)
    end = tokenizer.end_of_text
    if end is None:
        raise UserError(f"{name} has no end-of-text token: give a model with one")
    found = []
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch", disable=None):
        ids = [tokenizer.encode(prompt) for prompt in prompts[start : start + BATCH]]
        texts = model.generate(ids, max_new_tokens=20, temperature=0, end_of_text=end)
        for prompt, text in zip(ids, texts, strict=True):
            answer = text[len(prompt) :].tolist()
            found.append(tokenizer.decode(answer[: answer.index(end)] if end in answer else answer))
    return found


if __name__ == "__main__":
    cli.run(main)
