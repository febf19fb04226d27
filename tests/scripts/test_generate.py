"""generate.py as its users meet it: text out, one-line errors, pipes, Ctrl-C, a terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training
from small_gpt2 import TEXT, interrupt_after, make_model, save_model

from micrograd_gpt.generation.output import SEPARATOR
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from micrograd_gpt.tuning.lora import add_lora, lora_layers
from micrograd_gpt.weights.pretrained import from_pretrained
from micrograd_gpt.weights.saving import save_pretrained

SCRIPT = Path(__file__).parents[2] / "generate.py"
generate = training.script("generate")


@pytest.fixture(scope="module")
def char_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("char"), CharTokenizer.from_text(TEXT))


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("byte"), ByteTokenizer())


@pytest.fixture(scope="module")
def tuned_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with the template that tuning on instructions leaves beside it."""
    folder = save_model(tmp_path_factory.mktemp("tuned"), ByteTokenizer())
    save_template(Template("{instruction}|\n\n{input}|\n\n={output}"), folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """stdout of the script, run here."""
    capsys.readouterr()
    assert generate.main(list(argv)) == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capsys, *argv, "--json").splitlines()]


def start(*argv: str, **more: Any) -> subprocess.Popen[bytes]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, str(SCRIPT), *argv], **pipes | more)


# ------------------------------------------------------------------------------------------- text


def test_an_adapter_s_folder_is_a_model(
    char_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text is that of its base with the adapter folded in, and not its base's."""
    model = from_pretrained(GPT2, char_model)
    add_lora(model, rank=2, base=char_model)
    for layer in lora_layers(model).values():
        layer.lora_B.data = layer.lora_B.data + 1
    model.save_pretrained(tmp_path)
    argv = ("--prompt", "the ", "--greedy", "--max-new-tokens", "20")
    letters = load_tokenizer(char_model)
    expected = model.generate(letters.encode("the ")[None], max_new_tokens=20, temperature=0)
    out = run(capsys, "--model", str(tmp_path), *argv)
    assert out == letters.decode(np.ravel(expected)) + "\n"
    assert out != run(capsys, "--model", char_model, *argv)


def test_prompt_then_text(char_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--model", char_model, "--prompt", "the ", "--max-new-tokens", "50")
    assert out.startswith("the ") and out.endswith("\n")
    assert len(out.removesuffix("\n")) in (53, 54)  # a last line end is not doubled
    again = run(capsys, "--model", char_model, "--prompt", "the ", "--max-new-tokens", "50")
    other = run(capsys, "--model", char_model, "--prompt", "the ", "--seed", "1")
    assert out == again and out != other[: len(out)]


def test_samples_are_shown_one_after_another(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--prompt", "dog", "--max-new-tokens", "20"]
    out = run(capsys, *flags, "--num-samples", "3")
    samples = out.split(SEPARATOR + "\n")
    assert len(samples) == 3 and all(sample.startswith("dog") for sample in samples)
    assert samples[0] == run(capsys, *flags)
    texts = [entry["text"] for entry in run_json(capsys, *flags, "--num-samples", "3")]
    shown = [sample.removeprefix("dog").removesuffix("\n") for sample in samples]
    assert shown == [text.removesuffix("\n") for text in texts]


def test_json(char_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "30"]
    first, second = run_json(capsys, *flags, "--num-samples", "2")
    assert first.keys() == {
        "prompt",
        "text",
        "token_ids",
        "log_probs",
        "stopped",
        "tokens_per_second",
    }
    assert (first["prompt"], first["stopped"]) == ("the ", "length")
    assert first["text"] == CharTokenizer.from_text(TEXT).decode(first["token_ids"])
    assert first["text"] != second["text"]
    assert len(first["log_probs"]) == 30 and max(first["log_probs"]) <= 0
    assert first["tokens_per_second"] > 0


@pytest.mark.parametrize(
    "flags", [["--no-kv-cache"], ["--speculate", "prompt-lookup"], ["--dtype", "float64"]]
)
@pytest.mark.parametrize("mode", [["--greedy"], ["--temperature", "1.2", "--top-p", "0.9"]])
def test_speed_flags_do_not_change_the_text(
    char_model: str, capsys: pytest.CaptureFixture[str], flags: list[str], mode: list[str]
) -> None:
    flags = ["--model", char_model, "--prompt", "the ", *mode, *flags]
    assert run(capsys, *flags) == run(capsys, *flags[: 4 + len(mode)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--greedy", "--top-p", "1", "--min-p", "0.1"], "--top-p and --min-p: no effect at temp"),
        (["--temperature", "0", "--top-k", "5"], "--top-k: no effect at temperature 0"),
        (["--greedy", "--seed", "4"], "--seed: no effect at temperature 0"),
        (["--num-beams", "2", "--seed", "4"], "--seed: no effect in beam search, where nothing"),
        (["--greedy"], None),
        (["--num-beams", "2"], None),
        (["--top-k", "5", "--seed", "4"], None),
    ],
)
def test_that_nothing_is_drawn_is_said(
    char_model: str, capsys: pytest.CaptureFixture[str], flags: list[str], said: str | None
) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "2", *flags]
    assert generate.main(flags) == 0
    err = capsys.readouterr().err
    assert (f"note: {said}" in err) if said else ("no effect" not in err)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights_write_what_they_write_without_a_cache(
    char_model: str, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    """The small model's likeliest tokens are far enough apart for roundings not to matter."""
    flags = ["--model", char_model, "--prompt", "the ", "--greedy", "--dtype", dtype]
    text = run(capsys, *flags)
    assert text == run(capsys, *flags, "--no-kv-cache")
    assert text.startswith("the ") and len(text) > 100


def test_stop_texts(char_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "60"]
    (whole,) = run_json(capsys, *flags)
    stop = whole["text"][20:23]
    (stopped,) = run_json(capsys, *flags, "--stop", stop, "--stop", "never said")
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert stopped["stopped"] == "stop"
    assert stopped["token_ids"] == whole["token_ids"][: len(stopped["text"]) + 3]
    out = run(capsys, *flags, "--stop", stop)
    assert out.removesuffix("\n") == "the " + stopped["text"].removesuffix("\n")


def test_a_stop_text_ends_its_own_sample_only(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--num-samples", "3"]
    whole = run_json(capsys, *flags)
    stop = whole[1]["text"][5:9]
    cut = run_json(capsys, *flags, "--stop", stop)
    for before, after in zip(whole, cut, strict=True):
        assert after["text"] == before["text"].partition(stop)[0]
        assert (after["stopped"] == "stop") == (stop in before["text"])


def test_end_of_text(byte_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", byte_model, "--prompt", "a", "--temperature", "3", "--top-k", "0"]
    flags += ["--num-samples", "16", "--max-new-tokens", "300"]
    ended = [entry for entry in run_json(capsys, *flags) if entry["stopped"] == "end-of-text"]
    assert ended
    for entry in ended:
        assert entry["token_ids"].index(256) == len(entry["token_ids"]) - 1
        assert "<|endoftext|>" not in entry["text"]
    ignoring = run_json(capsys, *flags, "--ignore-eos")
    assert {entry["stopped"] for entry in ignoring} == {"length"}
    assert any("<|endoftext|>" in entry["text"] for entry in ignoring)


def test_beams(char_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "12"]
    beams = run_json(capsys, *flags, "--num-beams", "4", "--num-samples", "3")
    assert len({beam["text"] for beam in beams}) == 3
    scores = [sum(beam["log_probs"]) for beam in beams]
    assert scores == sorted(scores, reverse=True)
    (greedy,) = run_json(capsys, *flags, "--greedy")
    assert scores[0] >= sum(greedy["log_probs"]) - 1e-5  # a rounding apart, if they agree
    stop = beams[0]["text"][4:6]
    (stopped, *_) = run_json(capsys, *flags, "--num-beams", "4", "--stop", stop)
    assert stop not in stopped["text"]


def test_a_stop_text_ends_a_beam_search_early(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--num-beams", "2"]
    flags += ["--max-new-tokens", "25"]
    (whole,) = run_json(capsys, *flags)
    (beam,) = run_json(capsys, *flags, "--stop", whole["text"][2:4], "--early-stopping")
    assert beam["stopped"] == "stop" and whole["text"][2:4] not in beam["text"]
    assert len(beam["token_ids"]) < 25


def test_a_text_with_no_token_left_ends_with_a_note(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--no-repeat-ngram-size", "1"]
    samples = run_json(capsys, *flags, "--top-k", "0", "--num-samples", "2")
    assert [s["stopped"] for s in samples] == ["no token left"] * 2
    assert {len(s["token_ids"]) for s in samples} == {25}  # 29 characters but for t, h, e, space
    for more in ([], ["--num-beams", "2"]):
        assert generate.main([*flags, *more]) == 0
        assert "every token would repeat" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_text(
    char_model: str, byte_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (char_model, byte_model):
        assert run(capsys, "--model", model, "--prompt", "")


def test_the_default_model(
    char_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(char_model).parent)
    Path(char_model).rename("out")
    try:
        generate.main(["--prompt", "the "])
        assert "using out" in capsys.readouterr().err
    finally:
        Path("out").rename(char_model)
    asked = []

    def offline(name: str) -> None:
        asked.append(name)
        raise UserError("no network")

    monkeypatch.setattr("micrograd_gpt.weights.names.open_model", offline)
    with pytest.raises(UserError, match=r"no network; or train a model first: python train_gpt2"):
        generate.main(["--prompt", "the "])
    assert asked == ["124M"] and "using 124M" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no network$"):
        generate.main(["--prompt", "the ", "--model", "124M"])


# ----------------------------------------------------------------------------------- instructions


def test_an_instruction_is_answered_through_the_saved_template(
    tuned_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", tuned_model, "--max-new-tokens", "20", "--instruction"]
    (answer,) = run_json(capsys, *flags, "add", "--input", "1 2")
    assert answer["prompt"] == "add|\n\n1 2|\n\n="
    (prompted,) = run_json(capsys, *flags[:4], "--prompt", "add|\n\n1 2|\n\n=")
    assert answer["token_ids"] == prompted["token_ids"]
    alone = run(capsys, *flags, "add", "--input", "1 2")
    assert alone.removesuffix("\n") == answer["text"].removesuffix("\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"add\n")))
    assert run_json(capsys, *flags, "-")[0]["prompt"] == "add|\n\n="


def test_an_answer_ends_with_end_of_text(
    tuned_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", tuned_model, "--instruction", "a", "--temperature", "3", "--top-k", "0"]
    flags += ["--num-samples", "16", "--max-new-tokens", "300"]
    ended = [answer for answer in run_json(capsys, *flags) if answer["stopped"] == "end-of-text"]
    assert ended
    answers = run(capsys, *flags).split(SEPARATOR + "\n")
    assert any(answer.removesuffix("\n") == ended[0]["text"] for answer in answers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instruction", "a"], r"was not tuned on instructions \(no prompt_template.txt\): give"),
        (["--prompt", "a", "--input", "b"], "--input is for an --instruction"),
        (["--instruction", "a", "--prompt", "b"], "not allowed with argument --instruction"),
    ],
)
def test_instructions_are_for_tuned_models(char_model: str, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate.main(["--model", char_model, *flags])
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- many prompts


def test_prompts_are_decoded_as_a_batch_and_come_in_order(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--max-new-tokens", "12"]
    prompts = ["the ", "dog", "quick fox "]
    alone = [run_json(capsys, *flags, "--prompt", prompt)[0] for prompt in prompts]
    for size in ("1", "2", "16"):
        many = [word for prompt in prompts for word in ("--prompt", prompt)]
        together = run_json(capsys, *flags, *many, "--batch-size", size)
        assert [(e["prompt"], e["text"]) for e in together] == [
            (e["prompt"], e["text"]) for e in alone
        ]
    text = run(capsys, *flags, *many).split(SEPARATOR + "\n")
    expected = [(e["prompt"] + e["text"]).removesuffix("\n") for e in alone]
    assert [shown.removesuffix("\n") for shown in text] == expected


def test_each_prompt_has_its_samples_and_beams(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--max-new-tokens", "8", "--prompt", "the ", "--prompt", "dog"]
    flags += ["--num-samples", "2"]
    for how in ([], ["--batch-size", "1"], ["--num-beams", "3"]):
        found = run_json(capsys, *flags, *how)
        assert [entry["prompt"] for entry in found] == ["the ", "the ", "dog", "dog"]
        assert found[0]["text"] != found[1]["text"]
    (first, again) = run_json(
        capsys, "--model", char_model, *("--prompt", "the ") * 2, "--batch-size", "1"
    )
    assert first["text"] != again["text"]  # equal prompts do not get equal texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffthe \r\n\r\ndog\r\n"),
        ("a.jsonl", '{"id": 3, "prompt": "the "}\n{"prompt": "dog"}\n'),
        ("a.csv", "id,prompt\n1,the \n2,dog\n"),
    ],
)
def test_a_file_of_prompts(
    name: str,
    content: str,
    char_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    flags = ["--model", char_model, "--max-new-tokens", "5", "--prompts"]
    assert [e["prompt"] for e in run_json(capsys, *flags, str(path))] == ["the ", "dog"]
    if name == "a.txt":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert [e["prompt"] for e in run_json(capsys, *flags, "-")] == ["the ", "dog"]


def test_a_pipe_is_one_prompt_of_any_number_of_lines(
    byte_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfOne\nTwo\n")))
    (entry,) = run_json(capsys, "--model", byte_model, "--max-new-tokens", "5")
    assert entry["prompt"] == "One\nTwo"


def test_a_prompt_of_windows_is_read_as_a_text_to_train_on(
    monkeypatch: pytest.MonkeyPatch, char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for content in (b"the\r\ndog\r\n", b"the\ndog\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        found.append(run(capsys, "--model", char_model, "--seed", "0").replace("\r", ""))
    assert found[0] == found[1]


def test_a_tuned_model_that_continues_a_text_says_what_would_have_it_answered(
    tuned_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "add", "input": "b"}\n')
    flags = ["--model", tuned_model, "--max-new-tokens", "1"]
    prompts = ["--prompts", str(tmp_path / "a.jsonl")]
    with pytest.raises(UserError, match="have them answered with evaluate"):
        generate.main([*flags, *prompts])
    for given in ([*prompts, "--text-field", "instruction"], ["--prompt", "add"]):
        capsys.readouterr()
        assert generate.main([*flags, *given]) == 0
        assert "is continued without their template: --instruction" in capsys.readouterr().err


def test_instructions_can_be_repeated(tuned_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", tuned_model, "--max-new-tokens", "9", "--instruction", "add"]
    flags += ["--instruction", "b"]
    assert [e["prompt"] for e in run_json(capsys, *flags)] == ["add|\n\n=", "b|\n\n="]
    shown = run(capsys, *flags)
    assert shown.count(SEPARATOR) == 1 and not shown.startswith(SEPARATOR)


def test_a_special_token_in_a_prompt_is_recognized_on_request(
    byte_model: str, char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", byte_model, "--greedy", "--max-new-tokens", "20", "--prompt"]
    (asked,) = run_json(capsys, *flags, "<|endoftext|>", "--special-tokens")
    (plain,) = run_json(capsys, *flags, "<|endoftext|>")
    (empty,) = run_json(capsys, *flags, "")  # which starts after end-of-text
    assert asked["token_ids"] == empty["token_ids"] != plain["token_ids"]
    with pytest.raises(UserError, match="the char tokenizer has no special tokens"):
        generate.main(["--model", char_model, "--prompt", "a", "--special-tokens"])


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be 0"),
        (["--temperature", "hot"], "must be a number, not 'hot'"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--top-p", "1.5"], "top_p must be above 0"),
        (["--num-beams", "4", "--temperature", "0.7"], "beam search takes no"),
        (["--num-beams", "4", "--top-k", "5"], "beam search takes no"),
        (["--num-beams", "2", "--num-samples", "3"], "num_samples is above num_beams"),
        (["--num-samples", "100000000"], "about [0-9,.]+ GB.*: lower --num-samples"),
        (["--num-beams", "2", "--speculate", "prompt-lookup"], "cannot speculate"),
        (["--length-penalty", "2"], "length_penalty is for"),
        (["--greedy", "--temperature", "0.7"], "--greedy and --temperature contradict"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1"),
        (["--temperature", "1e-320"], "temperature must be 0"),
        (["--repetition-penalty", "1e-320"], "repetition_penalty must be"),
        (["--stop", ""], "--stop: must not be empty"),
        (["--stop", "---"], "--stop: expected one argument .* dash is given as --stop=-"),
        (["--stop"], "--stop: expected one argument; see --help$"),
        (["--num-beams", "2", "--length", "5"], "--length: did you mean --max-new-tokens"),
        (["--dtype", "float8"], "invalid choice"),
        (["--dtype", "int8", "--device", "gpu"], "int8 is for the CPU"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--prompt", "über"], "'ü' in 'über'"),
        (["--prompt", os.fsdecode(b"\xff")], "surrogate"),
        (["extra"], "unrecognized arguments: extra"),
        (["--prompt", "über"], "^prompt 2: the character 'ü'"),
        (["--prompt", "-", "--prompt", "-"], "can be given only once"),
        (["--prompts", "x"], "not allowed with argument --prompt"),
        (["--text-field", "x"], "--text-field is for a file of --prompts"),
        (["--encoding", "x"], "--encoding is for a file of --prompts"),
    ],
)
def test_a_mistake_is_one_line(char_model: str, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate.main(["--model", char_model, "--prompt", "the ", *flags])
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts(char_model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    (tmp_path / "a.jsonl").write_text('{"text": "the "}\n')
    (tmp_path / "c.txt").write_bytes(b"a\xff")
    (tmp_path / "c.csv").write_text("prompt,n\n")
    for name, message in (
        ("a.txt", "a.txt holds no prompts: write one a line"),
        ("a.jsonl", "line 1 has no 'prompt', only 'text': .* --text-field"),
        ("b.txt", "cannot read .*b.txt"),
        ("c.txt", "c.txt is not UTF-8 text: byte 0xff at offset 1; give its encoding with --enc"),
        ("c.csv", "c.csv holds no prompts"),
    ):
        with pytest.raises(UserError, match=message):
            generate.main(["--model", char_model, "--prompts", str(tmp_path / name)])


def test_a_piped_prompt_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch, char_model: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff")))
    with pytest.raises(UserError, match="byte 0xff at offset 4"):
        generate.main(["--model", char_model])


def test_piped_prompts_in_another_encoding(
    monkeypatch: pytest.MonkeyPatch, byte_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", byte_model, "--prompts", "-", "--max-new-tokens", "1", "--encoding"]

    def pipe() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))

    pipe()
    assert [row["prompt"] for row in run_json(capsys, *flags, "latin-1")] == ["café"]
    pipe()
    with pytest.raises(UserError, match="'klingon' is not a text encoding"):
        generate.main([*flags, "klingon"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no paths of pipes")
@pytest.mark.parametrize("source", ["-", "/dev/fd/{}"])
def test_piped_records_are_prompts(
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    byte_model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model", byte_model, "--max-new-tokens", "1", "--json", "--prompts"]
    two = '{"prompt": "a\\n1"}\n{"prompt": "b"}\n'
    for text, field, prompts, is_noted in (
        (two, None, ["a\n1", "b"], False),
        (two.replace("prompt", "body"), "body", ["a\n1", "b"], False),
        (two, "body", two.split("\n")[:2], True),
        ("a\r\n\nb\n", None, ["a", "b"], False),
        ("a\nb\n", "body", ["a", "b"], True),
        ('{"body": "a"}\n', None, ['{"body": "a"}'], True),
    ):
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        with open(read) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            asked = [] if field is None else ["--text-field", field]
            assert generate.main([*flags, source.format(read), *asked]) == 0
        out, err = capsys.readouterr()
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts
        assert ("is read as it stands, not as records" in err) == is_noted


def test_a_batch_of_one_is_what_one_prompt_is(
    char_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--seed", "1"]
    assert run(capsys, *flags, "--batch-size", "1") == run(capsys, *flags)


def test_closed_streams(monkeypatch: pytest.MonkeyPatch, char_model: str) -> None:
    """As the shell's `<&-` and `>&-` leave them."""
    monkeypatch.setattr(sys, "stdin", None)
    for flags in ([], ["--prompt", "-"]):
        with pytest.raises(UserError, match="stdin is closed: give the text with --prompt"):
            generate.main(["--model", char_model, *flags])
    assert generate.main(["--model", char_model, "--prompt", "the "]) == 0
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UserError, match="stdout is closed"):
        generate.main(["--model", char_model, "--prompt", "the "])


def test_a_closed_stdout_loses_no_text(char_model: str) -> None:
    """Also in the script, which opens streams that the shell closed."""
    script = [sys.executable, str(SCRIPT), "--model", char_model, "--prompt", "the "]
    shell = ["sh", "-c", '"$@" >&-', "sh", *script]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: stdout is closed: send it to a")


def test_words_that_the_model_cannot_see_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path, WordTokenizer.from_text("the fox " * 9))
    flags = ["--model", model, "--max-new-tokens", "1"]
    for prompts, said in (
        (["the fox"], ""),
        (["the zebra"], "note: the prompt has words that the tokenizer does not know"),
        (["the zebra", "the fox"], "note: 1 prompt with words that the tokenizer does not know"),
    ):
        generate.main([*flags, *(word for prompt in prompts for word in ("--prompt", prompt))])
        err = capsys.readouterr().err
        assert err.startswith(said) if said else err == ""


def test_padding_of_the_vocabulary_is_never_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    size = tokenizer.vocab_size
    model = make_model(0, 8, n_layer=1, vocab_size=size + 20, n_positions=32)
    model.transformer.wte.weight.data[size:] *= 3  # so that the model prefers these
    save_pretrained(model, tmp_path, tokenizer)
    flags = ["--model", str(tmp_path), "--prompt", "the ", "--max-new-tokens", "30"]
    for how in (["--greedy"], ["--num-samples", "3"], ["--num-beams", "3"]):
        for sample in run_json(capsys, *flags, *how):
            ids = sample["token_ids"]
            assert len(ids) == 30 and max(ids) < size
    assert max(model.eval().generate(tokenizer.encode("the "), max_new_tokens=30)) >= size


def test_a_tokenizer_of_another_model(char_model: str, tmp_path: Path) -> None:
    for file in Path(char_model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    CharTokenizer("abc").save(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 3 tokens and the model 29"):
        generate.main(["--model", str(tmp_path), "--prompt", "a"])


# ------------------------------------------------------------------------------- as a process


def test_pipes(char_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = run(capsys, "--model", char_model, "--prompt", "dog")
    with start("--model", char_model) as process:
        out, _ = process.communicate(b"dog\n", timeout=60)
    assert (process.returncode, out.decode()) == (0, expected)


def test_a_mistake_is_exit_status_2() -> None:
    with start("--prompt", "a", "--top-p", "2") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert err == b"error: top_p must be above 0, and 1 at most, not 2.0\n"


def test_a_closed_pipe_ends_quietly(char_model: str) -> None:
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "1000000"]
    with start(*flags) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read().startswith(b"note: ")


def test_nobody_has_to_read_the_notes(char_model: str) -> None:
    unread, stderr = os.pipe()
    os.close(unread)
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "40"]
    with start(*flags, stderr=stderr) as process:
        os.close(stderr)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith(b"the ") and len(out) > 40


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to a process")
@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_ends_with_what_was_decided(byte_model: str, count: int) -> None:
    flags = ["--model", byte_model, "--prompt", "the ", "--max-new-tokens", "1000000"]
    with start(*flags, "--ignore-eos", "--num-samples", str(count)) as process:
        assert process.stdout is not None
        head = process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    text = (head + out).decode("utf-8")  # raises on half a character
    assert process.returncode == 130 and b"Traceback" not in err
    samples = text.split(SEPARATOR + "\n")
    assert len(samples) == count and all(sample.startswith("the ") for sample in samples)
    assert text.endswith("\n")


def test_ctrl_c_with_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], char_model: str
) -> None:
    interrupt_after(7, monkeypatch)
    flags = ["--model", char_model, "--prompt", "the ", "--num-samples", "2", "--json"]
    flags += ["--max-new-tokens", "4"]
    assert generate.main(flags) == 130
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(s["stopped"], len(s["text"])) for s in samples] == [
        ("length", 4),
        ("interrupted", 3),
    ]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("tiktoken", "huggingface_hub", "matplotlib", "cupy", "safetensors", "tqdm")
    code = (
        "import sys, generate\n"
        "try: generate.main(['--help'])\n"
        f"finally: print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert done.stderr.strip() == "" and "--temperature" in done.stdout


def test_help_says_the_scripts_own_defaults_and_why() -> None:
    text = " ".join(generate.make_parser().format_help().split())
    for default in ("200, a paragraph", "0.8, to keep", "40, as for the samples in GPT-2's paper"):
        assert f"(default: {default}" in text


# ------------------------------------------------------------------------------- on a terminal


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_real_terminal(char_model: str) -> None:
    """History: the arrow up brings the last line back."""
    import pty

    ours, theirs = pty.openpty()
    flags = ["--model", char_model, "--greedy", "--max-new-tokens", "20"]
    with start(*flags, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)

        def until(text: bytes) -> bytes:
            seen = b""
            while text not in seen:
                seen += os.read(ours, 1000)
            return seen

        until(b"> ")
        os.write(ours, b"fox\n")
        first = until(b"\r\n> ")
        os.write(ours, b"\x1b[A\n")
        second = until(b"\r\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(ours)
    said = [seen.split(b"\r\n", 1)[1] for seen in (first, second)]  # what follows the echo
    assert said[0] == said[1]
    assert said[0].removeprefix(b"\x1b[?2004l\r").startswith(b"fox")


def test_greedy_is_numpys_argmax(char_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = from_pretrained(GPT2, char_model)
    ids = CharTokenizer.from_text(TEXT).encode("the ").tolist()
    for _ in range(20):
        ids.append(int(np.argmax(model(np.array([ids])).numpy()[0, -1])))
    flags = ["--model", char_model, "--prompt", "the ", "--max-new-tokens", "20", "--greedy"]
    (entry,) = run_json(capsys, *flags)
    assert entry["token_ids"] == ids[4:]
