"""What surrounds the training loop: what a run says, measures and saves, and how it survives.

The loop in train_gpt2.py computes. Its `Recorder` reads the numbers, writes them down, saves, and
decides what happens when the disk is full or a number is not finite.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from micrograd_gpt.arrays.devices import resolve_device
from micrograd_gpt.arrays.precision import emulation_note
from micrograd_gpt.arrays.stand_ins import report
from micrograd_gpt.nn import Module
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.last_resort import at_signal, save_if_killed
from micrograd_gpt.runs.left_behind import leave_part, parts_left, remove_parts
from micrograd_gpt.runs.lock import OwnFolder
from micrograd_gpt.runs.loss_scaler import LossScaler
from micrograd_gpt.runs.metrics import Metrics
from micrograd_gpt.runs.ranks import Ranks
from micrograd_gpt.runs.sharding import Optimizer, answer_first, asking
from micrograd_gpt.runs.signals import StopSignals
from micrograd_gpt.runs.unread import Unread, read_numbers
from micrograd_gpt.runs.watch import Watch
from micrograd_gpt.support.cli import counted, quoted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import SAVING, remove_folder
from micrograd_gpt.support.files import remove_unfinished
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.weights.saving import write_model

SILENCE = 30  # seconds after which a log file gets a line, as a sign of life


class Data(Protocol):
    """What a run learns from, as far as its record says it."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def amount(self) -> str:
        """How much of what, in words."""

    @property
    def unit(self) -> str:
        """What the loss is the mean over, as a token."""


class Due(NamedTuple):
    """What happens after a step, as the flags --log-interval and so on have it."""

    log: bool
    evaluation: bool
    sample: bool
    save: bool


class Recorder:
    """Keeps the record of one run, in the folder `settings.out`.

    Creating one opens the folder (which removes an earlier run for --overwrite) and announces the
    run on stderr; `start()` then starts the clock, the progress bar and the signal handlers. Raises
    UserError if a resumed run is complete already, or if the folder cannot be written. `write` puts
    the model and its tokenizer into a folder, as `write_model` does. `tokens_per_step` is the most
    that a step has, if that is not a full batch of `settings.block_size` each. Of several `ranks`
    the first keeps the record; the others only decide as it does.
    """

    def __init__(
        self,
        settings: argparse.Namespace,
        data: Data,
        model: Module,
        optimizer: Optimizer,
        scaler: LossScaler,
        write: Callable[..., None] = write_model,
        tokens_per_step: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:

        self.settings, self.data, self._write = settings, data, write
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.out, self.ranks = Path(settings.out), ranks or Ranks()
        if settings.resume:
            if self.ranks.is_first:
                checkpoint.keep_best(self.out)
            is_complete = optimizer.steps >= settings.max_steps
            if is_complete and not checkpoint.lacks_scores(self.out, settings):
                raise UserError(
                    f"the run in {self.out} is complete at step {optimizer.steps}; "
                    "give a larger --max-steps to continue it"
                )
        self.val_loss: float | None = None  # of the latest step, if it was measured
        self._on_cpu = resolve_device(settings.device) == "cpu"
        self._unread = Unread()
        self._train_loss = self._grad_norm = math.nan  # of the step that was looked at last
        self._saved_step = optimizer.steps
        self._varies = tokens_per_step is not None  # how many tokens a step has
        self._tokens_per_step = tokens_per_step or (
            settings.batch_size * settings.grad_accum_steps * settings.block_size
        )
        self._tokens = 0  # taken since the last row
        self._row: dict[str, Any] | None = None  # of the step that was measured last
        self._is_changing = False  # the optimizer is taking a step, or its row is not there yet
        self._is_dying = False  # the launcher will kill us soon
        self._saver: int | None = None  # a process that saves once we are killed
        self.best_loss = math.inf
        self.ranks.way_back = self._way_back
        if self.ranks.is_first:
            self._open_folder()
            self._announce()

    def _open_folder(self) -> None:
        steps = self.optimizer.steps
        self.metrics = Metrics(self.out, steps, self.settings.tensorboard)
        self._folder = OwnFolder(self.out)
        if self.settings.overwrite:
            checkpoint.remove_run(self.out)
        remove_unfinished(self.out)
        remove_parts(self.out)
        self.watch = Watch(self.metrics, steps, self.settings.watch, self.data.unit)
        self.best_loss = checkpoint.best_loss(self.out, vars(self.settings))
        if self.best_loss == math.inf and checkpoint.holds_run(self.out / checkpoint.BEST):
            say(
                f"note: {self.out / checkpoint.BEST} was chosen by other validation text, or with "
                "other --eval-batches: the next validation replaces it"
            )

    def _announce(self) -> None:
        if damaged := self.metrics.damaged_lines():
            say(
                f"warning: {self.metrics.path}: {counted(len(damaged), 'damaged line')} will be "
                f"ignored, the first is line {damaged[0]}"
            )
        if self.optimizer.steps >= self.settings.max_steps:
            say(f"the run in {self.out} is complete but for its scores, which come now")
            return
        count = sum(parameter.size for parameter in self.optimizer.parameters)
        most = "at most " if self._varies else ""
        say(
            f"training {count:,} parameters on {self.data.amount()} "
            f"({most}{self._tokens_per_step:,} tokens a step) from step {self.optimizer.steps}; "
            f"writing to {self.out}/"
        )
        if self.ranks.size > 1:
            say(self.ranks.description)
            return
        for flag, default in (("--reduce-dtype", "float32"), ("--shard-optimizer", False)):
            if vars(self.settings).get(flag[2:].replace("-", "_"), default) != default:
                say(f"note: {flag} is for several ranks; this is one process")

    def _way_back(self) -> str:
        latest = checkpoint.last_good(self.out, self.optimizer.steps + 1)
        return f"the last good checkpoint: {latest}"

    def start(self) -> None:
        """The loop begins: start the clock and the progress bar, and let Ctrl-C stop it gently."""
        if self.ranks.is_first:
            self._tell_how_it_goes()
        self._bar = tqdm(
            total=self.settings.max_steps,
            initial=self.optimizer.steps,
            unit="step",
            disable=None,
            smoothing=0.05,
        )
        self._signals = StopSignals(self.ranks.check_alive)
        saves = self.ranks.is_first or self.ranks.shards
        if self.ranks.deadly and saves and self._on_cpu:  # a fork has no GPU
            at_signal(self.ranks.deadly, self._on_deadly_signal)
        self._last_time = time.perf_counter()
        before = self.metrics.seconds if self.ranks.is_first else 0.0
        self._started = self._last_time - before  # a resumed run's time goes on
        self._last_said, self._has_measured = monotonic(), False

    def _tell_how_it_goes(self) -> None:
        s = self.settings
        if note := emulation_note(s.dtype, resolve_device(s.device)):
            say(note)
        if s.warmup_steps > s.max_steps:
            say(
                f"note: --warmup-steps {s.warmup_steps} is longer than --max-steps {s.max_steps}: "
                f"the learning rate stays below {s.learning_rate:g}"
            )
        if self._on_cpu:
            say(f"CPU kernels: {report()}")

    def _on_deadly_signal(self) -> None:
        """Have the latest whole step saved though the launcher is about to kill us."""
        if not self.ranks.all_well():
            return  # the launcher does the same where a rank has died or failed
        self._is_dying = True
        if not self._is_changing:  # else _step_is_whole knows when to do it
            self._save_if_killed()

    def _step_is_whole(self) -> None:
        self._is_changing = False
        if self._is_dying:
            self._save_if_killed()

    def _save_if_killed(self) -> None:
        """Have this step saved, and no earlier one: of several ranks all can have come to it."""
        earlier, self._saver = self._saver, save_if_killed(self._save_if_newer)
        if earlier is not None:
            os.kill(earlier, signal.SIGKILL)

    def _save_if_newer(self) -> None:
        if self._is_changing:
            return
        if not self.ranks.is_first:
            leave_part(self.optimizer, self.out)
            return
        done, row = self.optimizer.steps, self._row
        self._folder.check()
        remove_unfinished(self.out)  # such as loss.png, which it was drawing
        remove_folder(self.out / SAVING)  # whose room on the disk may be what is missing
        if checkpoint.saved_step(self.out) >= done:
            return
        with parts_left(self.optimizer, self.out):
            self._save()
        # A validation comes before its step's row is written.
        if row and row["step"] == done and done not in {r["step"] for r in self.metrics.rows()}:
            self.metrics.append(row)

    @property
    def stopped(self) -> int:
        """The number of the signal that asked the run to stop; 0 as long as none has."""
        return self._signals.requested

    def say(self, message: str) -> None:
        """Tell the user something, above the progress bar."""
        say(message, self._bar)
        self._last_said = monotonic()

    # ------------------------------------------------------------------- one step, in order

    def due_after(self, step: int) -> Due:
        """What happens now that `step`, counted from 0, has been taken."""
        due = self._due(step)
        if not due.log:  # else measure() comes first
            self._step_is_whole()
        return due

    def _due(self, step: int) -> Due:
        s, done = self.settings, step + 1
        last = done == s.max_steps  # whose sample and checkpoint are the run's own
        evaluation = done % s.eval_interval == 0 or last
        return Due(
            log=done % s.log_interval == 0 or evaluation,
            evaluation=evaluation,
            sample=done % s.sample_interval == 0 and not last,
            save=done % s.save_interval == 0 and not last,
        )

    def accepts(
        self, step: int, losses: Sequence[Any], grad_norm: Any, tokens: int | None = None
    ) -> bool:
        """Whether the optimizer may take this step, given its losses and its gradient norm.

        False if float16 overflowed: the loss scale is lower now, and the step must be tried again.
        Reading numbers from a GPU means waiting for it, so they are read only when something is due
        (in float16 at every step). Raises UserError if a number that is read is not finite, also
        one of an earlier step. `tokens` is how many the step had, if not as many as it can have.
        """
        if self.scaler.enabled:
            *losses, grad_norm = read_numbers([*losses, grad_norm])
            if not self._fits_float16(step, grad_norm):
                return False
        self._unread.add(step, losses, grad_norm)
        self._tokens += self._tokens_per_step if tokens is None else tokens
        self.val_loss = None
        due = self._due(step)
        if self._on_cpu or due.log or due.sample or due.save or self.stopped:
            self._look()
        self._bar.update()
        self._show_life(step + 1)
        self._is_changing = True
        return True

    def _show_life(self, done: int) -> None:
        """Show the loss before it is measured first, and where there is no bar, at times a line."""
        if self._bar.disable and monotonic() - self._last_said >= SILENCE:
            self._look()
            self.say(
                f"step {done:5d} of {self.settings.max_steps}   train loss {self._train_loss:.3f}"
            )
        elif self._on_cpu and not self._has_measured:
            self._bar.set_postfix_str(f"loss {self._train_loss:.3f}")

    def _fits_float16(self, step: int, grad_norm: float) -> bool:
        before = self.scaler.scale
        try:
            fits = self.scaler.update(grad_norm)
        except FloatingPointError:
            raise UserError(
                f"step {step}: the gradients overflow float16 even at a loss scale of {before:g}: "
                "try --dtype bfloat16 or a smaller --learning-rate; the last good checkpoint: "
                f"{checkpoint.last_good(self.out, step)}"
            ) from None
        if self.scaler.scale != before:
            self.say(f"step {step}: the loss scale is now {self.scaler.scale:.0f}")
        return fits

    def _look(self) -> None:
        for step, loss, norm in self._unread.read():
            self._train_loss, self._grad_norm = loss, norm
            if not math.isfinite(loss) or not math.isfinite(norm):
                batches = micro_batches(step, self.settings)
                numbers = "-".join(map(str, sorted({batches[0], batches[-1]})))
                raise UserError(
                    f"step {step}: the loss is {loss}, the gradient norm {norm}, in batch "
                    f"{numbers} of seed {self.settings.seed}; the last good checkpoint: "
                    f"{checkpoint.last_good(self.out, step)}; try a smaller --learning-rate"
                )

    def measure(self) -> dict[str, Any]:
        """A row of metrics.jsonl for the step just taken, shown on the progress bar too."""
        now, done = time.perf_counter(), self.optimizer.steps
        seconds = now - self._last_time
        row = {
            "step": done,
            "train_loss": self._train_loss,
            "learning_rate": self.optimizer.lr,
            "grad_norm": self._grad_norm,
            "tokens_per_second": round(self._tokens / seconds, 1),
            "elapsed_seconds": round(now - self._started, 2),
        }
        if self.scaler.enabled:
            row |= {"loss_scale": self.scaler.scale, "skipped_steps": self.scaler.skipped_steps}
        self._row, self._has_measured = row, True
        self._step_is_whole()
        self._bar.set_postfix_str(
            f"loss {self._train_loss:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
        )
        return row

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl; with a `val_loss`, say it and redraw loss.png too."""
        self.val_loss = row.get("val_loss")
        if not self.ranks.is_first:
            return
        if self.val_loss is not None:
            right = f"   accuracy {row['val_accuracy']:.1%}" if "val_accuracy" in row else ""
            self.say(
                f"step {row['step']:5d}   train loss {row['train_loss']:.3f}   validation loss "
                f"{self.val_loss:.3f}{right}   {row['tokens_per_second']:,.0f} tokens/s"
            )
        self._attempt(self._append, row)
        self._tokens, self._last_time = 0, time.perf_counter()
        if self.val_loss is not None:
            self._attempt(self.metrics.draw, self.data.unit, needed=False)
        self._attempt(self.watch.draw, self.settings.max_steps, needed=False)

    def show_sample(self, text: str) -> None:
        """Say what the model writes now, and keep it for watch.html."""
        self.say(f"--- sample\n{text}\n---")
        self.keep_sample(text)

    def keep_sample(self, text: str) -> None:
        """Show in watch.html what the model writes now."""
        done, max_steps = self.optimizer.steps, self.settings.max_steps
        self._attempt(self.watch.add_sample, done, text, needed=False)
        self._attempt(self.watch.draw, max_steps, done < max_steps, needed=False)

    def save_if_due(self) -> None:
        """Save if --save-interval says so, or the validation loss is the lowest so far."""
        done = self.optimizer.steps
        if self._due(done - 1).save or (done < self.settings.max_steps and self._is_best()):
            self._attempt(self._save)

    def _is_best(self) -> bool:
        """Whether rank 0, which knows the other losses, finds this validation loss the lowest."""
        if self.val_loss is None:
            return False
        return bool(self.ranks.agree(self.ranks.is_first and self.val_loss < self.best_loss))

    def finish(self) -> int:
        """The loop is over: save what is not saved yet and draw the curves; returns `stopped` of
        any rank.

        A first signal that comes meanwhile is heeded only after that. Raises UserError if the run
        cannot be saved.
        """
        self._bar.close()
        if self.ranks.agree(self._saved_step < self.optimizer.steps):  # if rank 0 failed to save
            self._save()
        if self.ranks.is_first:
            self._attempt(self.metrics.draw, self.data.unit, needed=False)
            self._attempt(self.watch.draw, self.settings.max_steps, False, needed=False)
        stopped = self.ranks.agree(self.stopped)
        if stopped:
            done = self.optimizer.steps
            lacks = checkpoint.lacks_scores(self.out, self.settings)
            can_resume = done > 0 and (done < self.settings.max_steps or lacks)
            how = f"; continue with --resume --out {quoted(self.out)}" if can_resume else ""
            say(f"stopped after step {done}{how}")
        return stopped

    # -------------------------------------------------------------------- writing to the disk

    def _save(self) -> None:
        self._look()  # nothing is saved that is not known to be good
        done = self.optimizer.steps
        if not self.ranks.is_first:
            answer_first(self.optimizer)
            self._saved_step = done
            return
        with asking(self.optimizer):
            self._folder.check()
            try:
                checkpoint.save_run(
                    self.out,
                    self.model,
                    self.data.tokenizer,
                    self.optimizer,
                    vars(self.settings),
                    self.val_loss,
                    self.settings.keep,
                    self.scaler,
                    self._write,
                )
            except UserError as error:
                latest = checkpoint.last_good(self.out, done + 1)
                raise UserError(f"{error}; the last checkpoint: {latest}") from error
        self._saved_step = done
        if self.val_loss is not None:
            self.best_loss = min(self.best_loss, self.val_loss)

    def _append(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl; if that fails and stops the run, save the run first."""
        self._folder.check()
        try:
            self.metrics.append(row)
        except UserError as error:
            if self.settings.on_save_error == "continue":
                raise
            if self.ranks.shards:  # the others do not know that rank 0 would need their moments
                raise UserError(f"{error}; {self._way_back()}") from error
            self._save()
            raise UserError(f"{error}; the run is saved after step {row['step']}") from error

    def _attempt(self, write: Callable[..., None], *args: Any, needed: bool = True) -> None:
        """Write to the disk; on failure stop if it was `needed` and --on-save-error says stop."""
        try:
            write(*args)
        except UserError as error:
            if needed and self.settings.on_save_error == "stop":
                raise
            self.say(f"warning: {error}; the run goes on")


def micro_batches(step: int, settings: argparse.Namespace) -> range:
    """The numbers of the micro-batches that make up a step."""
    count = settings.grad_accum_steps
    return range(step * count, (step + 1) * count)
