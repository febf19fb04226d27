"""Instructions against PyTorch and Transformers: loss, gradients, steps, and the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micrograd_gpt import optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.tuning.conversations import Turn
from micrograd_gpt.tuning.instructions import Example, batch_of, encode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IGNORE = -100
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 211, "n_positions": 40}


def their_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **quiet, **ends))


def our_model(theirs: Any) -> GPT2:
    ours = GPT2(GPT2Config(**SHAPE))
    for name, parameter in ours.named_parameters():
        parameter.data[...] = theirs.get_parameter(name).detach().numpy()
    return ours


def conversations(count: int) -> list[Example]:
    """Examples of 6 to 40 tokens in which a prompt and an answer follow each other twice."""
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(6, 41, count):
        counted = np.zeros(length, bool)
        counted[length // 4 : length // 2] = counted[3 * length // 4 :] = True
        examples.append(Example(rng.integers(0, 211, length, dtype=np.int32), counted))
    return examples


def their_loss(model: Any, examples: list[Example]) -> Any:
    """Transformers' own loss on a batch: padded, masked, labels of -100 where nothing counts."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for row, (tokens, counted) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.tensor(np.where(counted, tokens, IGNORE))
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def loss_one_by_one(model: Any, examples: list[Example]) -> Any:
    """The same in a plain loop over examples: no padding, so that none sees another."""
    total, count = 0, 0
    for tokens, counted in examples:
        logits = model(torch.tensor(tokens[None, :-1])).logits[0]
        labels = torch.tensor(np.where(counted, tokens, IGNORE)[1:].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORE, reduction="sum"
        )
        total, count = total + loss, count + (labels != IGNORE).sum()
    return total / count


@pytest.mark.parametrize("reference", [their_loss, loss_one_by_one])
def test_loss_and_every_gradient(reference: Any) -> None:
    theirs, examples = their_model(), conversations(7)
    ours = our_model(theirs)
    batch = batch_of(examples)
    loss = ours.loss(batch.ids, batch.targets)
    loss.backward()
    expected = reference(theirs, examples)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in ours.named_parameters():
        gradient = theirs.get_parameter(name).grad.numpy()
        error = np.abs(parameter.grad - gradient).max() / np.abs(gradient).max()
        assert error < 1e-4, name


def test_ten_adamw_steps_on_micro_batches() -> None:
    """Our steps are of two micro-batches with unequal numbers of counted tokens, theirs of one."""
    theirs, examples = their_model(1), conversations(20)
    ours = our_model(theirs)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = optim.AdamW(ours.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(10):
        chosen = np.random.default_rng(step).permutation(20)[:8]
        batch = [examples[i] for i in chosen]
        expected = their_loss(theirs, batch)
        expected.backward()
        parts = [batch_of(part) for part in (batch[:3], batch[3:])]
        count = sum(part.count for part in parts)
        loss = 0.0
        for part in parts:
            weighted = ours.loss(part.ids, part.targets) * (part.count / count)
            weighted.backward()
            loss += weighted.item()
        assert loss == pytest.approx(expected.item(), rel=1e-4), step
        their_optimizer.step()
        their_optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()


# What Jinja has meanings for, and paragraphs of every kind
ODD = Template(
    '<"\\{{ \u00fc\U0001f600 }}>\n\n{system}|\n\n{instruction}|{input}\n\n{input}\n\n\n{output}'
)


@pytest.mark.parametrize("template", [Template(), ODD])
def test_transformers_applies_the_chat_template(tmp_path: Path, template: Template) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    save_template(template, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [Turn("Greet {them}.", "Hello\n\nyou!", system="Be 'kind'."), Turn("Again: ü", "Hi")]
    messages = [{"role": "system", "content": "Be 'kind'."}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.instruction})
        messages.append({"role": "assistant", "content": turn.output})
    ids = encode(turns, template, tokenizer).ids.tolist()
    assert theirs.apply_chat_template(messages, return_dict=False) == ids
    prompt = encode(turns[:1], template, tokenizer).ids.tolist()
    prompt += tokenizer.encode(template.prompt("Again: ü")).tolist()
    assert theirs.apply_chat_template(messages[:-1], return_dict=False) == prompt
