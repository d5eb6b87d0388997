"""Tables in CSV files: reads what people and spreadsheets save, writes what is safe to open.

Every CSV of the project is read by `read_table` and written by `write_rows`, `write_csv` or
`write_table`. What these write, `read_table` gives back unchanged, apart from rows without any text
and from bytes that are not UTF-8 (see `utils.files.write_text`).
"""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from utils.errors import UserError, first_line
from utils.files import write_text
from utils.text_table import shorten

if TYPE_CHECKING:
    import pandas as pd

DELIMITERS = ",;\t"

_SEP_LINE = re.compile(r'"?sep=([^"\s]|\t)"?(?:\r\n|\r|\n|$)', re.I)  # Excel's first line

_QUOTED = re.compile(r'(?<![^,;\t\r\n])"(?:[^"]|"")*(?:"|$)')  # a cell in quotation marks

_LINE_BREAK = re.compile(r"\r\n|\r|\n")

# A spreadsheet computes a cell that begins with one of these characters as a formula.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")

_HARMLESS_NAMES = {"+- std (s)"}  # a column of the published table, which scripts look up

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*|,\d+)?|[.,]\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class Row(NamedTuple):
    """A row of a table, as text."""

    line: int
    """number of its first line in the file"""
    cells: list[str]


def column_name(cell: str) -> str:
    """The name of a column as it is compared: without case, and without spaces around it."""
    return " ".join(cell.split()).casefold()


@dataclass(frozen=True)
class Table:
    """The rows of a file that are not blank, the header among them if it has one."""

    path: Path
    rows: list[Row]
    delimiter: str
    """empty if the first line has none: then each line is one cell"""
    lines: list[Row]
    """the same file line by line, without quotation marks and delimiters being looked at"""

    def header(self, name_of: Callable[[str], str] = column_name) -> list[str]:
        """The names of the columns, from the first row.

        Raises:
            UserError: two columns have the same name.
        """
        if not self.rows:
            return []
        names = [name_of(cell) for cell in self.rows[0].cells]
        repeated = [name for name, count in Counter(names).items() if name and count > 1]
        if repeated:
            raise UserError(
                f"{self.path}, line {self.rows[0].line}: two columns are called "
                f"{shorten(repeated[0])!r}: keep one, or give them different names"
            )
        return names

    def records(self, name_of: Callable[[str], str] = column_name) -> list[tuple[int, dict]]:
        """The line number and the cells by column of each row below the header.

        Cells that a short row lacks are missing.

        Raises:
            UserError: two columns have the same name, or a row has more cells than the header.
        """
        header, records = self.header(name_of), []
        for line, cells in self.rows[1:]:
            if any(cell.strip() for cell in cells[len(header) :]):
                raise UserError(
                    f"{self.path}, line {line}: has {len(cells)} cells, but the header has "
                    f"{len(header)} (a cell with {self.delimiter!r} in it needs quotation marks)"
                )
            records.append((line, dict(zip(header, cells, strict=False))))
        return records


def read_table(path: str | Path, delimiter: str = "") -> Table:
    """Read a CSV file in UTF-8, or the first sheet of an .xlsx file.

    Rows that are blank or hold nothing but delimiters are left out. A cell in quotation marks may
    hold line breaks.

    Args:
        delimiter: empty: the one that Excel's first line `sep=;` names, or else the comma,
            semicolon or tab that the first line has most of.

    Raises:
        UserError: the file is not text in UTF-8, or not a CSV; or openpyxl is not installed.
        OSError: it cannot be opened.
    """
    path = Path(path)
    if path.suffix.lower() == ".xlsx":
        return _read_xlsx(path)
    text, first_line = read_text(path), 1
    if not delimiter and (sep := _SEP_LINE.match(text)):
        delimiter, text, first_line = sep[1], text[sep.end() :], 2
    lines = [Row(n, [line]) for n, line in enumerate(_LINE_BREAK.split(text), first_line)]
    lines = [row for row in lines if row.cells[0].strip(" \t,;")]
    if not delimiter:
        unquoted = _LINE_BREAK.split(_QUOTED.sub("", text.lstrip(" \t,;\r\n")), maxsplit=1)[0]
        delimiter = max(DELIMITERS, key=unquoted.count)
        if delimiter not in unquoted:
            return Table(path, lines, "", lines)
    rows, line = [], first_line
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(Row(line, [_restore(cell) for cell in cells]))
            line = first_line + reader.line_num
    except csv.Error:
        raise UserError(
            f"{path}, line {line}: a quotation mark that is not closed or stands in the middle of "
            f"a cell, or a cell of more than {csv.field_size_limit():,} characters"
        ) from None
    return Table(path, rows, delimiter, lines)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it is not text, or not in UTF-8.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        data = file.read(1 << 16)
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if not utf16 and b"\0" not in data:  # a video of gigabytes is not read to its end
            data += file.read()
    if utf16:
        raise UserError(f"{path}: is not UTF-8 but UTF-16 text: save the table as 'CSV UTF-8'")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise UserError(f"{path}, line {line}: a NUL character: the file is not a CSV table")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text: save the table as 'CSV UTF-8'"
        ) from None


def _read_xlsx(path: Path) -> Table:
    """The first sheet of a workbook, as Excel would save it as a CSV with tabs."""
    with open(path, "rb"):  # an OSError as for other tables
        pass
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{path}: reading .xlsx needs openpyxl (pip install -r requirements-optional.txt), or "
            "save the table as 'CSV UTF-8'"
        ) from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        values = list(book.worksheets[0].iter_rows(values_only=True))
        book.close()
    except Exception as error:  # of zipfile, XML parsers and openpyxl
        raise UserError(f"{path}: is no .xlsx that can be read: {first_line(error)}") from None
    cells = [[_text(value) for value in row] for row in values]
    rows = [Row(line, row) for line, row in enumerate(cells, 1) if any(c.strip() for c in row)]
    width = max((i + 1 for row in rows for i, c in enumerate(row.cells) if c.strip()), default=0)
    rows = [Row(line, row[:width]) for line, row in rows]  # without columns that are only formatted
    return Table(path, rows, "\t", [Row(line, ["\t".join(row)]) for line, row in rows])


def _text(value: Any) -> str:
    """The value of a cell of a spreadsheet as a CSV shows it: 1 and not 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def parse_number(text: str, delimiter: str = ",") -> float:
    """A number with a decimal point or a decimal comma.

    In a table whose delimiter is the comma, `1,234` is refused: it may be 1234 there, whereas
    tables with semicolons or tabs come from where the comma is the decimal sign.

    Raises:
        ValueError: it is not a number, or is not unambiguous.
    """
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError("not a number")
    if delimiter == "," and re.search(r",\d{3}$", text):
        raise ValueError("ambiguous, because the comma may separate thousands or decimals")
    return float(text.replace(",", "."))


def harmless(cell: Any) -> Any:
    """The cell as it is written: a text that a spreadsheet would compute gets an apostrophe.

    `read_table` takes the apostrophe off again. Numbers, also negative ones, stay as they are.
    """
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    return cell if _NUMBER.fullmatch(cell) or cell in _HARMLESS_NAMES else f"'{cell}"


def _restore(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_rows(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows of a CSV into a file that was opened with `newline=""`; None is an empty cell."""
    writer = csv.writer(file, lineterminator="\n")
    quoting_writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        cells = [harmless(cell) for cell in row]
        # The first writer puts no quotation marks around a carriage return, which ends a line too.
        quoted = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (quoting_writer if quoted else writer).writerow(cells)


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows, the header first, as a CSV file, atomically."""
    file = io.StringIO(newline="")
    write_rows(file, rows)
    write_text(path, file.getvalue())


def require_own_table(path: Path, header: Sequence[str], flag: str = "--output") -> None:
    """Check that writing a table replaces no file but an earlier one of the same kind, or an empty
    one: the name may be that of a manifest by mistake.

    Args:
        header: the first columns that a table of this kind has.
        flag: how the user chooses the file.

    Raises:
        UserError: there is another file of this name.
    """
    expected = ",".join(header).encode()
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        if re.match(re.escape(expected) + rb"[,\r\n]", file.read(len(expected) + 1)):
            return
    raise UserError(
        f"{flag} {path}: exists already, is not a table that this command wrote, and is not "
        "overwritten: give another name"
    )


def write_table(
    path: str | Path, table: "pd.DataFrame", index: bool = False, float_format: str = ""
) -> None:
    """Write a DataFrame as a CSV file, atomically; a value that is missing is an empty cell.

    Args:
        index: write the index too, as the first column.
        float_format: format of the numbers that are not whole, for example `.6g` (empty: all
            digits).
    """
    known = table.astype(object).where(table.notna(), None)
    rows = [
        [f"{cell:{float_format}}" if isinstance(cell, float) else cell for cell in row]
        for row in known.itertuples(index=index, name=None)
    ]
    names = [table.index.name or "", *table.columns] if index else list(table.columns)
    write_csv(path, [names, *rows])
