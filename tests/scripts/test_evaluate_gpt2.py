"""evaluate_gpt2.py as its users meet it: reports, JSON, one-line errors, Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training
from small_gpt2 import TEXT, make_model, save_model

from micrograd_gpt.runs.lock import only_writer
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.shard_files import FORMAT, MANIFEST
from micrograd_gpt.text.shards import write_shard
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning.classifier import GPT2Classifier, write_classifier
from micrograd_gpt.weights.formats import RUN_FLAGS_BEGIN

SCRIPT = Path(__file__).parents[2] / "evaluate_gpt2.py"
evaluate = training.script("evaluate_gpt2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("char"), CharTokenizer.from_text(TEXT))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tuned")
    save_model(folder, ByteTokenizer())
    save_template(Template("{instruction} {output}"), folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    body = make_model(0, 8, vocab_size=ByteTokenizer().vocab_size)
    write_classifier(GPT2Classifier(body, ["ham", "spam"]), folder, ByteTokenizer())
    return str(folder)


def lines(path: Path, *objects: Any) -> str:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in objects))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """stdout of the script, run here."""
    capsys.readouterr()
    assert evaluate.main(list(argv)) == 0
    return capsys.readouterr().out


def test_perplexity(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3)
    flags = ["perplexity", "--model", model, "--data", str(path)]
    report = json.loads(run(capsys, *flags, "--stride", "8", "--json"))
    assert report["tokens"] == len(TEXT) * 3 - 1
    text = run(capsys, *flags, "--stride", "8")
    assert f"perplexity           {report['perplexity']:,.2f}\n" in text
    error = report["nats_per_token_stderr"]
    assert f"nats per token       {report['nats_per_token']:.4f} ± {error:.4f}\n" in text
    limited = json.loads(run(capsys, *flags, "--stride", "8", "--limit", "2", "--json"))
    assert limited["windows"] == 2
    narrow = json.loads(run(capsys, *flags, "--block-size", "4", "--json"))
    assert narrow["nats_per_token"] != report["nats_per_token"]


def test_a_closed_stdout_loses_no_report(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the shell's `>&-` leaves it; --out keeps the report."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    flags = ["perplexity", "--model", model, "--data", str(path)]
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UserError, match="stdout is closed: send it to a file"):
        evaluate.main(flags)
    assert evaluate.main([*flags, "--out", str(tmp_path / "out")]) == 0


def test_detokenizing_changes_what_is_read_and_not_what_is_counted(
    tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a , b . c")
    flags = ["perplexity", "--model", tuned, "--data", str(path), "--json"]
    as_it_is = json.loads(run(capsys, *flags))
    undone = json.loads(run(capsys, *flags, "--detokenize", "wikitext"))
    assert (as_it_is["tokens"], undone["tokens"]) == (8, 6)


def test_line_ends_are_read_as_for_training(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    flags = ["perplexity", "--model", model, "--data", str(path), "--json"]
    path.write_bytes(TEXT.encode() * 2)
    wanted = run(capsys, *flags)
    path.write_bytes(TEXT.replace("\n", "\r\n").encode() * 2)
    assert run(capsys, *flags) == wanted
    with pytest.raises(UserError, match=r"the character '\\r' in "):
        evaluate.main([*flags, "--line-ends", "keep"])


def test_records_and_special_tokens_are_read_as_for_training(
    tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "records.jsonl", {"body": "a<|endoftext|>b"})
    flags = ["perplexity", "--model", tuned, "--data", data, "--json"]
    with pytest.raises(UserError, match=r"has no 'text', only 'body': .* with --text-field"):
        evaluate.main(flags)
    flags += ["--text-field", "body"]
    assert json.loads(run(capsys, *flags))["tokens"] == 14
    assert json.loads(run(capsys, *flags, "--special-tokens"))["tokens"] == 2


def test_an_evaluation_inside_of_its_data_goes_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 2)
    for out in (tmp_path, tmp_path / "inside"):
        flags = ["perplexity", "--model", model, "--data", str(tmp_path), "--out", str(out)]
        assert run(capsys, *flags) == run(capsys, *flags)


def test_a_typed_line_end_stops_answers() -> None:
    parser = evaluate.make_parser("")
    given = parser.parse_args(["generate", "--data", "x", "--stop", r"\n", "--stop", "b"])
    assert given.stop == ["\n", "b"]


def test_multiple_choice_and_last_word(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{"context": "the", "endings": ["dog", "fox", "lazy"], "label": i} for i in range(3)]
    data = lines(tmp_path / "items.jsonl", *items)
    flags = ["multiple-choice", "--model", model, "--data", data]
    report = json.loads(run(capsys, *flags, "--json"))
    assert (report["items"], report["accuracy"]) == (3, pytest.approx(1 / 3))
    assert "accuracy            33.33% ± 33.33%\n" in run(capsys, *flags)
    data = lines(tmp_path / "texts.jsonl", {"text": "the dog"}, {"text": "the lazy fox"})
    flags = ["last-word", "--model", model, "--data", data, "--limit", "1"]
    assert json.loads(run(capsys, *flags, "--json"))["items"] == 1


def test_out_keeps_the_items_and_goes_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{"context": "the", "endings": ["dog", word], "label": 0} for word in ("fox", "lazy")]
    data, out = lines(tmp_path / "items.jsonl", *items), tmp_path / "out"
    flags = ["multiple-choice", "--model", model, "--data", data, "--out", str(out), "--json"]
    first = json.loads(run(capsys, *flags, "--limit", "1"))
    whole = json.loads(run(capsys, *flags))
    assert (first["items"], whole["items"]) == (1, 2)
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [row["item"] for row in rows] == [0, 1]
    assert json.loads((out / "report.json").read_text()) == whole
    for others in (items[::-1], [items[0] | {"label": 1}, items[1]]):
        lines(tmp_path / "items.jsonl", *others)
        with pytest.raises(UserError, match=r"other settings \(data\)"):
            evaluate.main(flags)
    with pytest.raises(UserError, match=r"other settings \(dtype, weights\)"):
        lines(tmp_path / "items.jsonl", *items)
        evaluate.main([*flags, "--dtype", "float64"])


def test_two_evaluations_do_not_write_the_same_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_text(TEXT * 3)
    flags = ["perplexity", "--model", model, "--data", str(path), "--out", str(out)]
    with only_writer(out):
        with pytest.raises(UserError, match=r"another process writes to .*out \(process \d+ on "):
            evaluate.main(flags)
        assert [file.name for file in out.iterdir()] == [".lock"]
    run(capsys, *flags)
    assert {file.name for file in out.iterdir()} == {"settings.json", "items.jsonl", "report.json"}


def test_settings_of_another_program_stay(model: str, tmp_path: Path) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_text(TEXT)
    out.mkdir()
    (out / "settings.json").write_text("// a comment")
    with pytest.raises(UserError, match=r"settings\.json is damaged: .*: choose another --out"):
        evaluate.main(["perplexity", "--model", model, "--data", str(path), "--out", str(out)])
    assert [file.name for file in out.iterdir()] == ["settings.json"]


def test_classify(classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "test.tsv", tmp_path / "out"
    path.write_text("ham\tsee you\nspam\tWIN now\nham\tok\nspam\tcall 123\n")
    flags = ["classify", "--model", classifier, "--data", str(path)]
    report = json.loads(run(capsys, *flags, "--json", "--out", str(out)))
    assert report["count"] == 4 and report["labels"].keys() == {"ham", "spam"}
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["item"])  # they are there in the order in which they were done
    assert [row["label"] for row in rows] == ["ham", "spam", "ham", "spam"]
    assert sum(row["label"] == row["answer"] for row in rows) == 4 * report["accuracy"]
    assert sum(report["confusion"][0]) == sum(report["confusion"][1]) == 2
    assert {row["answer"] for row in rows} == {"ham", "spam"}
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["answer"] == max(row["probabilities"], key=row["probabilities"].get)
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    text = run(capsys, *flags)
    assert "macro F1" in text and "standard error of the accuracy" in text


def test_generate(tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "q.jsonl", {"instruction": "Say é.", "id": 1}, {"prompt": "ab"})
    flags = ["generate", "--model", tuned, "--data", data, "--max-new-tokens", "5"]
    answers = [json.loads(line) for line in run(capsys, *flags).splitlines()]
    assert sorted(answer["item"] for answer in answers) == [0, 1]
    first = next(answer for answer in answers if answer["item"] == 0)
    assert first["instruction"] == "Say é." and first["id"] == 1
    report = json.loads(run(capsys, *flags, "--json", "--out", str(tmp_path / "out")))
    assert report["answers"] == 2
    kept = (tmp_path / "out/items.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in kept] == answers


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["perplexity", "--data", "{text}", "--stride", "32"], "give a --stride from 1 to 31"),
        (["perplexity", "--data", "{text}", "--block-size", "99"], "at most 32 tokens"),
        (["perplexity", "--data", "{missing}"], "does not exist"),
        (["perplexity", "--data", "{text}", "--encoding", "klingon"], "not a text encoding"),
        (["multiple-choice", "--data", "{text}"], "line 1: this is not JSON"),
        (["last-word", "--data", "{items}"], "there is no 'text', only 'context', 'endings'"),
        (["generate", "--data", "{text}", "--temperature", "-1"], "temperature must be"),
        (["generate", "--data", "{questions}"], "not tuned on instructions"),
        (["generate", "--data", "{questions}", "--stop", ""], "--stop: must not be empty"),
        (["generate", "--data", "{null}"], "line 1: 'prompt' is to be a text, not null"),
        (["perplexity", "--data", "{text}", "--text-field", "x"], "is for records .* holds none"),
        (["classify", "--data", "{table}"], "is a language model, not a classifier"),
        (["classify", "--data", "{table}", "--limit", "0"], "must be 1 or more"),
        (["perplexity"], "--data"),
        (["guess", "--data", "{text}"], r"COMMAND: invalid choice: [^:]*; see --help$"),
        (["--data", "{text}", "perplexity"], "COMMAND: .*: it comes first, before the flags"),
    ],
)
def test_mistakes_are_named(model: str, tmp_path: Path, argv: list[str], problem: str) -> None:
    files = {name: str(tmp_path / name) for name in ("text", "missing", "items", "questions")}
    files["table"] = str(tmp_path / "table.tsv")
    Path(files["text"]).write_text(TEXT * 2)
    Path(files["table"]).write_text("a\tx\nb\ty\na\tz\n")
    lines(Path(files["items"]), {"context": "a", "endings": ["b", "c"], "label": 0})
    lines(Path(files["questions"]), {"instruction": "a"})
    files["null"] = lines(tmp_path / "null", {"prompt": None})
    with pytest.raises(UserError, match=problem):
        evaluate.main([word.format(**files) for word in [*argv, "--model", model]])


def test_a_model_of_another_kind_is_refused(classifier: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(UserError, match="is a classifier"):
        evaluate.main(["perplexity", "--model", classifier, "--data", str(tmp_path / "text")])


def test_an_error_is_one_line_and_status_2(model: str) -> None:
    command = [sys.executable, str(SCRIPT), "last-word", "--model", model, "--data", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    heavy = ("tiktoken", "huggingface_hub", "matplotlib", "cupy", "safetensors", "tqdm", "lm_eval")
    code = (
        "import runpy, sys; sys.argv = ['evaluate_gpt2.py', 'generate', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        f"finally: print('imported:', *sorted(set(sys.modules) & set({heavy})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--max-new-tokens" in result.stdout
    assert result.stdout.splitlines()[-1] == "imported:"


def test_a_character_that_is_not_known_is_said_with_its_file(model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("§" * 9, encoding="utf-8")
    words = lines(tmp_path / "words.jsonl", {"text": f"{TEXT} a"}, {"text": "§ a"})
    choices = lines(tmp_path / "items.jsonl", {"context": "§", "endings": ["a", "b"], "label": 0})
    for command, path, place in (
        ("perplexity", str(text), ""),
        ("last-word", words, ", line 2"),
        ("multiple-choice", choices, ", line 1"),
    ):
        with pytest.raises(UserError, match=f"^{path}{place}: the character '§' in '§"):
            evaluate.main([command, "--model", model, "--data", path])


def test_a_model_s_folder_takes_no_records(model: str, tmp_path: Path) -> None:
    before = sorted(Path(model).iterdir())
    words = lines(tmp_path / "words.jsonl", {"text": TEXT})
    with pytest.raises(UserError, match=f"^{model} holds a model: choose another --out"):
        evaluate.main(["last-word", "--model", model, "--data", words, "--out", model])
    assert sorted(Path(model).iterdir()) == before


def test_the_folder_of_a_run_that_has_begun_takes_no_records(model: str, tmp_path: Path) -> None:
    words, out = lines(tmp_path / "words.jsonl", {"text": TEXT}), tmp_path / "out"
    out.mkdir()
    (out / "settings.toml").write_text(RUN_FLAGS_BEGIN)
    with pytest.raises(UserError, match=f"^{out} is where a run has begun: choose another --out"):
        evaluate.main(["last-word", "--model", model, "--data", words, "--out", str(out)])
    assert [path.name for path in out.iterdir()] == ["settings.toml"]
    (out / "settings.toml").write_text("of = 'another program'")
    assert evaluate.main(["last-word", "--model", model, "--data", words, "--out", str(out)]) == 0


def test_token_shards_are_no_text(model: str, tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(range(256)))
    for data in (tmp_path, tmp_path / "val.bin"):
        with pytest.raises(UserError, match=f"^{data} holds token shards, .*: give the text that"):
            evaluate.main(["perplexity", "--model", model, "--data", str(data)])
    (tmp_path / "input.txt").write_text(TEXT)  # as nanoGPT has it beside its shards
    assert evaluate.main(["perplexity", "--model", model, "--data", str(tmp_path)]) == 0
    ours = tmp_path / "ours"
    write_shard(ours / "tokens_000000.bin", [np.arange(9)])
    shards = [{"file": "tokens_000000.bin", "tokens": 9}]
    manifest = {"format": FORMAT, "tokenizer": {"tokenizer": "byte"}, "shards": shards}
    (ours / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"^{ours} holds token shards, .*: give the text that"):
        evaluate.main(["perplexity", "--model", model, "--data", str(ours)])


def test_that_nothing_is_drawn_is_said(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each time: the folder goes on."""
    questions = lines(tmp_path / "questions", {"prompt": "the"}, {"prompt": "a"})
    flags = ["generate", "--model", model, "--data", questions, "--out", str(tmp_path / "out")]
    flags += ["--max-new-tokens", "2", "--top-p", "0.9", "--seed", "5"]
    for _ in range(2):
        assert evaluate.main(flags) == 0
        note = "note: --top-p and --seed: no effect at temperature 0, where nothing is drawn\n"
        assert note in capsys.readouterr().err
    flags[flags.index("--out") + 1] += "_drawn"
    evaluate.main([*flags, "--temperature", "0.5"])
    assert "no effect" not in capsys.readouterr().err


def test_a_text_may_have_any_name(model: str, tmp_path: Path) -> None:
    data = tmp_path / "text.bin"
    flags = ["perplexity", "--model", model, "--data", str(data)]
    for encoding in ("utf-8", "utf-16"):
        data.write_text(TEXT, encoding=encoding)
        assert evaluate.main(flags) == 0
    data.write_text(f"{TEXT}\x07a\x08b")  # as a terminal's log has them
    with pytest.raises(UserError, match=r"the character '\\x07' in '.*\\x07a"):
        evaluate.main(flags)
    data.write_text(f"{TEXT} café.", encoding="latin-1")
    with pytest.raises(UserError, match=r"byte 0xe9 at offset .*; give its encoding with --enc"):
        evaluate.main(flags)
    with pytest.raises(UserError, match=r"the character 'é' in '.*é"):
        evaluate.main([*flags, "--encoding", "latin-1"])
    np.arange(600, dtype="<u2").tofile(data)
    with pytest.raises(UserError, match="holds token shards"):
        evaluate.main([*flags, "--encoding", "latin-1"])


def test_an_empty_file_has_nothing_to_evaluate(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt contains no text: give a file with some$"):
        evaluate.main(["perplexity", "--model", model, "--data", str(tmp_path / "empty.txt")])
