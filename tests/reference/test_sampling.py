"""Decoding against Transformers', on a small GPT-2 trained on Python's manual.

Random weights would make flat distributions, on which greedy and beam search have an easy life.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import GenerationConfig, GPT2LMHeadModel  # noqa: E402
from transformers import GPT2Config as TheirConfig  # noqa: E402
from transformers.generation.logits_process import (  # noqa: E402
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from micrograd_gpt import optim  # noqa: E402
from micrograd_gpt.generation.sampling import generate, next_token_distribution  # noqa: E402
from micrograd_gpt.generation.settings import Settings  # noqa: E402
from micrograd_gpt.gpt2 import GPT2, GPT2Config  # noqa: E402
from micrograd_gpt.text.corpus import Corpus, load_corpus  # noqa: E402
from micrograd_gpt.text.windows import Windows  # noqa: E402
from micrograd_gpt.weights.config import config_json  # noqa: E402

NEW = 24  # tokens a continuation


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus("pydocs", "char")


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> GPT2:
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=64, vocab_size=corpus.tokenizer.vocab_size, n_positions=64
    )
    model = GPT2(config)
    optimizer = optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    windows = Windows(corpus.train, config.n_positions)
    for step in range(400):
        optimizer.lr = optim.cosine_schedule(step, 400, 40, 3e-3, 3e-4)
        loss = model.loss(*windows.batch(0, step, 16))
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 2.4  # it has learned something: a guess costs log(103) = 4.6
    model.eval()
    return model


@pytest.fixture(scope="module")
def theirs(model: GPT2) -> Iterator[Any]:
    twin = GPT2LMHeadModel(TheirConfig(**config_json(model.config, "float32")))
    weights = {name: torch.from_numpy(p.data) for name, p in model.named_parameters()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small would spend its time waking threads
    yield twin.eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts(corpus: Corpus) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(corpus.validation) - 64, 50)
    lengths = rng.integers(1, 64 - NEW, 50)
    return [
        corpus.validation[s : s + n].astype(np.int64) for s, n in zip(starts, lengths, strict=True)
    ]


def reference(theirs: Any, prompt: np.ndarray, end: int, **settings: Any) -> np.ndarray:
    ids = torch.from_numpy(prompt)[None]
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=end, **settings
    )
    with torch.no_grad():
        return theirs.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        ).numpy()


PENALTIES = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 4},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("penalties", PENALTIES)
def test_greedy_tokens(
    model: GPT2, theirs: Any, prompts: list[np.ndarray], corpus: Corpus, penalties: dict[str, Any]
) -> None:
    end = int(corpus.tokenizer.encode(".")[0])  # a token that does occur ends a text
    ours = generate(model, prompts, NEW, temperature=0, end_of_text=end, **penalties)
    for prompt, ids in zip(prompts, ours, strict=True):
        expected = reference(theirs, prompt, end, **penalties)[0]
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("penalties", PENALTIES[::2] + PENALTIES[-1:])
@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 5])
def test_beam_search_tokens(
    model: GPT2,
    theirs: Any,
    prompts: list[np.ndarray],
    corpus: Corpus,
    num_beams: int,
    penalties: dict[str, Any],
) -> None:
    ended_early = 0
    for i, prompt in enumerate(prompts):
        end = int(corpus.tokenizer.encode("e."[i % 2])[0])  # often, and now and then
        beams = {"num_beams": num_beams}
        if num_beams > 1:  # another length penalty, ending and number of returned beams each time
            beams["length_penalty"] = [1.0, 0.0, -1.0, 2.0, 0.5][i % 5]
            beams["early_stopping"] = [False, True, "never"][i % 3]
        count = 1 + i % num_beams
        ours = generate(
            model,
            prompt,
            NEW,
            temperature=0,
            end_of_text=end,
            num_samples=count,
            **beams,
            **penalties,
        )
        expected = reference(theirs, prompt, end, num_return_sequences=count, **beams, **penalties)
        ended_early += expected.shape[1] < len(prompt) + NEW
        np.testing.assert_array_equal(np.atleast_2d(ours), expected, err_msg=f"{i} {beams}")
    assert 0 < ended_early < len(prompts)


def random_settings(rng: np.random.Generator) -> dict[str, Any]:
    """A random choice of filters, each present half of the time."""
    values = {
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "no_repeat_ngram_size": int(rng.integers(1, 5)),
        "temperature": float(rng.uniform(0.2, 3)),
        "top_k": int(rng.integers(1, 150)),  # the vocabulary is smaller
        "top_p": float(rng.uniform(0.01, 1)),
        "min_p": float(rng.uniform(0, 0.5)),
    }
    return {name: value for name, value in values.items() if rng.random() < 0.5}


def their_distribution(logits: np.ndarray, text: list[int], settings: dict[str, Any]) -> np.ndarray:
    """The classes of Transformers in the order in which `_get_logits_processor` puts them."""
    classes = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    chain = LogitsProcessorList(
        [make(settings[name]) for name, make in classes.items() if name in settings]
    )
    scores = chain(torch.tensor([text]), torch.from_numpy(logits[None].astype(np.float64)))
    return torch.softmax(scores, dim=-1)[0].numpy()


def test_our_order_of_filters_is_theirs(theirs: Any) -> None:
    """`their_distribution` has the order that `generate` itself builds."""
    settings = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.5,
        "min_p": 0.1,
    }
    built = theirs._get_logits_processor(
        GenerationConfig(do_sample=True, **settings), input_ids_seq_length=3, device="cpu"
    )
    assert [type(p).__name__ for p in built] == [
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def test_filtered_distributions(model: GPT2, prompts: list[np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    for i in range(200):
        text = [int(token) for token in prompts[i % 50]]
        settings = random_settings(rng)
        logits = model(np.array([text])).numpy()[0, -1]
        ours = next_token_distribution(logits, text, Settings(**settings))
        expected = their_distribution(logits, text, settings)
        np.testing.assert_allclose(ours, expected, atol=1e-6, err_msg=str(settings))
        np.testing.assert_array_equal(ours > 0, expected > 0, err_msg=str(settings))


def test_ties_are_treated_alike() -> None:
    """Which of equally likely tokens top-p keeps is not defined there (torch.sort is not stable),
    but how many; everything else is.
    """
    rng = np.random.default_rng(2)
    for _ in range(200):
        logits = rng.integers(-3, 3, 40).astype(np.float64)  # many equal scores
        text = [int(token) for token in rng.integers(0, 40, 12)]
        settings = random_settings(rng)
        ours = next_token_distribution(logits, text, Settings(**settings))
        expected = their_distribution(logits, text, settings)
        if "top_p" in settings:
            ours, expected = np.sort(ours), np.sort(expected)
        np.testing.assert_allclose(ours, expected, atol=1e-6, err_msg=str(settings))
