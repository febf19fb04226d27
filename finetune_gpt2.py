"""Make a trained GPT-2 do a job: label texts, or follow instructions.

    python finetune_gpt2.py classify --model 124M --data spam.tsv --out spam
    python finetune_gpt2.py classify --model spam/best --predict new.txt
    python finetune_gpt2.py instruct --model 355M --data alpaca.json --out tuned
    python finetune_gpt2.py instruct --resume --out tuned      # a run that was stopped

Read it from `main()` down: a command makes a model and a task, `tune()` is the loop that both
commands share. The flags are the tables in micrograd_gpt/tuning/flags.py. Every random choice is a
function of (seed, step), so a run that is stopped and resumed continues exactly.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while the rest is imported ends the script quietly
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Any

from micrograd_gpt import optim
from micrograd_gpt.arrays import stand_ins
from micrograd_gpt.arrays.devices import move, resolve_device, set_tf32
from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.arrays.precision import HALF, compute_in, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.nn import Module
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.dropout import set_dropout
from micrograd_gpt.runs.fingerprint import check_fingerprint, known_characters
from micrograd_gpt.runs.lock import only_writer
from micrograd_gpt.runs.loss_scaler import LossScaler, scaler_for
from micrograd_gpt.runs.plan import Plan
from micrograd_gpt.runs.ranks import check_only_process
from micrograd_gpt.runs.recompute import recompute_blocks
from micrograd_gpt.runs.recorder import Recorder
from micrograd_gpt.runs.signals import signals_as_before
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import write_text
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer
from micrograd_gpt.text.template import choose_template
from micrograd_gpt.text.tokenizer_files import model_tokenizer
from micrograd_gpt.tuning import conversations, flags, labelled, lora
from micrograd_gpt.tuning.batches import Order, Task, micro_batches
from micrograd_gpt.tuning.classification import Classification, label_texts
from micrograd_gpt.tuning.classifier import (
    GPT2Classifier,
    check_labels,
    load_classifier,
    load_with_tokenizer,
    set_layers,
    write_classifier,
)
from micrograd_gpt.tuning.instructions import Instructions
from micrograd_gpt.tuning.scores import draw_confusion
from micrograd_gpt.weights.config import read_config
from micrograd_gpt.weights.names import config_named, tokenizer_folder
from micrograd_gpt.weights.pretrained import unwritten

RATES = ("max_steps", "warmup_steps", "learning_rate", "min_lr")  # the schedule's arguments

Make = Callable[[GPT2], Any]  # what the body becomes: itself, or a classifier


def main(argv: list[str] | None = None) -> int:
    given = flags.parse_flags(argv)
    check_only_process("finetune_gpt2.py")
    stand_ins.highest_level()  # said now if MICROGRAD_GPT_KERNELS names none
    cli.write_utf8()
    to_predict = "predict" in given or flags.is_piped(given)
    settings = flags.for_prediction(given) if to_predict else flags.resolve_settings(given)
    device = resolve_device(settings.device)
    set_tf32(settings.tf32, device)
    command = {"classify": classify, "instruct": instruct}[settings.command]
    advice = "lower --batch-size (and raise --grad-accum-steps), or add --recompute"
    with memory_errors(advice), compute_in(settings.dtype):
        if to_predict:
            return predict(settings, device)
        writer = nullcontext() if settings.plan else only_writer(settings.out)
        with writer, signals_as_before(), known_characters(settings):
            return command(settings, device)


# -------------------------------------------------------------------------------- classification


def classify(settings: argparse.Namespace, device: str) -> int:
    """Train a classifier as the settings say; returns the script's exit status."""
    # Data: texts with labels, in three parts
    files = (settings.data, settings.validation, settings.test)
    parts = labelled.read_parts(*files, labelled.columns_of(settings), settings.encoding)
    if settings.resume:
        check_labels(settings.out, parts.labels)
    labelled.warn_if_unbalanced(parts.train, settings.balance)
    tokenizer, longest = tokenizer_of(settings), longest_of(settings)
    name, size = Path(settings.data).name, settings.batch_size
    task = Classification(parts, tokenizer, longest, size, name, settings.balance)

    # Model: the body with given weights, and a new head
    def make(body: GPT2) -> GPT2Classifier:
        model = GPT2Classifier(body, parts.labels, settings.seed, longest)
        set_layers(model, settings.train_layers)
        return model

    model, signal_number = tune(settings, device, task, make, write_classifier)
    if model and not signal_number:
        report_classifier(settings, task, device)
    return signal_number and 128 + signal_number


def report_classifier(settings: argparse.Namespace, task: Classification, device: str) -> None:
    """The scores of the best checkpoint, on stdout and as pictures in the run's folder."""
    out, best = Path(settings.out), Path(settings.out, checkpoint.BEST)
    model, results = load_classifier(best, device), {}
    for name, part in (("validation", task.validation), ("test", task.test)):
        scores = task.scores(model, part)
        results[name] = scores.as_dict()
        print(f"{name}: {scores.report()}\n")
        draw_confusion(scores, out / f"confusion-{name}.png")
    write_text(out / "scores.json", json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    print(f"saved in {out}/: the model and the run, metrics.jsonl, scores.json, pictures")
    print(f"{best} has the lowest validation loss, and these scores")
    again = cli.command("finetune_gpt2.py")
    print(f"try: {again} classify --model {cli.quoted(best)} --predict FILE.txt")


def predict(settings: argparse.Namespace, device: str) -> int:
    """Label the texts of a file or a pipe: one JSON object a line, on stdout."""
    columns = labelled.columns_of(settings)
    texts = labelled.read_texts(settings.predict, columns, settings.encoding)
    wide = "float32" if settings.dtype in HALF else settings.dtype
    model, tokenizer = load_with_tokenizer(settings.model, device, wide)
    for result in label_texts(model, texts, tokenizer, settings.batch_size):
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0


# ---------------------------------------------------------------------------------- instructions


def instruct(settings: argparse.Namespace, device: str) -> int:
    """Teach a model to follow instructions; returns the script's exit status."""
    # Data: conversations in two parts, and the template that lays them out
    parts = conversations.read_parts(settings.data, settings.validation, settings.encoding)
    folder = settings.out if settings.resume else tokenizer_folder(settings.model)
    template = choose_template(None if settings.resume else settings.template, folder)
    how = tokenizer_of(settings), longest_of(settings), settings.batch_size, settings.loss_on
    task = Instructions(*parts, template, *how, Path(settings.data).name)

    model, signal_number = tune(settings, device, task, lambda body: body, task.write)
    if model and not signal_number:
        print(task.report(model, settings.out))
    return signal_number and 128 + signal_number


# ----------------------------------------------------------------------- the loop they all share


def tune(
    settings: argparse.Namespace, device: str, task: Task, make: Make, write: Callable[..., None]
) -> tuple[Any, int]:
    """Train what `make` makes of the body on the task; returns it, and the signal that stopped it.

    With --plan it is (None, 0). `write` saves the model into a folder.
    """
    per_step = settings.batch_size * settings.grad_accum_steps
    order = Order(task.lengths, per_step, settings.seed, task.kinds)
    flags.schedule(settings, order.steps_per_epoch)
    plan = make_plan(settings, task, device, make)
    if settings.plan:
        cli.check_stdout()
        done = checkpoint.saved_step(settings.out) if settings.resume else 0
        print(plan.report(settings.max_steps, plan.step_time(settings.rate), done))
        return None, 0
    plan.check_room("give a smaller --model")
    check_fingerprint(settings, task.fingerprint(), settings.validation)

    # Model and optimizer, and what a resumed run saved of them
    body = make_body(settings, device)
    task.tokenizer.check_size(body.config.vocab_size)
    model = make(body)
    lora.add_as_told(model, settings)  # LoRA
    set_dropout(model.train(), settings.dropout)
    if settings.recompute:
        recompute_blocks(model)
    optimizer, scaler = make_optimizer(settings, model)
    if settings.resume:
        checkpoint.load_run(settings.out, model, optimizer, scaler)
    recorder = Recorder(settings, task, model, optimizer, scaler, write, plan.tokens_per_step)
    flags.write_settings(settings)
    if settings.resume:
        lora.rename_base(settings)
    recorder.start()
    learn(settings, task, order, model, optimizer, scaler, recorder)
    return model, recorder.finish()


def learn(
    settings: argparse.Namespace,
    task: Task,
    order: Order,
    model: Any,
    optimizer: optim.AdamW,
    scaler: LossScaler,
    recorder: Recorder,
) -> None:
    """The loop: one step after the other, until all are taken or a signal comes."""
    rates = [getattr(settings, name) for name in RATES]
    while optimizer.steps < settings.max_steps and not recorder.stopped:
        step = optimizer.steps
        optimizer.lr = optim.cosine_schedule(step, *rates)

        # Gradients of the mean over all that counts in the step, however the micro-batches cut it
        parts = micro_batches(order.step(step), settings.batch_size)
        batches = [task.batch(part) for part in parts]
        count = sum(batch.count for batch in batches)
        losses = []
        for number, batch in enumerate(batches):
            model.draws.reseed(settings.seed, step, number)
            loss = task.loss(model, batch) * (batch.count / count)
            (loss * scaler.scale).backward()
            losses.append(loss.data)
        norm = optim.clip_grad_norm(optimizer.parameters, settings.grad_clip or inf, scaler.scale)

        # The step, except where float16 overflowed: then it is tried again with a smaller scale
        accepted = recorder.accepts(step, losses, norm, sum(batch.tokens for batch in batches))
        if accepted:
            optimizer.step()
        optimizer.zero_grad()
        if not accepted:
            continue
        # What is due now: metrics, validation, a checkpoint
        due = recorder.due_after(step)
        if due.log:
            row = recorder.measure()
            recorder.log(row | (task.evaluate(model) if due.evaluation else {}))
        recorder.save_if_due()


def make_body(settings: argparse.Namespace, device: str) -> GPT2:
    """The language model to start from, or one still to be filled by a resumed run."""
    wide = "float32" if settings.dtype in HALF else settings.dtype
    if not settings.resume or settings.lora_rank:
        with lora.finding_base(settings):
            return GPT2.from_pretrained(settings.model, device, wide)
    body = unwritten(read_config(settings.out))
    hold_in(body, wide)
    move(body, device)
    return body


def make_optimizer(settings: argparse.Namespace, model: Module) -> tuple[optim.AdamW, LossScaler]:
    """AdamW for the parameters that learn, and the scale of float16's gradients."""
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    learning = lora.trained_parameters(model)
    optimizer = optim.AdamW(learning, rate, betas, weight_decay=settings.weight_decay)
    return optimizer, scaler_for(settings.dtype)


def tokenizer_of(settings: argparse.Namespace) -> Tokenizer:
    """The tokenizer of the weights to start from, or of the run that is resumed."""
    folder = settings.out if settings.resume else tokenizer_folder(settings.model)
    return model_tokenizer(folder, config_of(settings).vocab_size) if folder else GPT2Tokenizer()


def config_of(settings: argparse.Namespace) -> GPT2Config:
    """The shape of the weights to start from, or of the run that is resumed."""
    return read_config(settings.out) if settings.resume else config_named(settings.model)


def longest_of(settings: argparse.Namespace) -> int:
    """The most tokens of an example; UserError for more than the model has room for."""
    room = config_of(settings).n_positions
    if settings.block_size and settings.block_size > room:
        raise UserError(f"--block-size is at most {room}, the context of the model")
    return settings.block_size or room


def make_plan(settings: argparse.Namespace, task: Task, device: str, make: Make) -> Plan:
    """What a run takes at its longest batches, which have no more examples than there are."""
    s, config = settings, config_of(settings)
    size = min(s.batch_size, len(task.lengths)), int(task.lengths.max())
    sizes = (*size, s.grad_accum_steps, s.recompute, s.dtype, device)
    return Plan(config, *sizes, **lora.what_learns(make(unwritten(config)), s))


if __name__ == "__main__":
    cli.run(main)
