"""This package as a model of lm-evaluation-harness, without a PyTorch model.

    python -m micrograd_gpt.evaluation.harness run --tasks hellaswag --model_args pretrained=out

is the harness's own command line, with `--model micrograd-gpt` unless it says otherwise. In Python:

    lm_eval.simple_evaluate(MicrogradGPT("out"), tasks=["hellaswag"])

Results equal those of the harness's own `--model hf` on the same model. Requests about one context
share its KV cache, which is what makes this faster on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from micrograd_gpt.arrays.devices import library_for
from micrograd_gpt.evaluation.answers import answers
from micrograd_gpt.evaluation.items import request_of, start_of_text
from micrograd_gpt.evaluation.scoring import TOKENS_AT_ONCE, Request, Score, score
from micrograd_gpt.generation.settings import Settings
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.template import Template
from micrograd_gpt.tuning.instructions import end_of_text
from micrograd_gpt.weights.language_model import load_language_model

try:
    import lm_eval.models  # noqa: F401  # registers its own, as it does not once ours is there
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    problem = f'lm-evaluation-harness is missing ({error}): pip install "micrograd-gpt[harness]"'
    if __name__ == "__main__":
        cli.say(f"error: {problem}")
        sys.exit(2)
    raise ImportError(problem) from error

NAME = "micrograd-gpt"
MOST_NEW_TOKENS = 256  # where a request does not say
OF_THE_HARNESS = ("max_batch_size", "trust_remote_code")  # said to any model, unasked or by a flag
NAMES_OF_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model(NAME)
class MicrogradGPT(LM):
    """A GPT2 of this package and its tokenizer.

    Args:
        pretrained: what weights/names.py can name, such as a folder or "124M"; or a GPT2 itself,
            and then its `tokenizer` too. None is chosen as in the scripts (language_model.py).
        device: "cpu", "gpu", or what the harness calls a GPU, "cuda:0", its default: the CPU
            computes where there is none.
        dtype: as for `GPT2.from_pretrained`.
        batch_size: how many contexts of the model have the tokens that are read at a time;
            None, "auto", "auto:4" or 1, the harness's default: as many as TOKENS_AT_ONCE.
        more: what the harness says to every model, which changes nothing here: OF_THE_HARNESS.

    Raises UserError for a model that cannot be loaded, and for any other argument.
    """

    def __init__(
        self,
        pretrained: str | GPT2 | None = None,
        tokenizer: Tokenizer | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(more.keys() - set(OF_THE_HARNESS))
        if tokenizer is not None and not isinstance(pretrained, GPT2):
            unknown.append("tokenizer")
        if unknown:
            fix = "give the adapter's folder as pretrained=" if "peft" in more else "leave it out"
            raise UserError(f"unknown model_args: {cli.listed(unknown)}: {fix}")
        if isinstance(pretrained, GPT2):
            assert tokenizer is not None, "a GPT2 comes with its tokenizer"
            self.model, self.encoder, self.template = pretrained, tokenizer, None
        else:
            loaded = load_language_model(pretrained, device_named(device), dtype)
            self.model, self.encoder, self.template = loaded
        self.name = pretrained if isinstance(pretrained, str) else "the model"
        self.chats = False  # until the harness asks for a chat
        contexts = int(batch_size or 1) if not str(batch_size).startswith("auto") else 1
        self.tokens_at_once = max(TOKENS_AT_ONCE, contexts * self.model.config.n_positions)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability of the continuation, and whether
        greedy decoding would write it."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(request.args[0], []).append(place)
        asked = [
            [
                request_of(context, requests[place].args[1], self.encoder, self.chats)
                for place in places
            ]
            for context, places in groups.items()
        ]
        found: dict[int, tuple[float, bool]] = {}
        for scores, places in self._scored(asked, list(groups.values()), disable_tqdm):
            for one, place in zip(scores, places, strict=True):
                found[place] = (one.log_prob, one.is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[place].args, found[place])
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text its log-probability, in windows that do not overlap but for the last."""
        texts = [self.encoder.encode(request.args[0]).tolist() for request in requests]
        start, limit = start_of_text(self.encoder), self.model.config.n_positions
        windows = [
            (place, window)
            for place, ids in enumerate(texts)
            for window in rolling_windows(ids, start, limit)
        ]
        totals = [0.0] * len(requests)
        asked, places = [[window] for _, window in windows], [[place] for place, _ in windows]
        for (one,), (place,) in self._scored(asked, places, disable_tqdm):
            totals[place] += one.log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, as the request says how, up to a stop text."""
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(place)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for places in alike.values():
                settings, stops = self._decoding(requests[places[0]].args[1])
                room = self.model.config.n_positions - settings.max_new_tokens
                prompts = [self._prompt(requests[place].args[0], room) for place in places]
                for i, answer in answers(self.model, self.encoder, prompts, settings, stops):
                    place = places[i]
                    found[place] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
                    bar.update()
        return found

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness keeps the requests of a chat under."""
        self._chat()
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = True) -> str:
        """What --apply_chat_template applies, in the form that Transformers has it in.

        Raises UserError for a model that has none, and for one that is asked for by name.
        """
        if isinstance(chat_template, str):
            raise UserError(
                f"there is no chat template {chat_template!r}: give --apply_chat_template alone"
            )
        return self._chat().chat_template()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the prompt of an answer, or of the rest of the answer that they end with."""
        end = self.encoder.tokens[end_of_text(self.encoder)].decode()
        text = self._chat().conversation(chat_history, end)
        return text if add_generation_prompt else text.removesuffix(end)

    def _chat(self) -> Template:
        """The template of a chat, in which the end-of-text after each answer is a token."""
        if self.template is None:
            raise UserError(
                f"{self.name} has no template of instructions: leave --apply_chat_template out"
            )
        self.chats = True
        return self.template

    def _scored(
        self, asked: list[list[Request]], places: list[list[int]], disable_tqdm: bool
    ) -> Iterator[tuple[list[Score], list[int]]]:
        """The scores of groups of requests, and where in the harness's list these are."""
        with tqdm(total=sum(map(len, places)), desc="scoring", disable=disable_tqdm) as bar:
            for i, scores in score(self.model, asked, self.tokens_at_once):
                yield scores, places[i]
                bar.update(len(scores))

    def _prompt(self, context: str, room: int) -> list[int]:
        """A context as ids, cut on the left to leave room for what is to be written."""
        ids = self.encoder.encode(context, self.chats).tolist() or [start_of_text(self.encoder)]
        return ids[-room:]

    def _decoding(self, asked: dict[str, Any]) -> tuple[Settings, list[str]]:
        """What a request says about decoding, and its stop texts.

        Raises UserError for what is unknown here, and where no room is left for a context.
        """
        how = dict(asked)
        until = how.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        given = [how.pop(name) for name in NAMES_OF_MOST if name in how]
        most = int(given[0]) if given else MOST_NEW_TOKENS
        if most >= self.model.config.n_positions:
            raise UserError(
                f"{most} new tokens leave no room in a context of {self.model.config.n_positions}: "
                "give a lower max_gen_toks"
            )
        temperature = float(how.pop("temperature", 0.0))
        draws = how.pop("do_sample", None)
        if draws is False or (draws is None and temperature == 0):
            temperature = 0.0
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
        if unknown := how.keys() - set(names):
            raise UserError(f"unknown here: {', '.join(sorted(unknown))}; leave it out")
        settings = Settings(
            max_new_tokens=most,
            temperature=temperature,
            end_of_text=self.encoder.end_of_text,
            vocab_size=self.encoder.vocab_size,
            **how,
        )
        return settings, stops


def device_named(name: str | None) -> str:
    """What the harness calls a device, as we call it."""
    if name is None or not name.startswith("cuda"):
        return name or "cpu"
    try:
        library_for("gpu")
    except UserError as problem:
        cli.say(f"note: computing on the CPU ({problem})")
        return "cpu"
    return "gpu"


def rolling_windows(ids: list[int], start: int, limit: int) -> list[Request]:
    """A text as windows that score each of its tokens once, the first after the token `start`.

    A window scores `limit` tokens, each from those before it in the window and one token more. The
    last window scores those that are left, with a context that is as long as fits.
    """
    text, requests = [start, *ids], []
    for begin in range(1, len(text), limit):
        end = min(begin + limit, len(text))
        requests.append(Request(text[max(0, end - limit - 1) : begin], text[begin:end]))
    return requests


def main(argv: Sequence[str] | None = None) -> int:
    """lm-evaluation-harness's command line, which then knows this model; returns the status."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given = list(sys.argv[1:] if argv is None else argv)
    flags = argparse.ArgumentParser(NAME, add_help=False)
    flags.add_argument("--model", "-M")
    flags.add_argument("--config", "-C")
    said, _ = flags.parse_known_args(given)
    if "run" in given and not said.model:
        values = EvaluatorConfig.load_yaml_config(said.config) if said.config else {}
        given += [] if values.get("model") else ["--model", NAME]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    cli.run(main)
