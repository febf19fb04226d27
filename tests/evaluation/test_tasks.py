"""What is made of items: accuracies with their errors, answers, and records that go on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import TEXT, make_model

from micrograd_gpt.evaluation.answers import answers
from micrograd_gpt.evaluation.choices import ChoiceTask, LastWordTask
from micrograd_gpt.evaluation.estimates import mean_and_error, ratio_and_error
from micrograd_gpt.evaluation.items import Choice, LastWord
from micrograd_gpt.evaluation.labels import ClassificationTask
from micrograd_gpt.evaluation.perplexity import PerplexityTask
from micrograd_gpt.evaluation.questions import GenerationTask, Question, read_questions
from micrograd_gpt.evaluation.records import Records, Row, text_checksum
from micrograd_gpt.evaluation.running import run
from micrograd_gpt.evaluation.scoring import Score
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import Template
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from micrograd_gpt.tuning.classifier import GPT2Classifier
from micrograd_gpt.tuning.conversations import Turn
from micrograd_gpt.tuning.labelled import Example
from micrograd_gpt.weights.checksum import weights_checksum

CHARS = CharTokenizer.from_text(TEXT)


def char_model(**config: Any) -> GPT2:
    return make_model(factor=8, vocab_size=CHARS.vocab_size, n_positions=32, **config).eval()


def of(*log_probs: float) -> list[Score]:
    """Scores of as many endings, of one token each."""
    return [Score(np.array([x]), np.array([x > -1])) for x in log_probs]


# -------------------------------------------------------------------------- accuracies and errors


def test_the_error_of_a_mean_is_that_of_the_textbook() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert mean_and_error([1.0]) == (1.0, None)


def test_the_error_of_an_average_over_clusters_is_how_far_it_varies() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):  # 50 windows, whose tokens have an error in common
        counts = rng.integers(5, 15, 50)
        sums = counts * (3 + rng.normal(0, 1, 50)) + rng.normal(0, 1, 50) * np.sqrt(counts)
        found.append(ratio_and_error(sums, counts))
    means, errors = np.transpose(found)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_a_perplexity_is_said_as_it_is_or_not_at_all() -> None:
    found = LastWordTask([LastWord("a", "b")], CHARS)
    lines = {nats: found.lines(found.report([found.row(0, of(-nats))])) for nats in (7, 50, 800)}
    assert "perplexity     1,096.63" in lines[7]
    assert "perplexity     5.18e+21" in lines[50]
    assert "perplexity     unknown" in lines[800] and "nats per word  800.0000" in lines[800]


def test_a_kept_row_without_its_fields_is_said(tmp_path: Path) -> None:
    records = Records(tmp_path, {})
    records.add({"item": 0, "lebel": 0})
    with pytest.raises(UserError, match=r"the items in --out are damaged \(KeyError"):
        run(char_model(), ChoiceTask([Choice("a", ("b", "c"), 0)], CHARS), records)


def test_the_likeliest_ending_is_the_answer_and_by_length_the_likeliest_per_character() -> None:
    items = [Choice("a", ("xx", "yyyyyyyy"), 1), Choice("a", ("x", "y", "z"), 0)]
    task = ChoiceTask(items, CHARS)
    rows = [task.row(0, of(-3, -4)), task.row(1, of(-1, -2, -3))]
    assert [(row["answer"], row["answer_by_length"]) for row in rows] == [(0, 1), (0, 0)]
    report = task.report(rows)
    assert (report["accuracy"], report["accuracy_by_length"]) == (0.5, 1.0)
    assert report["accuracy_stderr"] == pytest.approx(0.5)
    assert report["accuracy_by_chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.filterwarnings("error")
def test_an_ending_that_was_only_a_heading_can_be_scored() -> None:
    task = ChoiceTask([Choice("a", ("", "b"), 1)], CHARS)
    assert task.row(0, of(-3, -2))["answer_by_length"] == 1


def test_a_last_word_is_right_if_greedy_decoding_writes_it() -> None:
    task = LastWordTask([LastWord("a", "b")] * 2, CHARS)
    report = task.report([task.row(0, of(-0.5)), task.row(1, of(-2.5))])
    assert (report["accuracy"], report["nats_per_word"]) == (0.5, 1.5)
    assert report["perplexity"] == pytest.approx(math.exp(1.5))


def test_a_model_knows_what_it_would_write() -> None:
    model = char_model()
    context = CHARS.encode("the ")
    new = model.generate(context, max_new_tokens=3, temperature=0)[len(context) :]
    word = CHARS.decode(new)
    others = ["".join(np.random.default_rng(i).choice(list("abcd"), 3)) for i in range(3)]
    items = [Choice("the", (*others, word), 3)]
    assert run(model, ChoiceTask(items, CHARS), Records(None, {}))["accuracy"] == 1
    task = LastWordTask([LastWord("the", word), LastWord("the", others[0])], CHARS)
    assert run(model, task, Records(None, {}))["accuracy"] == 0.5


def test_what_is_too_long_is_said_before_the_first_item(capsys: pytest.CaptureFixture[str]) -> None:
    model, whole = char_model(), Choice("the", ("fox", "dog"), 0)
    cut = Choice("the quick brown fox jumps over", ("fox", "dog"), 0, "line 2")
    items = [whole, cut, whole, Choice("a", ("o" * 40, "b"), 0, "x.jsonl, line 4")]
    records = Records(None, {})
    with pytest.raises(UserError, match=r"x.jsonl, line 4: a continuation of 41 tokens is longer"):
        run(model, ChoiceTask(items, CHARS), records)
    assert not records.rows
    assert not capsys.readouterr().err
    run(model, ChoiceTask(items[:3], CHARS), records)
    assert "note: 1 of 3 items have more tokens than the model's context of 32" in (
        capsys.readouterr().err
    )
    questions = [Question(text, "", {"prompt": text}, "") for text in ("the", "the fox " * 9)]
    task = GenerationTask(questions, CHARS, None, Settings(max_new_tokens=1))
    run(model, task, Records(None, {}))
    assert "note: 1 of 2 prompts have more tokens than the model's context of 32" in (
        capsys.readouterr().err
    )


def test_words_that_the_tokenizer_does_not_know_are_told_and_never_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = WordTokenizer.from_text("the fox dog " * 9)
    model = make_model(vocab_size=tokenizer.vocab_size, n_positions=32).eval()
    classifier = GPT2Classifier(model, ["a", "b"])
    settings = Settings(max_new_tokens=1)
    for task, said in (
        (
            ChoiceTask([Choice("the", ("fox", "zebra"), 0)] * 2, tokenizer),
            "2 of 2 items have words",
        ),
        (LastWordTask([LastWord("the", "zebra")], tokenizer), "1 of 1 items have words that"),
        (
            GenerationTask([Question("zebra", "", {}, "")], tokenizer, None, settings),
            "1 of 1 prompts have words that the tokenizer does not know",
        ),
        (
            PerplexityTask(["the zebra"], ["the zebra"], tokenizer, 8, 4),
            "the text: 1 of 3 tokens are words",
        ),
        (
            ClassificationTask([Example("the zebra", "a", "")], classifier, tokenizer),
            "the texts: 1 of 3 tokens are words",
        ),
    ):
        capsys.readouterr()
        run(classifier if isinstance(task, ClassificationTask) else model, task, Records(None, {}))
        assert f"note: {said}" in capsys.readouterr().err
    task = LastWordTask([LastWord("the", "zebra"), LastWord("the", "fox")], tokenizer)
    assert [task.row(item, of(-0.5))["right"] for item in range(2)] == [False, True]


def test_a_batch_that_does_not_fit_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = GPT2Classifier(char_model(), ["a", "b"])
    questions = [Question(TEXT[:9], "", {}, "")] * 9
    texts = [Example(TEXT[:9], "a", "")] * 9
    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 50_000)
    for model, task in (
        (char_model(), PerplexityTask([TEXT * 9], [TEXT * 9], CHARS, 32, 16)),
        (char_model(), ChoiceTask([Choice("the", ("dog", "lazy"), 0)] * 40, CHARS)),
        (char_model(), GenerationTask(questions, CHARS, None, Settings(max_new_tokens=3))),
        (classifier, ClassificationTask(texts, classifier, CHARS)),
    ):
        with pytest.raises(UserError, match=r"no memory for .* at once: .*: lower --batch-size"):
            run(model, task, Records(None, {}), batch_size=9)
        run(model, task, Records(None, {}), batch_size=1)


# ---------------------------------------------------------------------------------------- answers


def test_answers_equal_those_of_generate_one_by_one() -> None:
    model = char_model()
    prompts = [CHARS.encode(text).tolist() for text in ("the fox", "a", "lazy dog", "o", "ump")]
    settings = Settings(max_new_tokens=10, temperature=0, end_of_text=None)
    found = dict(answers(model, CHARS, prompts, settings, at_once=2))
    for place, prompt in enumerate(prompts):
        ids = model.generate(np.array(prompt), max_new_tokens=10, temperature=0, end_of_text=None)
        assert found[place] == (CHARS.decode(ids[len(prompt) :]), "length")
    whole = found[0].text
    stopped = dict(answers(model, CHARS, prompts[:1], settings, stop_texts=[whole[4:6], "never"]))
    assert stopped[0] == (whole[: whole.index(whole[4:6])], "stop")
    last = int(CHARS.encode(whole)[4])
    ended = dict(answers(model, CHARS, prompts[:1], replace(settings, end_of_text=last)))
    assert ended[0] == (whole[: whole.index(whole[4])], "end-of-text")


def test_what_is_drawn_depends_on_the_question_alone() -> None:
    """Not on what is answered with it: a batch, or what is left after a stop."""
    settings = Settings(max_new_tokens=5, seed=3, end_of_text=None)
    task = GenerationTask([Question("a", "", {}, "")] * 5, CHARS, None, settings)
    (batch,) = task.batches(char_model(), range(5), 5)
    expected = dict(batch())
    assert len({row["answer"] for row in expected.values()}) == 5  # each with its own numbers
    for items, batch_size in ((range(5), 2), ([3, 1], None)):
        for batch in task.batches(char_model(), items, batch_size):
            assert all(row == expected[item] for item, row in batch())


def test_that_a_prompt_has_no_template_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(max_new_tokens=1)
    for asked, is_said in ("a", True), ([Turn("a", "")], False):
        template = Template("{instruction}{output}")
        GenerationTask([Question(asked, "", {}, "")], CHARS, template, settings).check(char_model())
        assert ("continued without their template" in capsys.readouterr().err) == is_said


def test_questions_as_prompts_as_instructions_and_as_conversations(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    objects: list[Row] = [
        {"prompt": "2 + 2 =", "output": " 4", "id": 7},
        {"instruction": "Add.", "input": "1 and 2"},
    ]
    path.write_text("\n".join(map(json.dumps, objects)))
    tokenizer, template = ByteTokenizer(), Template("{instruction}:{input}={output}")
    settings = Settings(max_new_tokens=5, temperature=0, end_of_text=tokenizer.end_of_text)
    task = GenerationTask(read_questions(path), tokenizer, template, settings)
    assert [tokenizer.decode(ids) for ids in task.prompts] == ["2 + 2 =", "Add.:1 and 2="]
    model = make_model(factor=8, vocab_size=tokenizer.vocab_size, n_positions=40).eval()
    records = Records(None, {})
    report = run(model, task, records)
    assert records.rows[0].keys() == {*objects[0], "item", "answer", "stopped", "right"}
    assert records.rows[1].keys() == {*objects[1], "item", "answer", "stopped"}
    assert (report["answers"], report["with_expected"]) == (2, 1)
    assert (report["exact_match"], records.rows[0]["right"]) == (0, False)

    objects[0]["output"] = f" {records.rows[0]['answer']}\n"  # spaces around it do not matter
    path.write_text(json.dumps(objects[0]))
    task = GenerationTask(read_questions(path), tokenizer, template, settings)
    assert run(model, task, Records(None, {}))["exact_match"] == 1

    said = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    path.write_text(json.dumps({"messages": said}) + "\n" + json.dumps({"prompt": "five"}))
    task = GenerationTask(read_questions(path), tokenizer, template, settings)
    assert tokenizer.decode(task.prompts[0]) == "one:=two<|endoftext|>three:="
    assert tokenizer.decode(task.prompts[1]) == "five"
    assert task.questions[0].expected == "four"


def test_messages_are_the_question_whatever_stands_beside_them(tmp_path: Path) -> None:
    """As in ultrachat_200k and no_robots, whose prompt is the first message again."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "hi", "prompt_id": "ab", "messages": messages}))
    (question,) = read_questions(path)
    assert question.asked == [Turn("hi", "yo")] and question.expected == "yo"


def test_messages_may_end_with_a_question(tmp_path: Path) -> None:
    said = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    asked = [Turn("user", "assistant", system="system"), Turn("user", "")]
    path = tmp_path / "questions.jsonl"
    for right in ("", "yo"):
        path.write_text(json.dumps({"messages": said} | ({"output": right} if right else {})))
        (question,) = read_questions(path)
        assert question.asked == asked and question.expected == right
        assert question.fields["messages"] == said


@pytest.mark.parametrize("last", [[], [{"role": "assistant", "content": ""}]])
def test_an_output_that_is_no_text_beside_messages_is_not_the_answer(
    tmp_path: Path, last: list[Any]
) -> None:
    path = tmp_path / "questions.jsonl"
    said = [{"role": "user", "content": "hi"}, *last]
    for output in (3, ["yo", "hello"], None):
        path.write_text(json.dumps({"messages": said, "output": output}))
        (question,) = read_questions(path)
        assert question.expected == "" and question.fields["output"] == output


def test_exact_match_is_over_those_that_have_an_answer() -> None:
    tokenizer = ByteTokenizer()
    settings = Settings(temperature=0, end_of_text=None)
    task = GenerationTask([], tokenizer, None, settings)
    rows = [
        {"stopped": "length", "right": True},
        {"stopped": "end-of-text"},
        {"stopped": "stop", "right": False},
    ]
    report = task.report(rows)
    assert (report["exact_match"], report["cut_off"], report["answers"]) == (0.5, 1, 3)
    assert task.report(rows[1:2])["exact_match"] is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"text": "a"}, "line 1: a question has either .* this one has text"),
        ({"prompt": "a", "instruction": "b"}, "line 1: a question has either"),
        ({"messages": [], "instruction": "b"}, "line 1: the roles are none"),
        ({"messages": []}, "line 1: the roles are none"),
        ({"messages": [{"role": "system"}]}, "line 1: the roles are system; after"),
        ({"messages": ["user"]}, "line 1: messages are a list of objects"),
        ({"prompt": 3}, "line 1: 'prompt' is to be a text, not 3"),
        ({"prompt": "a", "answer": "b"}, "line 1: 'answer' is what a field of the answers is"),
        ({"messages": [], "item": 3}, "line 1: 'item' is what a field of the answers is"),
        ({"prompt": "a", "note": "\ud800"}, "line 1: there is half a character"),
        (
            {"instruction": "a"},
            "line 1: the model was not tuned on instructions .no prompt_template.txt",
        ),
    ],
)
def test_a_wrong_question_is_named(tmp_path: Path, fields: Row, problem: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=problem):
        GenerationTask(read_questions(path), CHARS, None, Settings(end_of_text=None))


# ---------------------------------------------------------------------------------------- records


ITEMS = [Choice("the", (word, "cat"), 0) for word in ("dog", "fox", "lazy", "over", "jumps")]


def evaluate(folder: Path, items: Sequence[Choice] = ITEMS, settings: Row | None = None) -> Row:
    return run(char_model(), ChoiceTask(items, CHARS), Records(folder, settings or {"a": 1}))


def test_an_evaluation_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tmp_path / "whole")
    add, count = Records.add, 0

    def stopped(records: Records, row: Row) -> None:
        nonlocal count
        add(records, row)
        if (count := count + 1) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "part")
    assert not (tmp_path / "part/report.json").exists()
    with open(tmp_path / "part/items.jsonl", "ab") as file:
        file.write(b'{"item": 4, "lab')  # as a kill can leave it
    assert evaluate(tmp_path / "part") == whole
    assert count == 5  # each item once
    lines = (tmp_path / "part/items.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["item"] for line in lines) == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "part/report.json").read_text()) == whole


def test_more_items_of_the_same_evaluation_are_added(tmp_path: Path) -> None:
    evaluate(tmp_path, ITEMS[:2])
    assert evaluate(tmp_path)["items"] == 5
    assert evaluate(tmp_path, ITEMS[:2])["items"] == 2


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    evaluate(tmp_path / "a")
    before = (tmp_path / "a/items.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"with other settings \(a, b\): choose another --out"):
        evaluate(tmp_path / "a", settings={"a": 2, "b": 3})
    assert (tmp_path / "a/items.jsonl").read_bytes() == before
    for name in ("items.jsonl", "report.json", "confusion.png"):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is in the way: choose another --out"):
            evaluate(tmp_path / "b")
        assert (tmp_path / "b" / name).read_text() == "mine"
        shutil.rmtree(tmp_path / "b")
    (tmp_path / "a/items.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError, match="damaged"):
        evaluate(tmp_path / "a")


def test_checksums_tell_models_and_texts_apart() -> None:
    model = char_model()
    before = weights_checksum(model)
    assert before == weights_checksum(char_model())
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 1
    assert before != weights_checksum(model)
    assert text_checksum(["ab", "c"]) != text_checksum(["a", "bc"])
