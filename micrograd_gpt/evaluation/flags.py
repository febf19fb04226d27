"""The flags of evaluate_gpt2.py: one command for each thing that can be evaluated."""

from __future__ import annotations

import argparse

from micrograd_gpt.evaluation.detokenize import DETOKENIZERS
from micrograd_gpt.generation.flags import LANGUAGE_MODEL, add_model_flags, add_stop_flag
from micrograd_gpt.support import cli


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _perplexity(commands.add_parser("perplexity", help="how well a model predicts a text"))
    _common(
        commands.add_parser(
            "multiple-choice", help="which of several endings it finds likeliest (HellaSwag, PIQA)"
        ),
        ".jsonl or .json: context, endings and label, or HellaSwag's or PIQA's own fields",
    )
    _common(
        commands.add_parser("last-word", help="whether it knows a text's last word (LAMBADA)"),
        '.jsonl or .json with a "text" in each item, whose last word is asked for',
    )
    _classify(commands.add_parser("classify", help="how well a classifier labels texts"))
    _generate(commands.add_parser("generate", help="its answers to prompts or instructions"))
    return parser


def _perplexity(parser: argparse.ArgumentParser) -> None:
    _common(
        parser,
        "pydocs, shakespeare, or a path: a text, records (.jsonl, .json, .csv, .tsv, .parquet), or "
        "a folder of these",
    )
    parser.add_argument(
        "--stride",
        type=cli.positive_int,
        metavar="N",
        help="tokens that a window scores; the rest is their context (default: half a window)",
    )
    parser.add_argument(
        "--block-size",
        type=cli.positive_int,
        metavar="N",
        help="tokens of a window (default: the model's context)",
    )
    parser.add_argument(
        "--detokenize",
        choices=tuple(DETOKENIZERS),
        help="undo the spacing of a text cut into words (default: off)",
    )
    parser.add_argument(
        "--text-field",
        type=cli.some_text,
        default="text",
        metavar="NAME",
        help="the key or column of records that holds their text (default: text)",
    )
    parser.add_argument(
        "--line-ends",
        choices=("auto", "lf", "keep"),
        default="auto",
        help=r"lf: \r\n and \r become \n; keep: they stay; auto: lf for the tokenizers char, word, "
        "byte, as in training, else keep (default: auto)",
    )
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="take <|endoftext|> in the text for the token (default: off, these 13 characters)",
    )


def _classify(parser: argparse.ArgumentParser) -> None:
    _common(
        parser,
        "texts with labels: .tsv, .csv, .jsonl, .json or .parquet, as for finetune_gpt2.py",
        "the folder of a classifier (needed)",
    )
    parser.add_argument(
        "--text-field",
        type=cli.some_text,
        default="text",
        metavar="NAME",
        help="the text's column (default: text)",
    )
    parser.add_argument(
        "--label-field",
        type=cli.some_text,
        default="label",
        metavar="NAME",
        help="the label's column (default: label)",
    )


def _generate(parser: argparse.ArgumentParser) -> None:
    _common(
        parser,
        ".jsonl or .json: prompt; or instruction and input, or messages, for a model that was "
        "tuned on such; and output, if the right answer is known",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=cli.positive_int,
        default=200,
        metavar="N",
        help="of an answer (default: 200)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the likeliest token; above it, chance plays a part (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="only the likeliest tokens that together have probability P (default: all)",
    )
    parser.add_argument(
        "--seed", type=cli.non_negative_int, default=0, metavar="N", help="of chance (default: 0)"
    )
    add_stop_flag(parser.add_argument)
    parser.set_defaults(stop=[])


def _common(parser: argparse.ArgumentParser, data: str, which: str = LANGUAGE_MODEL) -> None:
    """Add the flags of all commands; `data` and `which` are the help of --data and --model."""
    parser.add_argument("--data", required=True, type=cli.some_text, metavar="PATH", help=data)
    parser.add_argument(
        "--encoding",
        type=cli.some_text,
        default="utf-8",
        metavar="NAME",
        help="of the data (default: utf-8)",
    )
    add_model_flags(parser, which)
    parser.add_argument(
        "--out",
        type=cli.some_path,
        metavar="FOLDER",
        help="keep what is done, and the report, there; the same command again goes on where it "
        "was stopped (default: keep nothing)",
    )
    parser.add_argument(
        "--limit",
        type=cli.positive_int,
        metavar="N",
        help="only the first N windows or items (default: all)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="the report as one JSON object (default: off, lines of text)",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.positive_int,
        metavar="N",
        help="texts read at a time; where tokens are scored, as many tokens as N texts have that "
        "fill the model's context (default: 8 texts, 2,048 tokens)",
    )
