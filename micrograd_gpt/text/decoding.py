"""The bytes of a file to text: its encoding, its byte-order mark, its line ends."""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from micrograd_gpt.support.cli import counted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import reading

CHUNK = 1 << 18  # bytes read at a time
OF_CHARACTERS = ("char", "word", "byte")  # tokenizers that would learn "\r" as a thing of its own
MARKS = {  # the longer of two that begin alike first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}

# Control characters of no text: others move a line or a page, or are DOS's end (\x1a) and ESC
CONTROL = re.compile("[\0-\x08\x0e-\x19]")

PACKED = {  # how files begin that hold text, but not as text, and how to get at it
    b"\x1f\x8b": "gzip: unpack it first, as with gunzip",
    b"BZh": "bzip2: unpack it first, as with bunzip2",
    b"\xfd7zXZ": "xz: unpack it first, as with unxz",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it first, as with unzstd",
    b"PK\x03\x04": "zip, as .docx and .epub are too: unpack it, or save it as plain text",
    b"%PDF-": "PDF: save it as plain text first, as with pdftotext",
    b"{\\rtf": "RTF: save it as plain text first",
    b"PAR1\x15": "Parquet: call it .parquet",
    b"\x93NUMPY": "an array of NumPy's: write token ids into train.bin and val.bin, with "
    "ids.astype(np.uint16).tofile, and give their folder",
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle, which is not opened, as it may run code: save what it holds as plain text",
    ),
}


@dataclass(frozen=True)
class Form:
    r"""How the text of files is to be read.

    Args:
        encoding: of the files; a byte-order mark at the beginning of a file wins over utf-8.
        field: the key or the column that is the text of a record.
        line_ends: "keep" them, or "lf": \r\n and \r become \n; "auto": lf for char, word and byte.
        special_tokens: whether `<|endoftext|>` in a text is the token, and not its 13 characters.
    """

    encoding: str = "utf-8"
    field: str = "text"
    line_ends: str = "keep"
    special_tokens: bool = False

    def for_tokenizer(self, name: str) -> Form:
        """This form, with the line ends that "auto" stands for with the tokenizer of that name."""
        if self.line_ends != "auto":
            return self
        return replace(self, line_ends="lf" if name in OF_CHARACTERS else "keep")


@dataclass
class Notes:
    """What was done to texts while they were read, for the user to know."""

    mended: set[Path] = field(default_factory=set)  # files whose line ends were changed
    with_null: dict[Path, str] = field(default_factory=dict)  # files, and the UTF-16 of their NULs
    like_json: set[Path] = field(default_factory=set)  # files that are not read as records
    piped: set[Path] = field(default_factory=set)  # streams of which none are read
    typed: bool = False  # whether <|endoftext|> stands in them
    skipped: Counter[str] = field(default_factory=Counter)  # records left out, by the reason

    def tell(self, source: str | Path) -> None:
        """Say it on stderr, in at most a line of each kind."""
        if self.mended:
            some = min(self.mended)
            where = (
                some if len(self.mended) == 1 else f"{counted(len(self.mended), 'file')}, {some}"
            )
            say(rf"note: {where}: \r\n and \r were read as \n; --line-ends keep leaves them in")
        if self.with_null:
            path, utf_16 = min(self.with_null.items())
            mark = f", and UTF-16 without its mark (for that: --encoding {utf_16})"
            say(
                f"note: {path} has null characters, as a file that is no text has"
                + (mark if utf_16 else "")
            )
        if self.like_json:
            say(
                f"note: {min(self.like_json)} looks like JSON and is read as it stands, braces "
                "and all; to have it read as records, call it .json"
            )
        if self.piped:
            say(
                f"note: {min(self.piped)} is read as it stands, not as records: those in a pipe "
                "are JSON objects, one a line, with the key that --text-field names"
            )
        if self.skipped:
            why = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            say(f"note: {source}: {counted(self.skipped.total(), 'record')} left out: {why}")


def check_encoding(encoding: str) -> None:
    """Raise UserError unless there is such an encoding of text."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except (LookupError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"{encoding!r} is not a text encoding: try utf-8 or latin-1") from error


def encoding_of(beginning: bytes, encoding: str) -> str:
    """What the byte-order mark says that a text begins with; `encoding` where there is none.

    An encoding that is not UTF-8 was chosen for the text, and its word counts.
    """
    if codecs.lookup(encoding).name != "utf-8":
        return encoding
    return next((name for mark, name in MARKS.items() if beginning.startswith(mark)), encoding)


def is_text(beginning: bytes) -> bool:
    """Whether a file of any name begins as a text does, without the control characters that are in
    token ids: in the encoding that its byte-order mark says, or in any that has a byte or more for
    a character.
    """
    marked = (name for mark, name in MARKS.items() if beginning.startswith(mark))
    decoder = codecs.getincrementaldecoder(next(marked, "latin-1"))()
    try:
        return CONTROL.search(decoder.decode(beginning)) is None  # it may end within a character
    except UnicodeDecodeError:
        return False


def check_not_packed(beginning: bytes, name: str | Path) -> None:
    """UserError where a file begins as those do that hold their text packed."""
    for mark, what in PACKED.items():
        if beginning.startswith(mark):
            raise UserError(f"{name} is {what}")


def text_chunks(
    path: Path, form: Form, on_read: Callable[[int], object], notes: Notes
) -> Iterator[str]:
    """The text of a file, without its byte-order mark, as chunks; UserError if it cannot be read.

    `on_read` is called with the number of bytes after every read.
    """
    check_encoding(form.encoding)
    encoding, end = form.encoding, 0  # end: offset in the file of what has been read
    try:
        with reading(path), open(path, "rb") as file:
            check_not_packed(file.peek(8), path)
            encoding = encoding_of(file.peek(4), form.encoding)
            decoder: Any = codecs.getincrementaldecoder(encoding)()
            if form.line_ends == "lf":
                decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
            is_first = True
            while chunk := file.read(CHUNK):
                end += len(chunk)
                on_read(len(chunk))
                text = decoder.decode(chunk)
                if "\0" in text:  # in UTF-16 it is half of a Latin letter
                    utf_16 = "utf-16-le" if text.index("\0") % 2 else "utf-16-be"
                    is_half = text.count("\0") * 3 > len(text)
                    notes.with_null.setdefault(path, utf_16 if is_half else "")
                yield text.removeprefix("\ufeff") if is_first else text
                is_first = is_first and not text
            yield decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise UserError(f"{path} is not {encoding.upper()} text: {_place(error, end)}") from error
    if form.line_ends == "lf" and decoder.newlines not in (None, "\n"):
        notes.mended.add(path)


def _place(error: UnicodeError, end: int) -> str:
    reason = str(error)
    if isinstance(error, UnicodeDecodeError):  # `object` ends where the chunk ends
        offset = end - len(error.object) + error.start
        reason = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
    return f"{reason}; give its encoding with --encoding, or convert it"


def decoded(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """The text of bytes in this encoding, or in what their byte-order mark says, without that mark.

    Raises UserError for an unknown encoding, and, where `name` is not text, which says where.
    """
    check_encoding(encoding)
    check_not_packed(data, name)
    encoding = encoding_of(data[:4], encoding)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not {encoding.upper()} text: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert it to UTF-8"
        ) from None
