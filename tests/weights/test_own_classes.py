"""Classes of one's own: from_pretrained gives back the class, the settings and the numbers that
were saved, or stderr says what it will not."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import micrograd_gpt
from micrograd_gpt import functional as F
from micrograd_gpt import nn, no_grad
from micrograd_gpt.gpt2 import GPT2, Block, GPT2Config
from micrograd_gpt.nn import Parameter
from micrograd_gpt.optim import AdamW
from micrograd_gpt.runs.checkpoint import load_run, save_run
from micrograd_gpt.support.cli import say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.variants import VariantConfig, VariantGPT2
from micrograd_gpt.weights.config import read_config

SHAPE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 11,
    "n_positions": 6,
}
IDS = [[1, 2, 3]]
TOKENIZER = CharTokenizer.from_text("abcdefghijk")


def logits(model: GPT2) -> np.ndarray:
    with no_grad():
        return model.eval()(IDS).numpy()


def assert_comes_back(model: GPT2, folder: Path, **options: Any) -> GPT2:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder, **options)
    assert type(again) is type(model)
    assert type(again.config) is type(model.config) and again.config == model.config
    np.testing.assert_array_equal(logits(again), logits(model))
    return again


# ------------------------------------------------------------------------------- which class


class SoftCap(VariantGPT2):
    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return (super().__call__(ids, cache, last_only) / 0.1).tanh() * 0.1


class Capped(GPT2):
    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return (super().__call__(ids, cache, last_only) / 0.1).tanh() * 0.1


CHOICES: list[dict[str, Any]] = [
    {},
    {"activation_function": "silu"},
    {"tie_word_embeddings": False},
    {"norm_position": "post", "position_embedding": "sinusoidal"},
    {"n_inner": 12, "scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cls", [VariantGPT2, SoftCap])
def test_a_variant_or_a_class_of_one_s_own_of_it_comes_back_as_that_class(
    cls: type[VariantGPT2], choice: dict[str, Any], tmp_path: Path
) -> None:
    assert_comes_back(cls(VariantConfig(**SHAPE, **choice), seed=3), tmp_path)


def test_gpt2_and_variantgpt2_read_each_others_folders(tmp_path: Path) -> None:
    plain, silu = GPT2(GPT2Config(**SHAPE)), {**SHAPE, "activation_function": "silu"}
    plain.save_pretrained(tmp_path / "plain")
    VariantGPT2(VariantConfig(**silu)).save_pretrained(tmp_path / "silu")
    as_variant = VariantGPT2.from_pretrained(tmp_path / "plain")
    assert type(as_variant) is VariantGPT2 and as_variant.config == VariantConfig(**SHAPE)
    np.testing.assert_array_equal(logits(as_variant), logits(plain))
    assert type(GPT2.from_pretrained(tmp_path / "silu")) is VariantGPT2
    assert type(GPT2.from_pretrained(tmp_path / "plain")) is GPT2


@pytest.mark.parametrize("choice", CHOICES[1:])
def test_a_class_that_would_ignore_a_setting_is_not_given_it(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    VariantGPT2(VariantConfig(**SHAPE, **choice)).save_pretrained(tmp_path)
    message = rf"(?s)^(?!.*\n){tmp_path}.*({'|'.join(choice)}) is .*which Capped does not read: "
    with pytest.raises(UserError, match=message + "derive Capped from VariantGPT2"):
        Capped.from_pretrained(tmp_path)


def test_a_class_of_one_s_own_reads_openai_s_format() -> None:
    folder = Path(__file__).parents[1] / "data" / "tf_checkpoint" / "saver"
    capped, plain = Capped.from_pretrained(folder), GPT2.from_pretrained(folder)
    assert type(capped) is Capped
    np.testing.assert_allclose(logits(capped), np.tanh(logits(plain) / 0.1) * 0.1, rtol=1e-5)
    soft = SoftCap.from_pretrained(folder)
    assert type(soft) is SoftCap and soft.config == VariantConfig(**vars(plain.config))
    np.testing.assert_array_equal(logits(soft), logits(capped))


def own_named(name: str) -> type[GPT2]:
    return type(name, (Capped,), {"__module__": "poems"})


@pytest.mark.parametrize(
    ("cls", "called"),
    [
        (Capped, "Capped"),
        (own_named("GPT2ForPoems"), "GPT2ForPoems"),
        (own_named("GPT2"), "poems.GPT2"),
        (own_named("GPT2LMHeadModel"), "poems.GPT2LMHeadModel"),
    ],
)
def test_loading_it_as_a_gpt2_is_said(
    cls: type[GPT2], called: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers' users see from config.json, too, that it is no plain GPT-2."""
    cls(GPT2Config(**SHAPE)).save_pretrained(tmp_path)
    cls.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    GPT2.from_pretrained(tmp_path).save_pretrained(tmp_path / "plain")
    line = f"was saved by a class '{called}', and is loaded as a GPT2\n"
    assert capsys.readouterr().err == f"note: {tmp_path}/model.safetensors {line}"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [called]
    GPT2.from_pretrained(tmp_path / "plain")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "architectures",
    [None, "GPT2LMHeadModel", 3, *[[f"GPT2{it}"] for it in ("Model", "ForTokenClassification")]],
)
def test_a_config_of_transformers_needs_no_note(
    architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2(GPT2Config(**SHAPE)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "architectures": architectures}))
    GPT2.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ its settings


@dataclasses.dataclass
class RopeConfig(GPT2Config):
    rope_theta: float = 10000.0
    cap: float | None = None
    name: str = "rope"
    is_causal: bool = True
    windows: list[int] = dataclasses.field(default_factory=list)
    head_size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.head_size = self.n_embd // self.n_head


class Rope(GPT2):
    config: RopeConfig
    config_class = RopeConfig

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return super().__call__(ids, cache, last_only) * self.config.rope_theta


def test_settings_of_one_s_own_come_back(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rope_theta": 500.0, "cap": 1.5, "name": "é", "windows": [3, 4]}
    config = RopeConfig(**SHAPE, **settings, is_causal=False, resid_pdrop=0.5)
    assert_comes_back(Rope(config), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert {key: values[key] for key in settings} == settings and values["is_causal"] is False
    assert read_config(tmp_path) == GPT2Config(**SHAPE, resid_pdrop=0.5)
    (tmp_path / "config.json").write_text(json.dumps(values | {"head_size": 9, "name": "x"}))
    again = Rope.from_pretrained(tmp_path)  # what a config works out is not taken from there
    assert again.config == dataclasses.replace(config, name="x") and again.config.head_size == 4
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_theta": 7.0, "n_head": 3}))
    with pytest.raises(UserError, match=r"n_embd \(8\) must be a multiple of n_head \(3\)"):
        Rope.from_pretrained(tmp_path)


def test_a_setting_that_a_folder_lacks_keeps_its_default(tmp_path: Path) -> None:
    GPT2(GPT2Config(**SHAPE)).save_pretrained(tmp_path)
    again = Rope.from_pretrained(tmp_path)
    assert again.config == RopeConfig(**SHAPE) and again.config.head_size == 4


def test_a_setting_that_the_class_refuses_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Positive(RopeConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            if self.rope_theta < 0:
                raise ValueError("rope_theta must be positive")

    class Mine(Rope):
        config_class = Positive

    Rope(RopeConfig(**SHAPE, rope_theta=-1.0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/\S+: rope_theta must be positive$"):
        Mine.from_pretrained(tmp_path)


def test_numbers_of_numpy_are_settings(tmp_path: Path) -> None:
    assert_comes_back(Rope(RopeConfig(**SHAPE, rope_theta=np.float32(0.1))), tmp_path)  # type: ignore[arg-type]


def test_a_variant_s_config_may_have_settings_of_one_s_own(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class CapConfig(VariantConfig):
        cap: float = 1.0

    class Mine(SoftCap):
        config_class = CapConfig

    config = CapConfig(**SHAPE, cap=2.5, activation_function="relu", tie_word_embeddings=False)
    assert_comes_back(Mine(config), tmp_path)


class NoConfigClass(GPT2):
    pass


@dataclasses.dataclass
class Named(GPT2Config):
    dtype: str = "bfloat16"  # which config.json says of the file
    activation_function: str = "gelu_new"


class OfNamed(GPT2):
    config_class = Named


class Undecorated(GPT2Config):
    theta: float = 1.0


class OfUndecorated(GPT2):
    config_class = Undecorated


class AsTransformersHasIt(GPT2Config):
    def __init__(self, theta: float = 1.0, **shape: Any) -> None:
        super().__init__(**shape)
        self.theta = theta


class OfThat(GPT2):
    config_class = AsTransformersHasIt


@dataclasses.dataclass
class Placed(GPT2Config):
    position_embedding: str = "rope"


class OfPlaced(GPT2):
    config_class = Placed


class Norm(str, enum.Enum):
    RMS = "rms"


@dataclasses.dataclass
class ByName(GPT2Config):
    pruned: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pruned[1]


class OfByName(GPT2):
    config_class = ByName


def rope(**settings: Any) -> Rope:
    return Rope(RopeConfig(**SHAPE, **settings))


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (
            lambda: NoConfigClass(RopeConfig(**SHAPE)),
            "make a GPT2Config of the model's RopeConfig: say config_class = RopeConfig in",
        ),
        (lambda: NoConfigClass(VariantConfig(**SHAPE)), "say config_class = VariantConfig"),
        (lambda: VariantGPT2(type("Own", (VariantConfig,), {})(**SHAPE)), "config_class = Own"),
        (lambda: OfNamed(Named(**SHAPE)), "gives Named.dtype back as 'float32', not 'bfloat16': "),
        (
            lambda: OfNamed(Named(**SHAPE, activation_function="mish")),
            "will not take the Named that was saved: config.json: activation_function must be",
        ),
        (lambda: OfPlaced(Placed(**SHAPE)), "config.json: position_embedding must be one of"),
        (lambda: OfByName(ByName(**SHAPE, pruned={1: [2]})), "will not take the ByName that was"),
        (lambda: OfThat(AsTransformersHasIt(2.0, **SHAPE)), "not keep AsTransformersHasIt.theta"),
        (lambda: rope(cap=np.zeros(3)), "RopeConfig.cap back as None, not array([0., 0., 0.]): "),
        (lambda: rope(name=print), "RopeConfig.name back as 'rope', not <built-in function print>"),
        (lambda: rope(name=Norm.RMS), "RopeConfig.name back as 'rms', not <Norm.RMS: 'rms'>"),
        (lambda: rope(name={1: [2]}), "RopeConfig.name back as {'1': [2]}, not {1: [2]}"),
        (lambda: rope(windows=[{1, 2}]), "RopeConfig.windows back as [], not [{1, 2}]"),
        (lambda: rope(windows=(3, 4)), "RopeConfig.windows back as [3, 4], not (3, 4)"),
    ],
)
def test_a_setting_that_would_not_come_back_is_said_once(
    make: Callable[[], GPT2], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are saved all the same: a run of hours does not end for a setting."""
    say_once.cache_clear()
    model = make()
    for name in "ab":
        model.save_pretrained(tmp_path / name)
    said = capsys.readouterr().err
    assert said.startswith("note: ") and said.count("\n") == 1 and note in said
    arrays = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    assert arrays.keys() == dict(model.named_parameters()).keys()
    json.loads((tmp_path / "a" / "config.json").read_text())


def test_a_run_with_such_settings_is_saved_and_goes_on(tmp_path: Path) -> None:
    model = rope(windows=(3, 4), name=print)
    save_run(tmp_path, model, TOKENIZER, AdamW(model.parameters()), {})
    again = Rope.from_pretrained(tmp_path)
    load_run(tmp_path, again, AdamW(again.parameters()))
    again.config.windows.append(5)
    with pytest.raises(UserError, match=r"saved with windows \[3, 4\], .* now says \[3, 4, 5\]"):
        load_run(tmp_path, again, AdamW(again.parameters()))


def test_settings_that_come_back_need_no_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_comes_back(OfUndecorated(Undecorated(**SHAPE)), tmp_path / "a")
    rope(cap=math.nan, windows=[[1], {"a": None}]).save_pretrained(tmp_path / "b")
    assert capsys.readouterr().err == ""
    again = Rope.from_pretrained(tmp_path / "b").config
    assert math.isnan(again.cap) and again.windows == [[1], {"a": None}]


# ------------------------------------------------------------------------- how it is made


class ConfigAlone(GPT2):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.extra = nn.Linear(8, 2)


class ConfigAndSeed(ConfigAlone):
    def __init__(self, config: GPT2Config, seed: int = 1) -> None:
        super().__init__(config)


class PassedOn(GPT2):
    def __init__(self, config: GPT2Config, **options: Any) -> None:
        super().__init__(config, **options)


@pytest.mark.parametrize("cls", [ConfigAlone, ConfigAndSeed, PassedOn])
def test_a_signature_of_one_s_own(cls: Callable[[GPT2Config], GPT2], tmp_path: Path) -> None:
    model = cls(GPT2Config(**SHAPE))
    for p in model.parameters():
        p.data = p.data + 0.5
    assert_comes_back(model, tmp_path)
    for dtype in ("float64", "bfloat16", "int8"):
        held = type(model).from_pretrained(tmp_path, dtype=dtype)
        weights = held.transformer.h[1].mlp.c_fc.weight
        assert weights.dtype == dtype and np.isfinite(logits(held)).all()


# ------------------------------------------------------------------------- its parameters


class Untied(GPT2):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, nn.normal(5))
        self.lm_head.bias.data += 0.25

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        x = self.hidden(ids, cache)
        return self.lm_head(x[:, -1:] if last_only else x)


class UntiedRows(Untied):
    def __init__(self, config: GPT2Config) -> None:
        GPT2.__init__(self, config)
        self.lm_head: Any = nn.Embedding(config.vocab_size, config.n_embd, nn.normal(5))

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        return F.linear(self.hidden(ids, cache), self.lm_head.weight.T)


class TiedByName(UntiedRows):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lm_head.weight = self.transformer.wte.weight


def tied(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_a_head_of_its_own_is_filled_as_any_other_parameter(tmp_path: Path) -> None:
    again = assert_comes_back(Untied(GPT2Config(**SHAPE)), tmp_path / "a")
    assert not tied(tmp_path / "a")
    assert_comes_back(again, tmp_path / "b")
    with pytest.raises(UserError, match=r"does not have: 'lm_head\.bias'"):
        GPT2.from_pretrained(tmp_path / "a")
    model = UntiedRows(GPT2Config(**SHAPE))
    assert_comes_back(model, tmp_path / "c")
    np.testing.assert_array_equal(logits(GPT2.from_pretrained(tmp_path / "c")), logits(model))
    assert_comes_back(TiedByName(GPT2Config(**SHAPE)), tmp_path / "d")
    assert tied(tmp_path / "d")


EDITS = {
    "    layer_norm_epsilon: float = 1e-5\n": "    cap: float = 0.01\n",
    "        self.transformer = Transformer(config, init or normal(seed), self.draws)\n": (
        "        self.lm_head = Linear(config.n_embd, config.vocab_size, init or normal(7))\n"
    ),
    "        x = x[:, -1:] if last_only else x\n": (
        "        return (self.lm_head(x) / self.config.cap).tanh() * self.config.cap\n"
    ),
}
# A constant table, more blocks, one of them twice, and settings by the names that variants have
MORE_EDITS = {
    "    n_positions: int = 1024  # the longest context, in tokens\n": (
        '    activation_function: str = "swiglu"\n    position_embedding: str = "rope"\n'
    ),
    "        self.wpe = Embedding(c.n_positions, c.n_embd, init, std=0.01)\n": (
        "        self.wpe.weight = Tensor(np.ones((c.n_positions, c.n_embd), np.float32))\n"
    ),
    "        self.h = [Block(c, init, draws) for _ in range(c.n_layer)]\n": (
        "        self.h += [Block(c, init, draws), self.h[0]]\n"
    ),
}
SAVED_AND_LOADED = """
from pathlib import Path
from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.weights.saving import write_model
model = GPT2(GPT2Config(2, 2, 8, 11, 6), seed=3)
Path("model").mkdir()
write_model(model, Path("model"))  # as training does
again = GPT2.from_pretrained("model")
assert type(again) is GPT2 and again.config == model.config
with no_grad():
    difference = again([[1, 2]]).numpy() - model([[1, 2]]).numpy()
print(difference.any())
"""


@pytest.mark.parametrize(
    ("edits", "as_unedited"),
    [
        (EDITS, r"does not have: 'lm_head\.bias' and 1 more"),
        (MORE_EDITS, "position_embedding must be one of .*, not 'rope'"),
        ({**EDITS, **MORE_EDITS}, "position_embedding must be one of .*, not 'rope'"),
    ],
)
def test_a_gpt2_that_was_edited_in_its_file_comes_back(
    edits: dict[str, str], as_unedited: str, tmp_path: Path
) -> None:
    """A setting in GPT2Config and a head in GPT2: the class of all scripts is one's own then."""
    shutil.copytree(
        Path(micrograd_gpt.__file__).parent,
        tmp_path / "micrograd_gpt",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    source = (tmp_path / "micrograd_gpt" / "gpt2.py").read_text("utf-8")
    for line, added in edits.items():
        assert source.count(line) == 1
        source = source.replace(line, line + added)
    (tmp_path / "micrograd_gpt" / "gpt2.py").write_text(source, "utf-8")
    result = subprocess.run(
        [sys.executable, "-c", SAVED_AND_LOADED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "MICROGRAD_GPT_KERNELS": "numpy"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr
    assert "was saved by" not in result.stderr
    with pytest.raises(UserError, match=as_unedited):
        GPT2.from_pretrained(tmp_path / "model")  # which was not edited


def test_a_head_that_is_still_a_copy_of_the_embedding_comes_back(tmp_path: Path) -> None:
    """Also from the folder of an earlier version, which said that it is tied."""
    model = UntiedRows(GPT2Config(**SHAPE))
    model.lm_head.weight.data = model.transformer.wte.weight.data.copy()
    assert_comes_back(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    np.testing.assert_array_equal(logits(UntiedRows.from_pretrained(tmp_path)), logits(model))


def test_a_head_of_its_own_in_a_variant_that_says_it_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own(VariantGPT2):
        def __init__(self, config: VariantConfig) -> None:
            super().__init__(config)
            self.lm_head: Any = nn.Linear(8, 11)

    Own(VariantConfig(**SHAPE, tie_word_embeddings=False)).save_pretrained(tmp_path / "untied")
    assert capsys.readouterr().err == ""
    Own(VariantConfig(**SHAPE)).save_pretrained(tmp_path / "tied")
    assert "tie_word_embeddings back as False, not True" in capsys.readouterr().err
    Own.from_pretrained(tmp_path / "tied")


class OwnNames(GPT2):
    """Parameters by names that mean something else in files of others."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        for i, block in enumerate(self.transformer.h):
            block.attn.bias = Parameter(np.full(3, i + 1.0, np.float32))  # type: ignore[attr-defined]
        self.ln_f, self.h = nn.LayerNorm(8), [nn.Linear(8, 8, nn.normal(7))]
        self.ln_f.bias.data += 0.125
        self.score = Parameter(np.array(2.0, np.float32))

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        x = self.h[0](self.ln_f(self.hidden(ids, cache))) * self.score
        for block in self.transformer.h:
            x = x + block.attn.bias.sum()  # type: ignore[attr-defined]
        return F.linear(x, self.transformer.wte.weight.T)


def shares(change: Callable[[list[Block]], Any]) -> type[GPT2]:
    """A class of one's own whose blocks share weights, as ALBERT's do."""

    class Shares(GPT2):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            change(self.transformer.h)
            self.body = self.transformer  # another name of the whole

    return Shares


def one_block(h: list[Block]) -> None:
    h[:] = [h[0]] * len(h)


def first_block_again(h: list[Block]) -> None:
    h.append(h[0])


def one_mlp(h: list[Block]) -> None:
    for block in h:
        block.mlp = h[0].mlp


def last_block_dropped(h: list[Block]) -> None:
    h.pop()


def test_parameters_lie_in_memory_as_in_a_new_model(tmp_path: Path) -> None:
    class Low(GPT2):
        def __init__(self, config: GPT2Config, seed: int = 0, init: Any = None) -> None:
            super().__init__(config, seed, init)
            self.low = Parameter((init or nn.normal(seed))((config.n_embd, 4), 0.1))
            self.table = nn.Embedding(config.vocab_size + 5, config.n_embd, init or nn.normal(1))

    model = Low(GPT2Config(**SHAPE))
    again = assert_comes_back(model, tmp_path)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert a.data.strides == b.data.strides  # or products would round otherwise


class Shifted(GPT2):
    def __init__(self, config: GPT2Config, seed: int = 0, init: Any = None) -> None:
        super().__init__(config, seed, init)
        for block in self.transformer.h:
            block.shift = Parameter((init or nn.normal(seed))((config.n_embd,), 0.5))


def test_vectors_that_init_draws_are_each_block_s_own_in_int8(tmp_path: Path) -> None:
    model = Shifted(GPT2Config(**SHAPE))
    model.transformer.h[1].shift.data += 1
    model.save_pretrained(tmp_path)
    again = Shifted.from_pretrained(tmp_path, dtype="int8")
    for a, b in zip(again.transformer.h, model.transformer.h, strict=True):
        np.testing.assert_array_equal(a.shift.data, b.shift.data)


CHANGES = [one_block, first_block_again, one_mlp, last_block_dropped]


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_of_one_s_own_come_back(change: Callable[..., Any], tmp_path: Path) -> None:
    model = shares(change)(GPT2Config(**SHAPE))
    assert_comes_back(model, tmp_path)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert arrays.keys() == dict(model.named_parameters()).keys()  # each once
    held = type(model).from_pretrained(tmp_path, dtype="int8")
    assert np.abs(logits(held) - logits(model)).max() < 0.01 * np.abs(logits(model)).max()
    if change is not first_block_again:
        with pytest.raises(
            UserError, match=r"n_layer 2, the tensors 1|lacks 'transformer\.h\.1\.m"
        ):
            GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [one_block, one_mlp])
def test_blocks_of_a_gpt2_that_share_weights_load_as_any_others(
    change: Callable[..., Any], tmp_path: Path
) -> None:
    """As in PyTorch, each block stands in the file; a class that shares them reads it too."""
    model = GPT2(GPT2Config(**SHAPE))
    change(model.transformer.h)
    again = assert_comes_back(model, tmp_path)
    assert len(again.parameters()) > len(model.parameters())
    own = shares(change).from_pretrained(tmp_path)
    assert len(own.parameters()) == len(model.parameters())
    np.testing.assert_array_equal(logits(own), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("change", [one_block, one_mlp])
def test_different_blocks_do_not_become_one(
    change: Callable[..., Any], dtype: str, tmp_path: Path
) -> None:
    GPT2(GPT2Config(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"a tensor that the model does not have: 'transformer\.h\.1"
    ):
        shares(change).from_pretrained(tmp_path, dtype=dtype)


def test_a_weight_that_is_no_parameter_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Waves(GPT2):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            waves = np.sin(np.arange(48, dtype=np.float32)).reshape(6, 8)
            self.transformer.wpe.weight = Tensor(waves)  # type: ignore[assignment]

    say_once.cache_clear()
    model = Waves(GPT2Config(**SHAPE))
    assert_comes_back(assert_comes_back(model, tmp_path / "a"), tmp_path / "b")
    said = capsys.readouterr().err
    assert said.startswith("note: 'transformer.wpe.weight': a plain Tensor is not saved; to keep")
    assert said.count("\n") == 1
    frozen = Parameter(model.transformer.wpe.weight)
    frozen.requires_grad = False
    plain = GPT2(GPT2Config(**SHAPE))
    plain.transformer.wpe.weight = frozen
    assert_comes_back(plain, tmp_path / "c")
    assert capsys.readouterr().err == ""


class WithValue(Capped):
    def __init__(self, config: GPT2Config, seed: int = 0, init: Any = None) -> None:
        super().__init__(config, seed, init)
        self.value = nn.Linear(config.n_embd, 1, init or nn.normal(9))
        for block in self.transformer.h:
            block.attn.norm = nn.LayerNorm(4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("dtype", "error"), [("float64", 1e-5), ("int8", 0.01)])
def test_a_part_more_than_the_base_has_is_new(
    dtype: str, error: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Capped(GPT2Config(**SHAPE), seed=5)
    base.save_pretrained(tmp_path / "base")
    model = WithValue.from_pretrained(tmp_path / "base", dtype=dtype)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path}/base/model.safetensors lacks 'transformer.h.0.attn.n")
    assert said.endswith("'value.bias', 'value.weight': new in this WithValue\n")
    largest = np.abs(logits(base)).max()
    np.testing.assert_allclose(logits(model), logits(base), atol=error * largest)
    assert np.abs(np.asarray(model.value.weight.data)).any() and model.value.weight.dtype == dtype
    WithValue(GPT2Config(**SHAPE)).save_pretrained(tmp_path / "model")
    # What its own file lacks, and what every GPT-2 has, is not new
    for folder, lost in (("model", "value.bias"), ("base", "transformer.ln_f.bias")):
        path = tmp_path / folder / "model.safetensors"
        arrays = safetensors.numpy.load_file(path)
        del arrays[lost]
        safetensors.numpy.save_file(arrays, path)
        with pytest.raises(UserError, match=f"lacks '{lost}'$"):
            WithValue.from_pretrained(tmp_path / folder)
    assert capsys.readouterr().err.count("new in this") == 1


def test_parameters_by_any_name_come_back(tmp_path: Path) -> None:
    model = OwnNames(GPT2Config(**SHAPE))
    for p in model.parameters():
        p.data = p.data * np.float32(1.5)
    assert_comes_back(model, tmp_path)
