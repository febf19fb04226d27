"""Make the README's pictures anew, beside this script.

    python docs/pictures/make.py                # all three: trains for some minutes
    python docs/pictures/make.py microscope     # one of loss, attention, microscope

loss.png is what `python train_gpt2.py` draws. The other two look into a small model that has read
lessons/story.txt, in which only the bear can sleep until the spring: attention.png is the map of
the head that looks most at "sleep" when it is to say who speaks, and microscope.png the page that
generate.py writes of the same text, opened at that head. Runs stay in --runs and are used again.

The screenshot needs the extra: pip install -e ".[browser]", and a Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from micrograd_gpt.generation.microscope import observe
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support import cli
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, written_whole
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
LARGEST = 300_000  # bytes of a picture
STORY = str(ROOT / "lessons" / "story.txt")
ON_THE_STORY = ["--data", STORY, "--validation", STORY, "--tokenizer", "gpt2"]
TRAINING = {  # the flags of each run
    "first": [],
    "story": [*ON_THE_STORY, "--batch-size", "4", "--max-steps", "300"],
}
PROMPT, CLUE = 'The fox met a bear. "I can sleep until the spring," said the', " sleep"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(argv: list[str] | None = None) -> int:
    makers = {"loss": loss, "attention": attention, "microscope": microscope}
    parser = cli.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", nargs="*", help=f"of {', '.join(makers)} (default: all)")
    parser.add_argument(
        "--runs", type=Path, default=Path("out", "pictures"), help="a folder for the runs"
    )
    given: argparse.Namespace = parser.parse_args(argv)
    for name in given.pictures:
        if name not in makers:
            raise UserError(f"there is no picture {name!r}: choose of {', '.join(makers)}")
    for name in given.pictures or makers:
        picture = FOLDER / f"{name}.png"
        makers[name](picture, given.runs)
        size = picture.stat().st_size
        print(f"{picture}: {size:,} bytes")
        if size > LARGEST:
            raise UserError(f"{picture} has more than {LARGEST:,} bytes: make it smaller")
    return 0


def run(script: str, *flags: str) -> None:
    """Run one of the project's scripts; what it prints goes to stderr. UserError if it fails."""
    command = [sys.executable, str(ROOT / script), *flags]
    if status := subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"{script} ended with status {status}: mend what it says above")


def trained(name: str, runs: Path) -> Path:
    """The folder of a run: trained, or trained on where it was stopped, unless it is complete."""
    folder = runs / name
    state = read_json(folder / "trainer_state.json")
    if state is None:
        run("train_gpt2.py", *TRAINING[name], "--out", str(folder))
    elif state["step"] < state["settings"]["max_steps"]:
        run("train_gpt2.py", "--resume", "--out", str(folder))
    return folder


def loss(picture: Path, runs: Path) -> None:
    drawn = (trained("first", runs) / "loss.png").read_bytes()
    with written_whole(picture) as file:
        file.write(drawn)


def clearest_head(folder: Path) -> tuple[list[str], np.ndarray, int, int]:
    """The prompt's tokens, all attention (L, H, T, T), and the layer and the head in it that look
    most from the prompt's end at the word that says who speaks."""
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode(PROMPT)
    tokens = [tokenizer.decode([i]) for i in ids.tolist()]
    weights = observe(GPT2.from_pretrained(folder), ids).attention
    at_clue = weights[:, :, -1, tokens.index(CLUE)]  # (L, H)
    layer, head = np.unravel_index(at_clue.argmax(), at_clue.shape)
    return tokens, weights, int(layer), int(head)


def attention(picture: Path, runs: Path) -> None:
    from matplotlib.figure import Figure

    tokens, weights, layer, head = clearest_head(trained("story", runs))
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
    for (row, column), weight in np.ndenumerate(weights[layer, head]):
        if weight >= 0.05:
            color = "white" if weight > 0.6 else "black"
            axis.text(column, row, f"{weight:.1f}", ha="center", va="center", color=color)
    words = [token.strip() for token in tokens]
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axis.set_yticks(range(len(words)), words)
    axis.set(xlabel="… at whom", ylabel="who looks …")
    axis.set_title(f"Layer {layer + 1}, head {head + 1}")
    with written_whole(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def microscope(picture: Path, runs: Path) -> None:
    try:
        from playwright import sync_api
    except ImportError:
        raise UserError('playwright is missing: pip install -e ".[browser]"') from None
    folder = trained("story", runs)
    _, _, layer, head = clearest_head(folder)
    file = folder / "page.html"
    flags = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "24"]
    run("generate.py", "--model", str(folder), *flags, "--microscope", str(file))
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)  # None: Playwright's own
    sandbox = [] if os.name == "nt" or os.getuid() else ["--no-sandbox"]  # it refuses root
    with sync_api.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=installed, args=sandbox)
        except sync_api.Error as error:
            raise UserError(
                f"no browser: install one of {', '.join(BROWSERS)} ({str(error).splitlines()[0]})"
            ) from error
        page = browser.new_page(viewport={"width": 1100, "height": 4000}, color_scheme="light")
        page.goto(file.resolve().as_uri())
        page.click(f"#maps button[aria-label='layer {layer + 1}, head {head + 1}']")
        page.mouse.move(0, 0)
        end = page.locator("section").nth(1).bounding_box()  # the text and its attention
        clip = {"x": 0, "y": 0, "width": 1100, "height": end["y"] + end["height"] + 12}
        shot = page.screenshot(clip=clip)
        browser.close()
    with written_whole(picture) as image:
        image.write(shot)


if __name__ == "__main__":
    cli.run(main)
