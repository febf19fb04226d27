"""Train a GPT-2, from scratch or from given weights, and watch it learn.

    python train_gpt2.py                              # a small GPT on Python's own manual
    python train_gpt2.py --data my.txt --out mine     # on your text
    python train_gpt2.py --init-from 124M --data my.txt --batch-size 1 --max-steps 100
    mpirun -n 2 python train_gpt2.py                  # the first of these, on two processes

Read it from `main()` down: settings, then in `train()` data, model, optimizer and the loop. The
flags and their defaults are the table in micrograd_gpt/runs/settings.py. Every random choice is a
function of (seed, step), so a run that is stopped and resumed continues exactly.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while the rest is imported ends the script quietly
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import math
from contextlib import nullcontext
from functools import partial

from micrograd_gpt import no_grad, optim
from micrograd_gpt.arrays import stand_ins
from micrograd_gpt.arrays.devices import move, resolve_device, set_tf32
from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.arrays.precision import HALF, compute_in, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import no_dropout
from micrograd_gpt.runs import checkpoint, plan_ranks
from micrograd_gpt.runs.dropout import set_dropout
from micrograd_gpt.runs.fingerprint import check_same_data, known_characters
from micrograd_gpt.runs.lock import only_writer
from micrograd_gpt.runs.loss_scaler import LossScaler, scaler_for
from micrograd_gpt.runs.plan import Plan, smaller_model, smaller_step
from micrograd_gpt.runs.ranks import Ranks, check_same_start, divided, started_ranks
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.runs.recorder import Recorder, micro_batches
from micrograd_gpt.runs.settings import (
    EVAL_WINDOWS,
    form_of,
    parse_flags,
    resolve_settings,
    write_settings,
)
from micrograd_gpt.runs.sharding import Optimizer, ShardedAdamW, clip_grad_norm
from micrograd_gpt.runs.signals import signals_as_before
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import is_stdin
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer
from micrograd_gpt.text.corpus import Corpus, load_corpus
from micrograd_gpt.text.tokenizer_files import load_tokenizer, model_tokenizer
from micrograd_gpt.text.tokenizers import NAMES, make_tokenizer
from micrograd_gpt.text.windows import Windows
from micrograd_gpt.weights.config import read_config
from micrograd_gpt.weights.names import config_named, tokenizer_folder
from micrograd_gpt.weights.pretrained import unwritten


def main(argv: list[str] | None = None) -> int:
    cli.write_utf8()  # samples may need it
    with started_ranks() as ranks:  # one, unless a launcher such as mpirun started several
        # Settings: the defaults, then what a resumed run was started with, then the flags
        given = parse_flags(argv)
        stand_ins.highest_level()  # said now if MICROGRAD_GPT_KERNELS names none
        ranks.check_same(given)
        with ranks.first_on_machine():
            settings = resolve_settings(given)
        ranks.check_stdin(is_stdin(settings.data) or is_stdin(settings.validation))
        device = resolve_device(settings.device)
        if settings.plan:
            cli.check_stdout()
            print(plan_of(settings, device))
            return 0
        ranks.use_device(device)
        set_tf32(settings.tf32, device)
        out_of_memory, types = memory_errors(smaller_step(settings)), compute_in(settings.dtype)
        writer = only_writer(settings.out) if ranks.is_first else nullcontext()
        with out_of_memory, types, writer, signals_as_before():
            return train(settings, device, ranks)


def train(settings: argparse.Namespace, device: str, ranks: Ranks) -> int:
    """Train as the settings say; returns the script's exit status."""
    shared = divided(settings, ranks.size)  # the same step in micro-batches that ranks can share

    # Data: two streams of tokens, each cut into windows of block_size
    corpus = load_data(settings, ranks)
    training, validation = corpus.windows(settings.block_size)

    # Model, optimizer, and what a resumed run saved of them
    smaller = smaller_model(settings)
    if ranks.local_rank == 0:
        config = config_of(settings, corpus.tokenizer.vocab_size)
        Plan.of(config, settings, device, ranks.size).check_room(smaller, ranks.local_size)
    with memory_errors(smaller), ranks.first_on_machine():
        model = make_model(settings, corpus.tokenizer, device)
        optimizer, scaler = make_optimizer(settings, model, ranks)
    if settings.resume:
        checkpoint.load_run(settings.out, model, optimizer, scaler)

    # What the run says, measures and saves
    check_same_start(ranks, settings, model, optimizer.steps)
    recorder = Recorder(settings, corpus, model, optimizer, scaler, ranks=ranks)
    if ranks.is_first:
        write_settings(settings)
    recorder.start()

    while optimizer.steps < settings.max_steps and not ranks.agree(recorder.stopped):
        step = optimizer.steps
        optimizer.lr = learning_rate(step, settings)

        # Gradients of the mean loss over all micro-batches, each with its own dropout. A rank
        # takes its share of them; then the gradients of all ranks are added up.
        losses, batches = [], ranks.share(micro_batches(step, shared))
        for batch in batches:
            ids, targets = training.batch(settings.seed, batch, shared.batch_size)  # (B, T) each
            model.draws.reseed(settings.seed, batch)
            loss = model.loss(ids, targets) * (1 / shared.grad_accum_steps)
            if batch == batches[-1]:  # whose backward completes one gradient after another
                ranks.add_up_during(loss, model.parameters(), settings.reduce_dtype)
            (loss * scaler.scale).backward()
            losses.append(loss.data)
        ranks.add_up(model.parameters(), settings.reduce_dtype)
        norm = clip_grad_norm(optimizer, settings.grad_clip or math.inf, scaler.scale)

        # The step, except where float16 overflowed: then it is tried again with a smaller scale
        if not recorder.accepts(step, ranks.join(losses), norm):
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()

        # What is due now: metrics, validation, a checkpoint, a sample
        due = recorder.due_after(step)
        if due.log:
            row = recorder.measure()
            if due.evaluation:
                val_loss = evaluate(model, validation, settings, ranks)
                row |= {"val_loss": val_loss} | bits_per_byte(val_loss, corpus)
            recorder.log(row)
        recorder.save_if_due()
        if due.sample and ranks.is_first and not recorder.stopped:
            recorder.show_sample(sample(model, corpus, optimizer.steps))

    if signal_number := recorder.finish():
        return 128 + signal_number
    if ranks.is_first:
        report(settings, model, corpus, recorder)
    return 0


# ------------------------------------------------------------------------------------- the set-up


def load_data(settings: argparse.Namespace, ranks: Ranks) -> Corpus:
    """The text as two streams of tokens; UserError where a run would be resumed on other data."""
    s = settings
    with known_characters(s):
        corpus = ranks.once_a_machine(
            lambda: load_corpus(s.data, tokenizer_of(s), s.validation, form_of(s))
        )
    check_same_data(settings, corpus)
    return corpus


def tokenizer_of(settings: argparse.Namespace) -> Tokenizer | str:
    """The tokenizer of the resumed run, given weights or a folder, or the name of one to make."""
    if settings.resume:
        return checkpoint.own_tokenizer(settings.out)
    if settings.init_from != "scratch":
        folder, config = tokenizer_folder(settings.init_from), config_named(settings.init_from)
        return model_tokenizer(folder, config.vocab_size) if folder else GPT2Tokenizer()
    name = settings.tokenizer
    if name in NAMES:
        return name
    if not os.path.isdir(name):
        raise UserError(f"--tokenizer is {', '.join(NAMES)} or a folder, and {name!r} is neither")
    return load_tokenizer(name, or_gpt2=False)


def make_model(settings: argparse.Namespace, tokenizer: Tokenizer, device: str) -> GPT2:
    """The model to train: new, or with given weights, or still to be filled by a resumed run.

    Its parameters are never held in half precision, where small updates would round to nothing.
    """
    wide = "float32" if settings.dtype in HALF else settings.dtype
    if settings.init_from != "scratch" and not settings.resume:
        model = GPT2.from_pretrained(settings.init_from, device, wide)
    else:
        config = config_of(settings, tokenizer.vocab_size)
        model = unwritten(config, GPT2) if settings.resume else GPT2(config, settings.seed)
        hold_in(model, wide)
        move(model, device)
    tokenizer.check_size(model.config.vocab_size)
    set_dropout(model.train(), settings.dropout)  # given weights come in evaluation mode
    if settings.recompute:
        recompute_blocks(model)
    return model


def config_of(settings: argparse.Namespace, vocab_size: int) -> GPT2Config:
    """The shape of a new model, or of the weights that --resume or --init-from name."""
    if settings.resume:
        return read_config(settings.out)
    if settings.init_from != "scratch":
        return config_named(settings.init_from)
    shape = {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd")}
    try:
        return GPT2Config(**shape, vocab_size=vocab_size, n_positions=settings.block_size)
    except ValueError as error:
        raise UserError(f"{error}: choose a --n-embd and a --n-head that fit") from None


def make_optimizer(
    settings: argparse.Namespace, model: GPT2, ranks: Ranks
) -> tuple[Optimizer, LossScaler]:
    """AdamW, and the scale that keeps float16's gradients in range (1 for other types)."""
    adamw = partial(ShardedAdamW, ranks) if settings.shard_optimizer else optim.AdamW
    betas = settings.beta1, settings.beta2
    optimizer = adamw(model.parameters(), betas=betas, weight_decay=settings.weight_decay)
    return optimizer, scaler_for(settings.dtype)


# ------------------------------------------------------------------------------- parts of the loop


def learning_rate(step: int, settings: argparse.Namespace) -> float:
    """The learning rate of `step`: a linear warm-up, then half a cosine."""
    s = settings
    return optim.cosine_schedule(step, s.max_steps, s.warmup_steps, s.learning_rate, s.min_lr)


def evaluate(model: GPT2, validation: Windows, settings: argparse.Namespace, ranks: Ranks) -> float:
    """Mean loss in nats per token over fixed windows of the validation text, the same each time."""
    total = count = 0.0
    with no_grad(), no_dropout():
        windows = settings.eval_batches * EVAL_WINDOWS
        for ids, targets in ranks.every(validation.evenly_spaced(windows, settings.batch_size)):
            total += model.loss(ids, targets).item() * targets.size
            count += targets.size
    return sum(ranks.join([total])) / sum(ranks.join([count]))


def bits_per_byte(loss: float, corpus: Corpus) -> dict[str, float]:
    """The loss by which tokenizers can be compared; empty where the text's bytes are unknown."""
    if corpus.bytes_per_token is None:
        return {}
    return {"val_bits_per_byte": loss / math.log(2) / corpus.bytes_per_token}


def sample(model: GPT2, corpus: Corpus, seed: int, length: int = 300) -> str:
    """How the model continues the first tokens of the validation text."""
    ids = model.generate(
        corpus.validation[:8].astype(int),
        max_new_tokens=length,
        temperature=0.8,
        top_k=40,
        seed=seed,
        end_of_text=corpus.tokenizer.end_of_text,
        vocab_size=corpus.tokenizer.vocab_size,
    )
    return corpus.tokenizer.decode(ids)


def report(settings: argparse.Namespace, model: GPT2, corpus: Corpus, recorder: Recorder) -> None:
    """The results of a run that is complete, on stdout."""
    text, val_loss = sample(model, corpus, settings.max_steps), recorder.val_loss
    recorder.keep_sample(text)
    print(f"sample:\n{text}\n")
    if val_loss is not None:
        bits = "".join(f", {b:.3f} bits per byte" for b in bits_per_byte(val_loss, corpus).values())
        perplexity = math.exp(min(val_loss, 700))  # the largest power that is a float
        print(f"validation loss {val_loss:.4f} nats per token, perplexity {perplexity:.2f}{bits}")
    print(f"saved in {settings.out}/: the model and the run, metrics.jsonl, loss.png")
    folder, prompt = map(cli.quoted, (settings.out, corpus.word()))
    print(f"try: {cli.command('generate.py')} --model {folder} --prompt={prompt}")


def plan_of(settings: argparse.Namespace, device: str) -> str:
    """What --plan prints. Data is read only where the vocabulary depends on it."""
    if settings.tokenizer in ("char", "word") and not settings.resume:
        corpus = load_data(settings, Ranks())
        corpus.windows(settings.block_size)  # UserError where it is too short for them
        tokenizer = corpus.tokenizer
    elif isinstance(tokenizer := tokenizer_of(settings), str):
        tokenizer = make_tokenizer(tokenizer, "")
    return plan_ranks.report(config_of(settings, tokenizer.vocab_size), settings, device)


if __name__ == "__main__":
    cli.run(main)
