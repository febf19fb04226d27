"""Train a GPT-2, from scratch or from given weights, and watch it learn.

    python train_gpt2.py                              # a small GPT on Python's own manual
    python train_gpt2.py --data my.txt --out mine     # on your text
    python train_gpt2.py --init-from 124M --data my.txt --batch-size 1 --max-steps 100

Read it from `main()` on: settings, data, model, optimizer, then the loop. The flags and their
defaults are in micrograd_gpt/train_settings.py. Every random choice is a function of (seed, step),
so a run that is stopped and resumed continues exactly.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from micrograd_gpt.arrays.backend import memory_errors, resolve_device, set_tf32
from tqdm import tqdm

from micrograd_gpt import no_grad, optim
from micrograd_gpt.arrays.precision import emulation_note, wide
from micrograd_gpt.gpt2 import GPT2, SIZES, GPT2Config, size_name
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.runs import checkpoint, plan
from micrograd_gpt.runs.checkpoint import load_config
from micrograd_gpt.runs.metrics import Metrics, Unread, read_numbers
from micrograd_gpt.runs.settings import is_size, parse_flags, resolve_settings
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.corpus import Corpus, load_corpus
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import Tokenizer, make_tokenizer
from micrograd_gpt.text.windows import Windows


def main(argv: list[str] | None = None) -> int:
    # Settings: the defaults, then what a resumed run was started with, then the flags
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # samples may need it
    settings = resolve_settings(parse_flags(argv))
    device = resolve_device(settings.device)
    if settings.plan:
        print(plan_of(settings))
        return 0
    set_tf32(settings.tf32, device)
    advice = (
        f"a micro-batch has {settings.batch_size} × {settings.block_size} tokens; lower "
        "--batch-size (and raise --grad-accum-steps, which keeps the step), or add --recompute"
    )
    with memory_errors(advice):
        return train(settings, device)


def train(settings: argparse.Namespace, device: str) -> int:
    """Train as the settings say; returns the script's exit status."""
    out = Path(settings.out)

    # Data: two streams of tokens, cut into windows of block_size
    tokenizer = load_tokenizer(out) if settings.resume else tokenizer_of(settings)
    corpus = load_corpus(settings.data, tokenizer, encoding=settings.encoding)
    training, validation = (
        Windows(tokens, settings.block_size) for tokens in (corpus.train, corpus.validation)
    )
    check_same_data(settings, corpus)

    # Model and optimizer
    model = make_model(settings, corpus.tokenizer.vocab_size, device)
    if note := emulation_note(settings.dtype, device):
        say(note)
    optimizer = optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    scaler = optim.LossScaler() if settings.dtype == "float16" else None
    if scaler:  # which sees to it that an overflow does no harm
        warnings.filterwarnings("ignore", "(invalid value|overflow) encountered", RuntimeWarning)
    if settings.resume:
        checkpoint.load_run(out, model, optimizer, scaler)
        checkpoint.keep_best(out)
        if optimizer.steps >= settings.max_steps:
            raise UserError(
                f"the run in {out} is complete at step {optimizer.steps}; "
                "give a larger --max-steps to continue it"
            )
    metrics = Metrics(out, optimizer.steps, settings.tensorboard)
    if settings.overwrite and not settings.resume:
        checkpoint.remove_run(out)
    best_loss = checkpoint.best_loss(out)
    if damaged := metrics.damaged_lines():
        say(
            f"warning: {metrics.path}: {len(damaged)} lines are damaged and passed over, the first "
            f"is line {damaged[0]}"
        )
    tokens_per_step = settings.batch_size * settings.grad_accum_steps * settings.block_size
    say(
        f"training {model.n_parameters:,} parameters on {len(corpus.train):,} tokens of "
        f"{corpus.name} ({tokens_per_step:,} a step) from step {optimizer.steps}; writing to {out}/"
    )
    if device == "cpu":
        say(f"CPU kernels: {compiler.report()}")

    # The loop
    stop = StopSignals()
    started = last_time = time.perf_counter()
    last_step = saved_step = optimizer.steps
    val_loss: float | None = None
    bar = tqdm(
        total=settings.max_steps, initial=optimizer.steps, unit="step", disable=None, smoothing=0.05
    )

    unread = Unread()
    train_loss = grad_norm = math.nan

    def look() -> None:
        """Learn the latest loss and gradient norm; UserError if those of a step are not finite."""
        nonlocal train_loss, grad_norm
        for step, train_loss, grad_norm in unread.read():
            if not math.isfinite(train_loss) or not math.isfinite(grad_norm):
                raise UserError(what_went_wrong(settings, step, train_loss, grad_norm))

    def save() -> None:
        nonlocal saved_step, best_loss
        look()  # nothing is saved that is not known to be good
        run = (model, corpus.tokenizer, optimizer, vars(settings), val_loss, settings.keep, scaler)
        try:
            checkpoint.save_run(out, *run)
        except UserError as error:
            kept = checkpoint.last_good(out, optimizer.steps + 1)
            raise UserError(f"{error}; the last checkpoint: {kept}") from error
        saved_step = optimizer.steps
        best_loss = min(best_loss, math.inf if val_loss is None else val_loss)

    def record(row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl; where that fails and stops the run, it is saved first."""
        try:
            metrics.append(row)
        except UserError as error:
            if settings.on_save_error == "continue":
                raise
            save()
            raise UserError(f"{error}; the run is saved after step {row['step']}") from error

    def attempt(write: Callable[..., None], *args: Any, needed: bool = True) -> None:
        """Write to the disk; where what is `needed` fails, stop or go on, by --on-save-error."""
        try:
            write(*args)
        except UserError as error:
            if needed and settings.on_save_error == "stop":
                raise
            say(f"warning: {error}; the run goes on", bar)

    while optimizer.steps < settings.max_steps and not stop.requested:
        step = optimizer.steps
        optimizer.lr = optim.cosine_schedule(
            step,
            settings.max_steps,
            settings.warmup_steps,
            settings.learning_rate,
            settings.min_lr,
        )

        # Gradients of the mean loss over all micro-batches, each dropping out its own way
        losses = []
        loss_scale = scaler.scale if scaler else 1.0
        for batch in batches_of(step, settings):
            ids, targets = training.batch(settings.seed, batch, settings.batch_size)
            model.random.reseed(settings.seed, batch)
            loss = model.loss(ids, targets) * (1 / settings.grad_accum_steps)
            (loss * loss_scale if scaler else loss).backward()
            losses.append(loss.data)
        norm = optimizer.clip(settings.grad_clip, loss_scale)

        # Where float16 overflowed the step is tried again, with the gradients scaled less
        if scaler:
            *losses, norm = read_numbers([*losses, norm])
            may_step = update_scaler(scaler, norm, settings, step)
            if scaler.scale != loss_scale:
                say(f"step {step}: the loss scale is now {scaler.scale:.0f}", bar)
            if not may_step:
                optimizer.zero_grad()
                continue
        unread.add(step, losses, norm)

        # What happens now: progress bar, evaluation, metrics, sample, checkpoint
        done = step + 1
        last = done == settings.max_steps
        eval_now = done % settings.eval_interval == 0 or last
        log_now = done % settings.log_interval == 0 or eval_now
        sample_now = done % settings.sample_interval == 0 and not last
        save_now = done % settings.save_interval == 0 and not last
        val_loss = None
        # To look at a loss is to wait for it, which a GPU is spared for most steps
        if device == "cpu" or log_now or sample_now or save_now or stop.requested:
            look()
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if log_now:
            now = time.perf_counter()
            tokens_per_second = (done - last_step) * tokens_per_step / (now - last_time)
            row = {
                "step": done,
                "train_loss": train_loss,
                "learning_rate": optimizer.lr,
                "grad_norm": grad_norm,
                "tokens_per_second": round(tokens_per_second, 1),
                "elapsed_seconds": round(now - started, 2),
            }
            if scaler:
                row |= {"loss_scale": scaler.scale, "skipped_steps": scaler.skipped_steps}
            bar.set_postfix_str(f"loss {train_loss:.3f}, {tokens_per_second:,.0f} tokens/s")
            if eval_now:
                val_loss = evaluate(model, validation, settings)
                row |= {"val_loss": val_loss} | bits_per_byte(val_loss, corpus)
                say(
                    f"step {done:5d}   train loss {train_loss:.3f}   "
                    f"validation loss {val_loss:.3f}   {tokens_per_second:,.0f} tokens/s",
                    bar,
                )
            attempt(record, row)
            last_step, last_time = done, time.perf_counter()
        if sample_now and not stop.requested:
            say(f"--- sample\n{sample(model, corpus, done)}\n---", bar)
        best = val_loss is not None and val_loss < best_loss
        if save_now or (best and not last):
            attempt(save)
        if val_loss is not None:
            attempt(metrics.draw, needed=False)
    bar.close()

    # The end
    if saved_step < optimizer.steps:
        save()
    attempt(metrics.draw, needed=False)
    if stop.requested:
        unfinished = 0 < optimizer.steps < settings.max_steps
        resume = f"; continue with --resume --out {out}" if unfinished else ""
        say(f"stopped after step {optimizer.steps}{resume}")
        return 128 + stop.requested
    print(f"sample:\n{sample(model, corpus, optimizer.steps)}\n")
    if val_loss is not None:
        bits = "".join(f", {b:.3f} bits per byte" for b in bits_per_byte(val_loss, corpus).values())
        perplexity = math.exp(min(val_loss, 700))  # beyond, it is no float
        print(f"validation loss {val_loss:.4f} nats per token, perplexity {perplexity:.2f}{bits}")
    print(f"saved in {out}/: the model and the run, metrics.jsonl, loss.png")
    print(f'try: python generate.py --model {out} --prompt "The "')
    return 0


# ------------------------------------------------------------------------------ parts of the loop


def tokenizer_of(settings: argparse.Namespace) -> Tokenizer | str:
    """The tokenizer of the weights to start from, or the name of the one to make."""
    if settings.init_from == "scratch":
        return settings.tokenizer
    return "gpt2" if is_size(settings.init_from) else load_tokenizer(settings.init_from)


def config_of(settings: argparse.Namespace, vocab_size: int) -> GPT2Config:
    """The shape of a new model, or of the weights that --resume or --init-from name."""
    if settings.resume:
        return load_config(settings.out)
    if is_size(settings.init_from):
        return GPT2Config(**SIZES[size_name(settings.init_from)])
    if settings.init_from != "scratch":
        return load_config(settings.init_from)
    return GPT2Config(
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        vocab_size=vocab_size,
        n_positions=settings.block_size,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
    )


def make_model(settings: argparse.Namespace, vocab_size: int, device: str) -> GPT2:
    """The model to train: new, or with given weights, or still to be filled by a resumed run.

    Its parameters are never held in half precision: small updates would round to nothing.
    """
    types = {"dtype": wide(settings.dtype), "compute": settings.dtype}
    if settings.resume or settings.init_from == "scratch":
        config, new = config_of(settings, vocab_size), not settings.resume
        model = GPT2(config, settings.seed, device=device, initialize=new, **types)
    else:
        model = GPT2.from_pretrained(settings.init_from, device, **types)
    model.set_dropout(settings.dropout)  # which --resume --allow-changes may change
    model.transformer.recompute = settings.recompute
    return model


def check_same_data(settings: argparse.Namespace, corpus: Corpus) -> None:
    """UserError where a run would be resumed on other data; a new run notes which it has."""
    streams = (corpus.train, corpus.validation)
    fingerprint = " and ".join(map(checkpoint.fingerprint, streams))
    before, found = settings.data_fingerprint, fingerprint
    if before is None:  # an older run: it noted pieces of what it trained on
        before, found = settings.training_tokens, checkpoint.fingerprint(corpus.train, 0)
    if settings.resume and before not in (None, found) and not settings.allow_changes:
        raise UserError(
            f"{settings.data} is no longer the data of the run in {settings.out} "
            f"({before}; now {found}): give the same data, or add --allow-changes"
        )
    settings.data_fingerprint, settings.training_tokens = fingerprint, None


def batches_of(step: int, settings: argparse.Namespace) -> range:
    """The numbers of the micro-batches that make up a step."""
    count = settings.grad_accum_steps
    return range(step * count, (step + 1) * count)


def what_went_wrong(settings: argparse.Namespace, step: int, loss: float, norm: float) -> str:
    """Of a step whose loss or gradient is no finite number: where it is, and what to do."""
    batches = batches_of(step, settings)
    return (
        f"step {step}: the loss is {loss}, the gradient norm {norm}, in batch "
        f"{'-'.join(map(str, sorted({batches[0], batches[-1]})))} of seed {settings.seed}; "
        f"the last good checkpoint: {checkpoint.last_good(settings.out, step)}; "
        "try a smaller --learning-rate"
    )


def update_scaler(
    scaler: optim.LossScaler, grad_norm: float, settings: argparse.Namespace, step: int
) -> bool:
    """`scaler.update`, with the step in its error."""
    try:
        return scaler.update(grad_norm)
    except UserError as error:
        good = checkpoint.last_good(settings.out, step)
        raise UserError(f"step {step}: {error}; the last good checkpoint: {good}") from None


def plan_of(settings: argparse.Namespace) -> str:
    """What --plan prints. Data is read only where the vocabulary depends on it."""
    tokenizer = load_tokenizer(settings.out) if settings.resume else tokenizer_of(settings)
    if tokenizer in ("char", "word"):
        tokenizer = load_corpus(settings.data, tokenizer, encoding=settings.encoding).tokenizer
    elif isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, "")
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)
    config = dataclasses.replace(config_of(settings, tokenizer.vocab_size), **dropout)
    return plan.Plan(
        config,
        settings.batch_size,
        settings.block_size,
        settings.grad_accum_steps,
        settings.recompute,
        settings.dtype,
        device=resolve_device(settings.device),
    ).report(settings.max_steps, settings.rate, settings.devices)


def evaluate(model: GPT2, validation: Windows, settings: argparse.Namespace) -> float:
    """Mean loss in nats per token over fixed windows of the validation text, the same each time."""
    model.eval()
    total = count = 0.0
    with no_grad():
        for ids, targets in validation.evenly_spaced(settings.eval_batches, settings.batch_size):
            total += model.loss(ids, targets).item() * targets.size
            count += targets.size
    model.train()
    return total / count


def bits_per_byte(loss: float, corpus: Corpus) -> dict[str, float]:
    """The loss by which tokenizers can be compared; empty where the text's bytes are unknown."""
    if corpus.bytes_per_token is None:
        return {}
    return {"val_bits_per_byte": loss / math.log(2) / corpus.bytes_per_token}


def sample(model: GPT2, corpus: Corpus, seed: int, length: int = 300) -> str:
    """A text the model writes on from the first tokens of the validation text."""
    prompt = corpus.validation[:8].astype(int)
    model.eval()
    ids = model.generate(prompt, max_new_tokens=length, temperature=0.8, top_k=40, seed=seed)
    model.train()
    return corpus.tokenizer.decode(ids)


class StopSignals:
    """Ctrl-C and SIGTERM ask the loop to stop after this step, its evaluation included; a second
    one stops at once."""

    def __init__(self) -> None:
        self.requested = 0  # the signal's number, once one has come
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.requested = number
        say("stopping after this step; once more to stop at once")


def say(message: str, bar: tqdm | None = None) -> None:
    """Tell the user something that is not a result: on stderr, above the progress bar.

    A run must not end, unsaved, because nobody reads any more (Ctrl-C ends `| tee` too), nor
    because a signal came in the middle of a write.
    """
    with contextlib.suppress(OSError, RuntimeError):
        if bar is not None:
            bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
