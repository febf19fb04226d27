"""Evaluations live against their peers: lm-evaluation-harness with its own `--model hf`, and
Transformers' guide on the perplexity of fixed-length models. No task is fetched: items and texts
are made here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model
from training import script

from micrograd_gpt.evaluation.detokenize import wikitext
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.weights.saving import save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

POSITIONS = 48
WORDS = ["the", "dog", "cat", "list", "object", "returns", "raises", "error", "print", "and then"]
evaluate_gpt2 = script("evaluate_gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with GPT-2's tokenizer, whose weights have clear favourites."""
    folder = tmp_path_factory.mktemp("model")
    model = make_model(factor=8, vocab_size=50257, n_positions=POSITIONS)
    save_pretrained(model, folder, GPT2Tokenizer())
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


def adapter(folder: Path, **how: Any) -> Any:
    from micrograd_gpt.evaluation.harness import MicrogradGPT

    return MicrogradGPT(str(folder), **how)


def sentence(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))


def choices(count: int) -> list[dict[str, Any]]:
    """Items with contexts that end in spaces, that are empty, and that are too long."""
    rng = np.random.default_rng(0)
    contexts = [sentence(rng, 1, 20) for _ in range(count - 3)]
    contexts += ["", sentence(rng, 3, 5) + "  ", sentence(rng, POSITIONS, POSITIONS + 9)]
    return [
        {
            "context": context,
            "endings": [sentence(rng, 1, 9) for _ in range(rng.integers(2, 5))],
            "label": 1,
        }
        for context in contexts
    ]


def hellaswag(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "activity_label": sentence(rng, 1, 2),
            "ctx_a": f"{sentence(rng, 2, 6)} [title] {sentence(rng, 1, 3)}.",
            "ctx_b": sentence(rng, 1, 3),
            "endings": [f"{sentence(rng, 2, 5)} [step]  {sentence(rng, 1, 4)}" for _ in range(4)],
            "label": str(rng.integers(4)),
        }
        for _ in range(count)
    ]


def as_the_harness_reads(item: dict[str, Any]) -> dict[str, Any]:
    """An item of HellaSwag as the harness's own task has it."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    endings = [preprocess(ending) for ending in item["endings"]]
    return {"context": preprocess(context), "endings": endings, "label": int(item["label"])}


def piqa(count: int) -> list[dict[str, Any]]:
    """Items whose two solutions begin alike, as they often do."""
    rng = np.random.default_rng(2)
    items = []
    for _ in range(count):
        begun = sentence(rng, 2, 6)
        one, other = (f"{begun} {sentence(rng, 1, 3)}" for _ in range(2))
        items.append({"goal": sentence(rng, 2, 6), "sol1": one, "sol2": other, "label": 1})
    return items


def last_words(folder: Path) -> list[dict[str, Any]]:
    """Texts with words that a model would not say, and some that it would."""
    rng, own = np.random.default_rng(3), adapter(folder)
    texts = [sentence(rng, 2, 30) for _ in range(15)]
    for context in [sentence(rng, 2, 10) for _ in range(60)]:
        ids = own.encoder.encode(context)
        word = own.encoder.decode(own.model.generate(ids, max_new_tokens=1, temperature=0)[-1:])
        if word[:1] == " " and word[1:].isalpha():
            texts.append(context + word)
    return [{"text": text} for text in texts]


def task(name: str, data: Path, **more: Any) -> dict[str, Any]:
    """A task of the harness on a local file."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(data.parent / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{endings}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **more,
    }


PIQA = {"doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_choice": "{{[sol1, sol2]}}"}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "doc_to_choice": None,
    "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
}


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of items of each kind; "read" has those of "hellaswag" as the harness reads them."""
    swag = hellaswag(20)
    items = {
        "plain": choices(40),
        "hellaswag": swag,
        "read": [as_the_harness_reads(item) for item in swag],
        "piqa": piqa(20),
        "lambada": last_words(folder),
    }
    place, paths = tmp_path_factory.mktemp("data"), {}
    for name, objects in items.items():
        paths[name] = place / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(fields) + "\n" for fields in objects))
    return paths


def results(model: Any, tasks: list[dict[str, Any]], **how: Any) -> dict[str, dict[str, float]]:
    """What the harness finds, by task and metric."""
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, **how)["results"]
    return {
        name: {metric.split(",")[0]: value for metric, value in figures.items()}
        for name, figures in found.items()
    }


@pytest.fixture(scope="module")
def expected(theirs: Any, data: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What the harness finds with its own model, by the name of the file."""
    tasks = [
        task("plain", data["plain"]),
        task("hellaswag", data["read"]),
        task("piqa", data["piqa"], **PIQA),
        task("lambada", data["lambada"], **LAST_WORD),
    ]
    return results(theirs, tasks)


def evaluated(capsys: pytest.CaptureFixture[str], command: str, *flags: str) -> dict[str, Any]:
    """What the script reports, as JSON."""
    capsys.readouterr()
    assert evaluate_gpt2.main([command, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------ the script


@pytest.mark.parametrize("name", ["plain", "hellaswag", "piqa"])
def test_multiple_choice(
    folder: Path,
    data: dict[str, Path],
    expected: dict[str, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    flags = ["--model", str(folder), "--data", str(data[name])]
    ours = evaluated(capsys, "multiple-choice", *flags)
    assert ours["accuracy"] == pytest.approx(expected[name]["acc"])
    assert ours["accuracy_by_length"] == pytest.approx(expected[name]["acc_norm"])
    assert 0 < ours["accuracy"] < 1


def test_last_word(
    folder: Path,
    data: dict[str, Path],
    expected: dict[str, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model", str(folder), "--data", str(data["lambada"])]
    ours = evaluated(capsys, "last-word", *flags)
    theirs = expected["lambada"]
    assert 0.1 < ours["accuracy"] < 0.9
    assert ours["accuracy"] == pytest.approx(theirs["acc"])
    assert np.log(ours["perplexity"]) == pytest.approx(np.log(theirs["perplexity"]), rel=1e-5)


@pytest.mark.parametrize("stride", [4, 16, 40, POSITIONS - 1])
def test_perplexity_equals_the_guide_s_loop(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stride: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(sentence(np.random.default_rng(3), 110, 110) + ".\n\nThe end")
    flags = ["--model", str(folder), "--data", str(path), "--stride", str(stride)]
    ours = evaluated(capsys, "perplexity", *flags)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(path.read_text())])
    nats, count, right, scored = 0.0, 0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + POSITIONS, ids.shape[1])
        window, labels = ids[:, begin:end], ids[:, begin:end].clone()
        labels[:, : -(end - scored)] = -100
        with torch.no_grad():
            result = model(window, labels=labels)
        new = labels[0, 1:] != -100
        nats += float(result.loss) * int(new.sum())
        count += int(new.sum())
        right += int((result.logits[0, :-1].argmax(-1) == labels[0, 1:])[new].sum())
        scored = end
        if end == ids.shape[1]:
            break
    size = len(path.read_bytes())
    assert ours["tokens"] == count == ids.shape[1] - 1
    assert ours["nats_per_token"] == pytest.approx(nats / count, rel=1e-4)
    assert np.log(ours["perplexity"]) == pytest.approx(nats / count, rel=1e-4)
    assert ours["next_token_accuracy"] == pytest.approx(right / count)
    per_byte = nats / count * ids.shape[1] / size / np.log(2)
    assert ours["bits_per_byte"] == pytest.approx(per_byte, rel=1e-4)


def test_wikitext_is_detokenized_as_in_the_harness_s_task() -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    text = (
        " \n = Robert <unk> = \n \n Robert <unk> ( born 1 @,@ 980 ) is an actor , well @-@ known ;"
        " he said : \" so it is ! \" and the friends ' house cost 2 @.@ 5 [ sic ] 's { a } ? , . \n"
        " \n = = Career = = \n \n = = = 2000 – 2005 = = = \n at 5 ° C , the ' word ' it 's . \n"
        " = = = = end = = = = \n"
    )
    assert wikitext(text) == wikitext_detokenizer({"page": text})
    assert "(born 1,980)" in wikitext(text)


# ----------------------------------------------------------------------------------- the adapter


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_log_likelihoods_equal_hf_s(folder: Path, theirs: Any, batch_size: int) -> None:
    asked = [
        (item["context"], delimiter + ending)
        for item in choices(30)
        for ending in item["endings"]
        for delimiter in (" ", "\n")
    ]
    asked.append(("print", " " + "dog" * 40))  # as many tokens as the context has room for
    requests = instances("loglikelihood", asked)
    ours = adapter(folder, batch_size=batch_size).loglikelihood(requests, True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in expected], rtol=1e-5)


def test_rolling_log_likelihoods_equal_hf_s(folder: Path, theirs: Any) -> None:
    rng = np.random.default_rng(4)
    texts = [(sentence(rng, n, n),) for n in (1, 20, POSITIONS - 1, POSITIONS, POSITIONS + 1, 300)]
    requests = instances("loglikelihood_rolling", texts)
    ours = adapter(folder).loglikelihood_rolling(requests, True)
    np.testing.assert_allclose(ours, theirs.loglikelihood_rolling(requests, True), rtol=1e-5)


def test_generation_equals_hf_s(folder: Path, theirs: Any) -> None:
    rng = np.random.default_rng(5)
    contexts = [sentence(rng, n, n) for n in (1, 4, 4, 9, 15, 60)]
    how: list[dict[str, Any]] = [
        {"max_gen_toks": 12},
        {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
    ]
    requests = instances("generate_until", [(c, dict(h)) for c in contexts for h in how])
    own = adapter(folder)
    whole = own.generate_until(requests, True)
    assert whole == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(whole)) > 6
    stop = next(text[3:6] for text in whole if text[3:6].isascii())
    asked = [(c, {"until": [stop, "never"], "max_gen_toks": 20}) for c in contexts]
    stopped = instances("generate_until", asked)
    ours = own.generate_until(stopped, True)
    assert ours == theirs.generate_until(stopped, disable_tqdm=True)
    assert any(text != begun for text, begun in zip(ours, whole[1::2], strict=True))


@pytest.mark.parametrize("template", [Template(), Template("Q: {instruction}\nA:{output}")])
def test_a_chat_equals_hf_s(folder: Path, tmp_path: Path, template: Template) -> None:
    from lm_eval.models.huggingface import HFLM

    chatty = shutil.copytree(folder, tmp_path / "chatty")
    save_template(template, chatty)
    own, hf = adapter(chatty), HFLM(pretrained=str(chatty), dtype="float32", device="cpu")
    assert own.tokenizer_name == hf.tokenizer_name
    assert own.chat_template(True) == hf.chat_template(True)
    messages = [
        {"role": role, "content": f"Of {role}: {sentence(np.random.default_rng(i), 1, 3)}."}
        for i, role in enumerate(["system", "user", "assistant", "user", "assistant"])
    ]
    contexts = []
    for chat, ends in ((messages[:2], True), (messages[1:4], True), (messages, False)):
        contexts.append(own.apply_chat_template(chat, ends))
        assert contexts[-1] == hf.apply_chat_template(chat, ends)
    asked = instances("loglikelihood", [(context, " print me") for context in contexts])
    found = [log_prob for log_prob, _ in own.loglikelihood(asked, True)]
    expected = [log_prob for log_prob, _ in hf.loglikelihood(asked, disable_tqdm=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    asked = instances("generate_until", [(context, {"max_gen_toks": 9}) for context in contexts])
    assert own.generate_until(asked, True) == hf.generate_until(asked, disable_tqdm=True)
    with pytest.raises(UserError, match="has no template of instructions: leave --apply"):
        adapter(folder).apply_chat_template(messages)
    with pytest.raises(
        UserError, match="there is no chat template 'rag': give --apply_chat_template alone"
    ):
        own.chat_template("rag")


def test_the_harness_evaluates_by_name(
    folder: Path, data: dict[str, Path], expected: dict[str, dict[str, float]]
) -> None:
    import micrograd_gpt.evaluation.harness  # which registers the name  # noqa: F401

    model_args = f"pretrained={folder},dtype=float32"
    tasks = [task("plain", data["plain"])]
    for more in ({}, {"batch_size": "auto:4"}):
        found = results("micrograd-gpt", tasks, model_args=model_args, device="cuda:0", **more)
        for metric in ("acc", "acc_norm"):
            assert found["plain"][metric] == pytest.approx(expected["plain"][metric])


def test_an_argument_that_would_change_nothing_is_refused(folder: Path) -> None:
    from micrograd_gpt.evaluation.harness import MicrogradGPT

    by_the_harness = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    for more, problem in {
        "peft=li": "'peft': give the adapter's folder as pretrained=$",
        "max_length=9,foo=1": "'foo', 'max_length': leave it out$",
        "tokenizer=gpt2": "'tokenizer': leave it out$",
    }.items():
        with pytest.raises(UserError, match=f"^unknown model_args: {problem}"):
            MicrogradGPT.create_from_arg_string(f"pretrained={folder},{more}", by_the_harness)
    adapter(folder, max_batch_size=8, trust_remote_code=True)


def test_the_harness_keeps_its_own_models(folder: Path) -> None:
    """A process of its own: it registers them once."""
    ask = "from lm_eval.api.registry import get_model; print(get_model('dummy').__name__)"
    ours = "import micrograd_gpt.evaluation.harness"
    done = subprocess.run([sys.executable, "-c", f"{ours}; {ask}"], capture_output=True, text=True)
    assert done.stdout == "DummyLM\n", done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "micrograd-gpt"),
        (["--model", "hf"], "hf"),
        (["--model=hf"], "hf"),
        (["-M", "dummy"], "dummy"),
        (["-Mhf"], "hf"),
        (["--config", "other.yaml"], "micrograd-gpt"),
        (["--config", "dummy.yaml"], None),
        (["-C", "dummy.yaml", "--model", "hf"], "hf"),
    ],
)
def test_the_harness_s_command_line_has_our_model_unless_it_says_otherwise(
    flags: list[str], named: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lm_eval import __main__ as harness_s

    from micrograd_gpt.evaluation import harness

    asked = []
    monkeypatch.setattr(harness_s, "cli_evaluate", lambda: asked.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dummy.yaml").write_text("model: dummy")
    (tmp_path / "other.yaml").write_text("limit: 3")
    assert harness.main(["run", "--tasks", "x", *flags]) == 0
    words = [word.removeprefix("--model=").removeprefix("-M") for word in asked]
    assert [word for word in words if word in ("hf", "dummy", "micrograd-gpt")] == (
        [named] if named else []
    )


def test_a_model_that_is_not_named_is_the_trained_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from micrograd_gpt.evaluation.harness import MicrogradGPT

    (tmp_path / "out").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert MicrogradGPT().model.config.n_positions == POSITIONS
