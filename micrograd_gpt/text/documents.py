"""Where text comes from: one document after another, in chunks, so that none has to fit in memory.

A document is a text that stands alone: a text file, a record of a .jsonl, .csv or .parquet file, a
topic of Python's manual.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn

from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.download import cache_folder, download
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import is_stream, reading, refuse_tilde
from micrograd_gpt.text.decoding import Form, Notes, text_chunks
from micrograd_gpt.text.decoding import check_encoding as check_encoding
from micrograd_gpt.text.records import RECORD_SUFFIXES, begins_with_record, record_texts

SUFFIXES = (".txt", ".md", ".rst", *RECORD_SUFFIXES)  # of the files read in a folder
AS_IT_IS = Form()
LIKE_JSON = re.compile(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')  # an object, or a list of some
BY_NAME = ("pydocs", "shakespeare")  # sources that are no paths

# What a model's folder or a run's holds beside its weights, and is no text to learn from
OWN_FILES = {
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "prompt_template.txt",
    "trainer_state.json",
    "metrics.jsonl",
    "samples.jsonl",
    "scores.json",
}

# What an evaluation's folder holds
OF_EVALUATION = {"settings.json", "items.jsonl", "report.json"}

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394  # bytes
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_documents(
    source: str | Path, form: Form = AS_IT_IS, files: Sequence[Path] | None = None
) -> list[str]:
    """Return the documents of `source`, none of them empty.

    - "pydocs": the Python language manual inside every interpreter (`pydoc_data.topics`), one
      document per topic, in the order of their names. It differs from one Python to the next.
    - "shakespeare": one document, fetched once into the user's cache folder and verified.
    - a file: its documents, as `read_documents` yields them. A folder: those of the files that
      `find_files` finds in it.

    To read a file that is called "pydocs", give its path ("./pydocs"). `files` are those of the
    source where `find_files` was asked already. Says on stderr what was left
    out, and whether line ends were changed.

    Raises UserError if there is no text, or no network to fetch it from.
    """
    if source in BY_NAME and os.path.exists(source):
        say(f"note: {source} is the text of that name; for what is here, write ./{source}")
    if source == "pydocs":
        documents = _pydocs()
    else:
        notes = Notes()
        files = find_files(source) if files is None else files
        texts = (text for file in files for text in read_documents(file, form, notes=notes))
        documents = ["".join(chunks) for chunks in texts]
        notes.tell(source)
    documents = [document for document in documents if document]
    if not documents:
        raise no_text(source)
    return documents


def no_text(source: str | Path) -> UserError:
    """Return the error for a source whose documents are all empty."""
    return UserError(f"{source} contains no text: give a file with some")


def _pydocs() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions package it apart from the interpreter
        raise UserError(
            "this Python came without its manual (pydoc_data): give a text file with --data"
        ) from error
    return [topics[name] for name in sorted(topics)]


def find_files(source: str | Path) -> list[Path]:
    """Return the files that hold the text of `source`, which may be anything but "pydocs".

    Those of a folder are all files under it with one of the SUFFIXES, sorted by path, and stderr
    says which others there are. What is hidden (.git/, ._a.txt) is left out, and so are the files
    of a model, a run or an evaluation, so that an --out may lie inside of --data. A link to a
    folder is followed, but no folder is read twice. Raises UserError if there are none.
    """
    if source == "shakespeare":
        return [_shakespeare()]
    path = Path(source)
    if path.is_dir():
        found, lost = _files_under(path)
        if lost:
            say(f"note: {path}: {counted(len(lost), 'link')} to nowhere left out ({min(lost)})")
        files = [file for file in found if file.suffix.lower() in SUFFIXES]
        if files and len(files) < len(found):
            others = [file for file in found if file.suffix.lower() not in SUFFIXES]
            kinds = Counter(file.suffix or file.name for file in others)
            named = ", ".join(kind for kind, _ in kinds.most_common(5))
            if ".arrow" in kinds:  # of Hugging Face's datasets
                named += "; a dataset's to_parquet(…) writes what is read"
            say(f"note: {path}: {counted(len(others), 'file')} of other kinds left out ({named})")
        if not files:
            raise UserError(
                f"{path} has no text files ({', '.join('*' + s for s in SUFFIXES)}) and no token "
                "shards (train.bin, *_train.bin, *_train_*.bin): give another folder, or the path "
                "of one file"
            )
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        refuse_tilde(path)
        piped = "; /dev/stdin is what is piped in" if str(source) == "-" else ""
        raise UserError(
            f"{str(source)!r} does not exist: give pydocs, shakespeare, or the path of a text "
            f"file, a folder of text files, or a folder of token shards{piped}"
        )
    return [path]


def check_text_field(field: str, sources: Sequence[str]) -> None:
    """UserError for a --text-field where none of the sources holds records that have it."""
    found = [source for source in sources if source in BY_NAME or os.path.exists(source)]
    if any(map(is_stream, found)):
        return  # what these hold shows when they are read
    if field != AS_IT_IS.field and found and not any(map(holds_records, found)):
        raise UserError(
            f"--text-field {field} is for records ({', '.join(RECORD_SUFFIXES)}), and "
            f"{' and '.join(found)} holds none by its name: leave it out, or rename the file"
        )


def text_files(source: str | Path) -> list[Path]:
    """The files with text of a source that is a path and exists; none of another source. UserError
    where it cannot be read.
    """
    path = Path(source)
    with reading(source):
        if source in BY_NAME or not path.exists():
            return []
        files = _files_under(path)[0] if path.is_dir() else [path]
    return [file for file in files if file == path or file.suffix.lower() in SUFFIXES]


def holds_records(source: str | Path) -> bool:
    """Whether some of the text of a source is in files of records."""
    return any(file.suffix.lower() in RECORD_SUFFIXES for file in text_files(source))


def _files_under(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder and its folders that are not hidden, and the links that lead nowhere;
    no folder is entered twice.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    entered, files, lost = set[str](), list[Path](), list[Path]()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # by a link
            folders.clear()
            continue
        entered.add(real)
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(
            shown, key=lambda name: (os.path.islink(os.path.join(place, name)), name)
        )
        shown = [name for name in names if not name.startswith(".")]
        if any(name == "settings.toml" or name.endswith(".safetensors") for name in shown):
            shown = [name for name in shown if name not in OWN_FILES]
        if {"settings.json", "items.jsonl"} <= {*shown}:
            shown = [name for name in shown if name not in OF_EVALUATION]
        paths = [Path(place, name) for name in shown]
        files += [path for path in paths if path.is_file()]
        lost += [path for path in paths if path.is_symlink() and not path.exists()]
    return files, lost


def _shakespeare() -> Path:
    path = cache_folder() / "shakespeare.txt"
    try:
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SIZE, SHAKESPEARE_SHA256)
    except UserError as error:
        raise UserError(f"{error}; or give a text file of your own with --data PATH") from error
    return path


def read_documents(
    path: Path,
    form: Form = AS_IT_IS,
    on_read: Callable[[int], object] = lambda _: None,
    notes: Notes | None = None,
) -> Iterator[Iterable[str]]:
    """Yield the documents of a file, each as chunks of text in order.

    A file of records (records.py) has a document in the field `form.field` of each, and so has a
    stream, which no name says it of, if it begins with a JSON object that has the field. Any other
    file is one document. A byte-order mark is dropped; line ends stay what they are unless the form
    says otherwise. `on_read` is called with the number of bytes after every read, and `notes` takes
    down what was changed or left out.

    Raises UserError for an unknown encoding, and, naming the file and the place, for bytes that
    are not in that encoding and for what is not a record with a text.
    """
    notes = Notes() if notes is None else notes
    if path.suffix.lower() in RECORD_SUFFIXES:
        yield from ([text] for text in record_texts(path, form, on_read, notes))
        return
    chunks = text_chunks(path, form, on_read, notes)
    first = next(chunks, "")
    whole: Iterable[str] = chain([first], chunks)
    is_like_json, is_piped = LIKE_JSON.match(first), is_stream(path)
    if is_piped and is_like_json:
        piped = "".join(whole)
        if begins_with_record(piped, form.field):
            yield from ([text] for text in record_texts(path, form, on_read, notes, piped))
            return
        whole = [piped]
    if is_piped and (is_like_json or form.field != AS_IT_IS.field):
        notes.piped.add(path)
    elif is_like_json:
        notes.like_json.add(path)
    yield whole


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the whole text of a file, whatever its name; UserError as `read_documents` says."""
    return "".join(text_chunks(path, Form(encoding), lambda _: None, Notes()))
