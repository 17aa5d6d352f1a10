"""Text files: UTF-8 with one kind of line end, and places in it for messages."""

import re
from dataclasses import dataclass

from .ids import DataError

NEWLINE = 10
CONTROL = bytes(byte for byte in (*range(32), 127) if byte not in b"\t\n")
BOM = b"\xef\xbb\xbf"
TEXT_RULE = "must be UTF-8 text or Parquet"
NUMBER = r"^-?[0-9]*[.]?[0-9]+$"
HEADLESS = "--columns user,item,rating,time, with the names in your order (in Python columns=[...])"


@dataclass(frozen=True)
class Text:
    """UTF-8 text with "\\n" at the end of each line, and the name of its file for messages."""

    source: str
    data: bytes

    def place(self, offset: int) -> str:
        """File and line of a byte."""
        return f"{self.source}:{self.data.count(NEWLINE, 0, offset) + 1}"


def text_of(source: str, data: bytes) -> Text:
    """The text of a file. Raises DataError if it is not text or has none."""
    if BOM in data:  # also where files were joined
        data = data.removeprefix(BOM)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if BOM in data:
        data = data.replace(b"\n" + BOM, b"\n")
    text = Text(source, data)
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{text.place(error.start)}: byte 0x{data[error.start]:02x} is not UTF-8; {TEXT_RULE}") from None
    if len(data.translate(None, CONTROL)) != len(data) and (control := re.search(b"[" + re.escape(CONTROL) + b"]", data)):
        raise DataError(f"{text.place(control.start())}: byte 0x{control[0][0]:02x} is not text; {TEXT_RULE}")
    if (mark := data.find(BOM)) >= 0:
        problem = "a byte order mark inside a line, where two files were joined without a line end"
        raise DataError(f"{text.place(mark)}: has {problem}; put each line on its own")
    if not data or data.isspace():
        raise DataError(f"{source}: contains only blank lines")
    return text


def count_of_fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"
