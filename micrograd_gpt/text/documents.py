"""Where text comes from: one document after another, in chunks, so that none has to fit in memory.

A document is a text that stands alone: a text file, a line of a .jsonl file, a row of a .parquet
file, a topic of Python's manual.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from micrograd_gpt.support.download import cache_folder, download
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading

SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".parquet")  # of the files read in a folder
CHUNK = 1 << 18  # bytes read at a time
ROWS = 256  # of a .parquet file, read at a time

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394  # bytes
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_documents(source: str | Path, encoding: str = "utf-8") -> list[str]:
    """Return the documents of `source`, none of them empty.

    - "pydocs": the Python language manual inside every interpreter (`pydoc_data.topics`), one
      document per topic, in the order of their names. It differs from one Python to the next.
    - "shakespeare": one document, fetched once into the user's cache folder and verified.
    - a file: its documents, as `read_documents` yields them. A folder: those of every .txt, .md,
      .rst, .jsonl and .parquet file under it, sorted by path.

    To read a file that is called "pydocs", give its path ("./pydocs").

    Raises UserError if there is no text, or no network to fetch it from.
    """
    if source == "pydocs":
        documents = _pydocs()
    else:
        files = find_files(source)
        documents = ["".join(chunks) for f in files for chunks in read_documents(f, encoding)]
    documents = [document for document in documents if document]
    if not documents:
        raise no_text(source)
    return documents


def no_text(source: str | Path) -> UserError:
    """Return the error for a source whose documents are all empty."""
    return UserError(f"{source} contains no text: give some text to learn from")


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

    Raises UserError if there are none.
    """
    if source == "shakespeare":
        return [_shakespeare()]
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not files:
            raise UserError(
                f"{path} has no text files ({', '.join('*' + s for s in SUFFIXES)}) and no token "
                "shards (train.bin, or *_train_*.bin): give another folder, or the path of one file"
            )
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise UserError(
            f"{str(source)!r} does not exist: give pydocs, shakespeare, or the path of a text "
            "file, a folder of text files, or a folder of token shards"
        )
    return [path]


def _shakespeare() -> Path:
    path = cache_folder() / "shakespeare.txt"
    try:
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SIZE, SHAKESPEARE_SHA256)
    except UserError as error:
        raise UserError(f"{error}; or give a text file of your own with --data PATH") from error
    return path


def read_documents(
    path: Path, encoding: str = "utf-8", on_read: Callable[[int], object] = lambda _: None
) -> Iterator[Iterable[str]]:
    """Yield the documents of a file, each as chunks of text in order.

    A .jsonl file has a document in the field "text" of each line, a .parquet file in the column
    "text" of each row (pyarrow reads it). Any other file is one document, taken byte for byte: its
    line ends stay what they are. `on_read` is called with the number of bytes after every read.

    Raises UserError for an unknown `encoding`, and, naming the file and the place, for bytes that
    are not in that encoding and for lines or columns without text.
    """
    check_encoding(encoding)
    match path.suffix.lower():
        case ".jsonl":
            yield from ([text] for text in _jsonl_texts(path, encoding, on_read))
        case ".parquet":
            yield from ([text] for text in _parquet_texts(path, on_read))
        case _:
            yield _text_chunks(path, encoding, on_read)


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the whole text of a file, whatever its name; UserError as `read_documents` says."""
    check_encoding(encoding)
    return "".join(_text_chunks(path, encoding, lambda _: None))


def check_encoding(encoding: str) -> None:
    """Raise UserError unless there is such an encoding of text."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except (LookupError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"{encoding!r} is not a text encoding: try utf-8 or latin-1") from error


def _text_chunks(path: Path, encoding: str, on_read: Callable[[int], object]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    end = 0  # offset in the file of what has been read
    try:
        with reading(path), open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                end += len(chunk)
                on_read(len(chunk))
                yield decoder.decode(chunk)
            yield decoder.decode(b"", final=True)
    except UnicodeError as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):  # `object` ends where the chunk ends
            offset = end - len(error.object) + error.start
            reason = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        raise UserError(
            f"{path} is not {encoding.upper()} text: {reason}; give its encoding with --encoding, "
            "or convert it"
        ) from error


def _jsonl_texts(path: Path, encoding: str, on_read: Callable[[int], object]) -> Iterator[str]:
    for number, line in enumerate(_lines(_text_chunks(path, encoding, on_read)), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}, line {number}: the text has a lone surrogate, {text[error.start]!r}, "
                "which is half a character: remove it"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number}: this is not a JSON object with a string called "text": '
                "correct the line, or remove it"
            ) from error
        yield text


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text, without their line ends."""
    begun: list[str] = []  # the parts of a line that is not complete yet
    for chunk in chunks:
        *complete, rest = chunk.split("\n")
        for line in complete:
            yield "".join([*begun, line])
            begun = []
        begun.append(rest)
    yield "".join(begun)


def _parquet_texts(path: Path, on_read: Callable[[int], object]) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow: pip install 'micrograd-gpt[parquet]'"
        ) from error
    try:
        size = path.stat().st_size
        with ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
            column = file.schema_arrow.field("text") if "text" in file.schema_arrow.names else None
            if column is None or str(column.type) not in ("string", "large_string"):
                raise UserError(
                    f'{path} has no column of strings called "text": give the column with the text '
                    "that name"
                )
            rows = done = 0
            for batch in file.iter_batches(ROWS, columns=["text"]):
                rows += len(batch)
                before, done = done, size * rows // file.metadata.num_rows
                on_read(done - before)
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
