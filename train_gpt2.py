"""Train a GPT-2, from scratch or from given weights, and watch it learn.

    python train_gpt2.py                              # a small GPT on Python's own manual
    python train_gpt2.py --data my.txt --out mine     # on your text
    python train_gpt2.py --init-from 124M --data my.txt --batch-size 1 --max-steps 100

Read it from `main()` on: settings, data, model, optimizer, then the loop. Every random choice is a
function of (seed, step), so a run that is stopped and resumed continues exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from micrograd_gpt import checkpoint, cli, no_grad, optim
from micrograd_gpt.backend import resolve_device
from micrograd_gpt.checkpoint import load_config
from micrograd_gpt.data import Corpus, Windows, load_corpus
from micrograd_gpt.errors import UserError
from micrograd_gpt.files import written_whole
from micrograd_gpt.gpt2 import GPT2, OLDER_NAMES, SIZES, GPT2Config, size_name
from micrograd_gpt.tokenizers import Tokenizer, load_tokenizer

SHAPES: dict[str, dict[str, int]] = {"tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128}, **SIZES}

# What is used when a flag is left out, and why.
DEFAULTS: dict[str, Any] = {
    "data": "pydocs",  # English that every Python carries: nothing to download
    "init_from": "scratch",
    "size": "tiny",  # learns to write words in two minutes on a laptop
    "out": "out",
    "seed": 1337,
    "device": "cpu",
    "dtype": "float32",
    "dropout": 0.0,  # nothing to regularise while each token is seen a few times only
    "grad_accum_steps": 1,
    "weight_decay": 0.1,  # GPT-3's, table 2.1 and appendix B, as the next three
    "beta1": 0.9,
    "grad_clip": 1.0,
    "log_interval": 10,
    "eval_batches": 40,  # enough windows that the measured loss moves little with their choice
}
TINY: dict[str, Any] = {
    "tokenizer": "char",  # a small model has no use for 50,257 tokens
    "block_size": 64,
    "batch_size": 12,
    "max_steps": 4000,  # about two minutes on two cores
    "learning_rate": 3e-3,  # small models bear large steps
    "min_lr": 3e-4,
    "warmup_steps": 100,
    "beta2": 0.99,  # a small batch's gradient is noisy: average over more of them
    "eval_interval": 500,
    "sample_interval": 1000,
    "save_interval": 1000,
}
LARGE: dict[str, Any] = {
    "tokenizer": "gpt2",
    "block_size": 1024,
    "batch_size": 4,
    "max_steps": 10000,
    "learning_rate": 6e-4,  # GPT-3's for 125M
    "min_lr": 6e-5,  # a tenth of it (Hoffmann et al. 2022)
    "warmup_steps": 700,
    "beta2": 0.95,
    "eval_interval": 250,
    "sample_interval": 250,
    "save_interval": 250,
}
FINE_TUNING: dict[str, Any] = {
    "learning_rate": 3e-5,  # trained weights are near a good place: stay there
    "min_lr": 3e-6,
    "warmup_steps": 50,
    "max_steps": 1000,
}
# These may change when a run is resumed: they do not change what it computes.
FREE = {"max_steps", "out", "log_interval", "sample_interval", "save_interval", "resume"}


def main(argv: list[str] | None = None) -> int:
    # Settings: the defaults, then what a resumed run was started with, then the flags
    settings = resolve_settings(parse_flags(argv))
    device = resolve_device(settings.device)
    out = Path(settings.out)

    # Data: two streams of tokens, cut into windows of block_size
    corpus = load_corpus(
        settings.data, load_tokenizer(out) if settings.resume else tokenizer_of(settings)
    )
    train, validation = (
        Windows(tokens, settings.block_size) for tokens in (corpus.train, corpus.validation)
    )

    # Model and optimizer
    model = make_model(settings, corpus.tokenizer.vocab_size, device)
    optimizer = optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    if settings.resume:
        checkpoint.load_run(out, model, optimizer)
        if optimizer.steps >= settings.max_steps:
            raise UserError(
                f"the run in {out} is complete at step {optimizer.steps}; "
                "give a larger --max-steps to continue it"
            )
    tokens_per_step = settings.batch_size * settings.grad_accum_steps * settings.block_size
    say(
        f"training {model.n_parameters:,} parameters on {len(corpus.train):,} tokens of "
        f"{corpus.name} ({tokens_per_step:,} a step) from step {optimizer.steps}; writing to {out}/"
    )

    def save() -> None:
        checkpoint.save_run(out, model, corpus.tokenizer, optimizer, vars(settings))
        draw_loss_curve(out)

    # The loop
    out.mkdir(parents=True, exist_ok=True)
    if not settings.resume:
        (out / "metrics.jsonl").unlink(missing_ok=True)
    stop = StopSignals()
    started = last_time = time.perf_counter()
    last_step = optimizer.steps
    bar = tqdm(
        total=settings.max_steps, initial=optimizer.steps, unit="step", disable=None, smoothing=0.05
    )
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
        train_loss = 0.0
        for micro_step in range(settings.grad_accum_steps):
            batch = step * settings.grad_accum_steps + micro_step
            ids, targets = train.batch(settings.seed, batch, settings.batch_size)
            model.random.reseed(settings.seed, batch)
            loss = model.loss(ids, targets) * (1 / settings.grad_accum_steps)
            loss.backward()
            train_loss += loss.item()
        grad_norm = optim.clip_grad_norm(optimizer.parameters, settings.grad_clip)
        if not math.isfinite(train_loss) or not math.isfinite(grad_norm):
            raise UserError(
                f"step {step}: the loss is {train_loss}, the gradient norm {grad_norm}; "
                f"{out} keeps the last checkpoint; try a smaller --learning-rate"
            )
        optimizer.step()
        optimizer.zero_grad()

        # What happened: progress bar, metrics, evaluation, sample, checkpoint
        done = optimizer.steps
        last = done == settings.max_steps or stop.requested
        bar.update()
        log_now = done % settings.log_interval == 0 or last
        eval_now = done % settings.eval_interval == 0 or last
        if log_now or eval_now:
            now = time.perf_counter()
            tokens_per_second = (done - last_step) * tokens_per_step / (now - last_time)
            metrics = {
                "step": done,
                "train_loss": train_loss,
                "learning_rate": optimizer.lr,
                "grad_norm": grad_norm,
                "tokens_per_second": round(tokens_per_second, 1),
                "elapsed_seconds": round(now - started, 2),
            }
            bar.set_postfix_str(f"loss {train_loss:.3f}, {tokens_per_second:,.0f} tokens/s")
            if eval_now:
                metrics["val_loss"] = val_loss = evaluate(model, validation, settings)
                bar.write(
                    f"step {done:5d}   train loss {train_loss:.3f}   "
                    f"validation loss {val_loss:.3f}   {tokens_per_second:,.0f} tokens/s",
                    file=sys.stderr,
                )
            append_metrics(out, metrics)
            last_step, last_time = done, time.perf_counter()
        if done % settings.sample_interval == 0 and not last:
            bar.write(f"--- sample\n{sample(model, corpus, done)}\n---", file=sys.stderr)
        if done % settings.save_interval == 0 or last:
            save()
            last_time = time.perf_counter()
    bar.close()

    # The end
    if stop.requested:
        say(f"stopped after step {optimizer.steps}; continue with --resume --out {out}")
        return 128 + stop.requested
    print(f"sample:\n{sample(model, corpus, optimizer.steps)}\n")
    print(f"validation loss {val_loss:.4f} nats per token, perplexity {math.exp(val_loss):.2f}")
    print(f"saved in {out}/: the model and the run, metrics.jsonl, loss.png")
    print(f'try: python generate.py --model {out} --prompt "The "')
    return 0


# ------------------------------------------------------------------------------------- settings


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, by name; what was left out is not in it."""
    parser = cli.ArgumentParser(
        prog="train_gpt2.py",
        description="Train a GPT-2 and watch it learn. Without flags: a small one, on Python's own "
        "manual, in about two minutes.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", help="pydocs, shakespeare, a text file, or a folder of text files (pydocs)")
    add("--tokenizer", choices=["char", "byte", "word", "gpt2"], help="(char for tiny, else gpt2)")
    add = parser.add_argument_group("model").add_argument
    sizes = ", ".join(["tiny", *SIZES, *OLDER_NAMES])
    add("--size", help=f"{sizes} (tiny: 4 layers, 4 heads, 128 wide)")
    add("--n-layer", type=cli.positive_int, help="transformer blocks")
    add("--n-head", type=cli.positive_int, help="attention heads")
    add("--n-embd", type=cli.positive_int, help="width of the residual stream")
    add("--block-size", type=cli.positive_int, help="context in tokens (64 for tiny, else 1024)")
    add("--dropout", type=float, help="probability of dropping an activation (0)")
    add("--init-from", help="scratch, a size (OpenAI's weights), or a checkpoint folder (scratch)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder (out)")
    add("--resume", action="store_true", help="continue the run in --out where it stopped")
    add("--overwrite", action="store_true", help="start anew where --out holds a run already")
    add("--seed", type=cli.non_negative_int, help="of weights, data order and dropout (1337)")
    add("--device", help="cpu or gpu (cpu)")
    add("--dtype", choices=["float32", "float64"], help="number type (float32)")
    add("--max-steps", type=cli.positive_int, help="(4000 for tiny, else 10000; 1000 fine-tuning)")
    add("--batch-size", type=cli.positive_int, help="windows a micro-batch (12 for tiny, else 4)")
    add("--grad-accum-steps", type=cli.positive_int, help="micro-batches a step (1)")
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning-rate", type=float, help="the highest (3e-3 for tiny, else 6e-4; 3e-5)")
    add("--min-lr", type=float, help="the last (a tenth of it)")
    add("--warmup-steps", type=cli.non_negative_int, help="linear warm-up (100; 700; 50)")
    add("--weight-decay", type=float, help="of matrices only (0.1)")
    add("--beta1", type=float, help="decay rate of the first moment (0.9)")
    add("--beta2", type=float, help="decay rate of the second (0.99 for tiny, else 0.95)")
    add("--grad-clip", type=float, help="largest norm of the gradient (1.0)")
    add = parser.add_argument_group("watching").add_argument
    add("--log-interval", type=cli.positive_int, help="steps between metrics (10)")
    add("--eval-interval", type=cli.positive_int, help="between validations (500; 250)")
    add("--eval-batches", type=cli.positive_int, help="batches of a validation (40)")
    add("--sample-interval", type=cli.positive_int, help="between samples (1000; 250)")
    add("--save-interval", type=cli.positive_int, help="between checkpoints (1000; 250)")
    return vars(parser.parse_args(argv))


def resolve_settings(flags: dict[str, Any]) -> argparse.Namespace:
    """Complete the flags with the defaults, or with the run that is resumed; UserError if wrong."""
    out = Path(flags.get("out", DEFAULTS["out"]))
    holds_run = (out / checkpoint.STATE).exists()
    if flags.get("resume"):
        saved = checkpoint.load_settings(out)
        for name in sorted(flags.keys() - FREE):
            if flags[name] != saved[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"the run in {out} has {flag} {saved[name]}, not {flags[name]}: leave the flag "
                    f"out to resume, or start another run with --init-from {out} --out elsewhere"
                )
        return argparse.Namespace(**saved | flags | {"out": str(out)})
    if holds_run and not flags.get("overwrite"):
        raise UserError(f"{out} holds a run already: --resume, --overwrite, or another --out")

    weights = flags.get("init_from", "scratch")
    if weights == "scratch":
        size = flags.get("size", DEFAULTS["size"])
        size = size if size == "tiny" else size_name(size)
        chosen = {**(TINY if size == "tiny" else LARGE), **SHAPES[size]}
        flags = {**flags, "size": size}
    else:
        for name in ("size", "n_layer", "n_head", "n_embd", "tokenizer"):
            if name in flags:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} makes no sense with --init-from, whose weights decide it")
        positions = positions_of(weights)
        if flags.get("block_size", 0) > positions:
            raise UserError(f"--block-size is at most {positions}, the positions of {weights}")
        chosen = {**LARGE, **FINE_TUNING, "block_size": positions}
    settings = {"resume": False, "overwrite": False, **DEFAULTS, **chosen, **flags}
    if "learning_rate" in flags and "min_lr" not in flags:
        settings["min_lr"] = settings["learning_rate"] / 10
    for name in ("learning_rate", "grad_clip"):
        if not settings[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {settings[name]}")
    for name in ("min_lr", "weight_decay"):
        if not settings[name] >= 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {settings[name]}")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= settings[name] < 1:
            raise UserError(f"--{name} must be in [0, 1), not {settings[name]}")
    return argparse.Namespace(**settings)


def is_size(weights: str) -> bool:
    """True for an --init-from that names one of OpenAI's models rather than a folder."""
    return weights in SIZES or weights in OLDER_NAMES


def positions_of(weights: str) -> int:
    """The longest context of the weights that --init-from names."""
    return GPT2Config().n_positions if is_size(weights) else load_config(weights).n_positions


def tokenizer_of(settings: argparse.Namespace) -> Tokenizer | str:
    """The tokenizer of the weights to start from, or the name of the one to make."""
    if settings.init_from == "scratch":
        return settings.tokenizer
    return "gpt2" if is_size(settings.init_from) else load_tokenizer(settings.init_from)


# ------------------------------------------------------------------------------ parts of the loop


def make_model(settings: argparse.Namespace, vocab_size: int, device: str) -> GPT2:
    """The model to train: new, or with given weights, or still to be filled by a resumed run."""
    if settings.resume:
        config = load_config(settings.out)
        return GPT2(config, settings.seed, settings.dtype, device, initialize=False)
    if settings.init_from == "scratch":
        config = GPT2Config(
            n_layer=settings.n_layer,
            n_head=settings.n_head,
            n_embd=settings.n_embd,
            vocab_size=vocab_size,
            n_positions=settings.block_size,
            embd_pdrop=settings.dropout,
            attn_pdrop=settings.dropout,
            resid_pdrop=settings.dropout,
        )
        return GPT2(config, settings.seed, settings.dtype, device)
    model = GPT2.from_pretrained(settings.init_from, device=device, dtype=settings.dtype)
    model.set_dropout(settings.dropout)
    return model


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


def sample(model: GPT2, corpus: Corpus, seed: int, length: int = 300) -> str:
    """A text the model writes on from the first tokens of the validation text."""
    prompt = corpus.validation[:8].astype(int)
    model.eval()
    ids = model.generate(prompt, max_new_tokens=length, temperature=0.8, top_k=40, seed=seed)
    model.train()
    return corpus.tokenizer.decode(ids)


def append_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def draw_loss_curve(out: Path) -> None:
    """Draw metrics.jsonl as loss.png: training and validation loss, the learning rate below."""
    from matplotlib.figure import Figure

    with open(out / "metrics.jsonl", encoding="utf-8") as file:
        by_step = {row["step"]: row for row in map(json.loads, file)}  # steps done again: the last
    rows = list(by_step.values())
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    losses.plot([r["step"] for r in rows], [r["train_loss"] for r in rows], lw=0.8, label="train")
    measured = [r for r in rows if "val_loss" in r]
    losses.plot(
        [r["step"] for r in measured], [r["val_loss"] for r in measured], "o-", label="validation"
    )
    losses.set_ylabel("loss (nats per token)")
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot([r["step"] for r in rows], [r["learning_rate"] for r in rows], color="grey")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.grid(alpha=0.3)
    with written_whole(out / "loss.png") as image:
        figure.savefig(image, format="png", dpi=120)


class StopSignals:
    """Ctrl-C and SIGTERM ask the loop to stop after this step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = 0  # the signal's number, once one has come
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number
        say("stopping after this step; once more to stop at once")


def say(message: str) -> None:
    """Tell the user something that is not a result: on stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
