"""The input of a bulk run: files of rows, cut into shards that any worker can read alone.

A file holds JSON lines (``.jsonl``, ``.jsonl.gz``) or is Parquet.  A shard is a run of its rows; where it starts is
written down once, so it holds the same rows however often and by whomever it is read.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, islice
from typing import IO, Protocol
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from safeside.errors import InputError
from safeside.guards.lines import Line, Row
from safeside.scale.places import addresses, explained, opened
from safeside.tasks.rows import BadRow, columns_of, parse_rows

PARQUET, _ZIPPED = ".parquet", ".jsonl.gz"
_SUFFIXES = (PARQUET, ".jsonl", _ZIPPED)
_BATCH = 1000  # rows of Parquet that are decoded at once
_UNREADABLE = (ValueError, OverflowError)  # what values that are no text, dates far off and unknown time zones raise
_WHOLE = dict.fromkeys(("window", "container_window", "element_size_limit"), 10**9)  # of what Arrow prints
ADDED = ("file", "line", "verdicts")
"""What scoring adds to a row."""
_VERDICTS = pa.list_(
    pa.struct(
        [("task", pa.string()), ("score", pa.float64()), ("threshold", pa.float64()), ("flagged", pa.bool_()),
         ("reason", pa.string())]
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """Where a shard lies in its file."""

    first: int
    """Line (of Parquet: row) that it starts with, from 1."""
    n_lines: int
    """Lines in it."""
    n_rows: int
    """Rows in it: empty lines are none."""
    offset: int = 0
    """Bytes before it, once decompressed; 0 for Parquet."""

    @property
    def last(self) -> int:
        """Line (of Parquet: row) that it ends with."""
        return self.first + self.n_lines - 1


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that one worker scores and one file of the output holds."""

    number: int
    """Its place among all, from 0."""
    file: str
    """The file that it is of: a path or a URL."""
    span: Span
    """Where it lies in the file."""

    @property
    def lines(self) -> str:
        """Its rows, for people."""
        return f"lines {self.span.first} to {self.span.last} of {self.file}"

    @property
    def part(self) -> str:
        """The name of its file in the output, in the form of the input."""
        return f"part-{self.number:06d}{PARQUET if is_table(self.file) else '.jsonl'}"


class Part(Protocol):
    """The rows of one shard."""

    @property
    def rows(self) -> Sequence[Row]:
        """Each row's line and values, or what is wrong with it."""
        ...

    def original(self, index: int) -> object:
        """A row as it was: what a quarantine keeps of it."""
        ...

    def scored(self, lines: Sequence[Line], file: str) -> bytes:
        """The rows and, of ``lines``, what scoring adds to each, in the form of the input."""
        ...


class Reader(Protocol):
    """A file of rows, open.  Shards may be read in any order; onwards is fastest."""

    def spans(self, size: int) -> Iterator[Span]:
        """The file as shards of ``size`` rows, the last one shorter."""
        ...

    def read(self, span: Span) -> Part:
        """The rows of one shard."""
        ...


def find_files(place: str) -> list[str]:
    """The files of a path or URL: one file, all in a folder, or all that a pattern such as ``rows/*.parquet`` matches.

    In folders, names that start with ``_`` or ``.`` are passed over, and so is what holds no rows by its suffix.
    """
    files, path = opened(place)
    with explained(place, "read"):
        if _suffix(path) and files.isfile(path):  # asked first: the address of one file may not be listed
            names = [path]
        elif files.isdir(path):
            inside = [(name, name.removeprefix(path).split("/")) for name in map(str, files.find(path))]
            names = [name for name, parts in inside if not any(part.startswith(("_", ".")) for part in parts)]
            names = [name for name in names if _suffix(name)]
        else:
            names = [path] if files.isfile(path) else [str(name) for name in files.glob(path) if files.isfile(name)]
    if not names:
        raise InputError(f"There is no file {place} with rows; expected {', '.join(_SUFFIXES)}. Check the path.")
    odd = [name for name in names if not _suffix(name)]
    if odd:
        raise InputError(f"{odd[0]} holds no rows by its name; expected {', '.join(_SUFFIXES)}. Rename or convert it.")
    return addresses(place, sorted(names))


def is_table(file: str) -> bool:
    """Whether a file is Parquet by its name, which in a chain of file systems need not stand last."""
    return any(_suffix(link) == PARQUET for link in file.split("::"))


def _suffix(name: str) -> str:
    """Which of _SUFFIXES a name has, or none.  That of a web address may be followed by a signature."""
    path = urlsplit(name).path if name.startswith(("http://", "https://")) else name
    return next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), "")


def as_json(values: object) -> str:
    """``values`` on one line.  NaN and infinity, which are not JSON, become null, and what it has no form for text."""
    try:
        return json.dumps(values, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(values, default=str), parse_constant=lambda name: None))


def open_reader(file: str) -> Reader:
    """The reader of a file, by its suffix; a file that cannot be read is an InputError."""
    files, path = opened(file)
    with explained(file, "read"):
        if is_table(file):
            return TableReader(files.open(path, "rb"), file, files)
        zipped = "gzip" if _suffix(path) == _ZIPPED else None
        return LineReader(files.open(path, "rb", compression=zipped), file, files)


class LineReader:
    """JSON lines."""

    def __init__(self, handle: IO[bytes], file: str, files: AbstractFileSystem) -> None:
        self.handle, self.file = handle, file
        self.files = files  # kept: an archive closes what was opened in it when it goes

    def spans(self, size: int) -> Iterator[Span]:
        first, n_lines, n_rows, offset, position = 1, 0, 0, 0, 0
        with explained(self.file, "read"):
            for line in self.handle:
                position, n_lines, n_rows = position + len(line), n_lines + 1, n_rows + bool(line.strip())
                if n_rows == size:
                    yield Span(first, n_lines, n_rows, offset)
                    first, n_lines, n_rows, offset = first + n_lines, 0, 0, position
        if n_rows:
            yield Span(first, n_lines, n_rows, offset)

    def read(self, span: Span) -> LinePart:
        with explained(self.file, "read"):
            self.handle.seek(span.offset)
            return LinePart(list(islice(self.handle, span.n_lines)), span.first)


class LinePart:
    """Rows that were JSON lines."""

    def __init__(self, lines: Sequence[bytes], first: int) -> None:
        self.lines, self.first = lines, first
        self.rows = [_unclashing(row) for row in parse_rows(lines, first)]

    def original(self, index: int) -> object:
        row = self.rows[index]
        number = row.line if isinstance(row, BadRow) else row[0]
        return self.lines[number - self.first].decode(errors="replace").strip()

    def scored(self, lines: Sequence[Line], file: str) -> bytes:
        written = []
        for row, line in zip(self.rows, lines, strict=True):
            values = {} if isinstance(row, BadRow) else row[1]
            written.append(as_json({**values, "file": file, **line}) + "\n")
        return "".join(written).encode()


def _unclashing(row: Row) -> Row:
    """A row that has one of ADDED already is a bad one: its own would be lost."""
    taken = [] if isinstance(row, BadRow) else [name for name in ADDED if name in row[1]]
    if isinstance(row, BadRow) or not taken:
        return row
    return BadRow(row[0], f"it has {taken[0]!r} already, which scoring adds; rename it")


class TableReader:
    """Parquet, read forwards from the row group in which a shard starts."""

    def __init__(self, handle: IO[bytes], file: str, files: AbstractFileSystem) -> None:
        self.file, self.source = file, pq.ParquetFile(handle)
        self.files = files  # kept: an archive closes what was opened in it when it goes
        groups = range(self.source.num_row_groups)
        sizes = [self.source.metadata.row_group(group).num_rows for group in groups]
        self.starts = list(accumulate(sizes, initial=0))
        self.position = self.starts[-1] + 1  # of the next row in ``rest``, from 0: past the end, nothing was read
        self.rest: pa.RecordBatch | None = None
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def spans(self, size: int) -> Iterator[Span]:
        taken = [name for name in ADDED if name in self.source.schema_arrow.names]
        if taken:
            raise InputError(f"{self.file} has a column {taken[0]!r} already, which scoring adds. Rename it.")
        n_rows = self.starts[-1]
        for start in range(0, n_rows, size):
            yield Span(start + 1, min(size, n_rows - start), min(size, n_rows - start))

    def read(self, span: Span) -> TablePart:
        with explained(self.file, "read"):
            pieces = list(self._pieces(span.first - 1, span.first - 1 + span.n_lines))
        return TablePart(pa.Table.from_batches(pieces, self.source.schema_arrow), span.first)

    def _pieces(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows ``start`` to ``stop``; those before are passed over, whole row groups unread."""
        if start < self.position or self._group_of(start) > self._group_of(self.position):
            group = self._group_of(start)
            self.position, self.rest = self.starts[group], None
            groups = list(range(group, self.source.num_row_groups))
            self.batches = self.source.iter_batches(_BATCH, row_groups=groups)
        while self.position < stop:
            batch = next(self.batches, None) if self.rest is None else self.rest
            if batch is None:
                return
            wanted = self.position >= start
            size = min(batch.num_rows, (stop if wanted else start) - self.position)
            if wanted:
                yield batch.slice(0, size)
            self.rest = batch.slice(size) if size < batch.num_rows else None
            self.position += size

    def _group_of(self, row: int) -> int:
        return bisect_right(self.starts, row) - 1


class TablePart:
    """Rows that were Parquet; what is null in a row is not there.

    Of a row only what scoring reads is made a Python value: others may hold what Python has no value for.
    """

    def __init__(self, table: pa.Table, first: int) -> None:
        self.table = table
        self.rows: list[Row] = [_table_row(line, values) for line, values in enumerate(self._values(), first)]

    def _values(self) -> Iterator[dict[str, pa.Scalar]]:
        for scalars in zip(*self.table.columns, strict=True):
            yield {name: value for name, value in zip(self.table.column_names, scalars, strict=True) if value.is_valid}

    def original(self, index: int) -> object:
        row = self.table.slice(index, 1)
        columns = zip(row.column_names, row.columns, strict=True)
        return {name: _told(column) for name, column in columns if column[0].is_valid}

    def scored(self, lines: Sequence[Line], file: str) -> bytes:
        table = self.table.append_column("file", pa.array([file] * len(lines), pa.string()))
        table = table.append_column("line", pa.array([line["line"] for line in lines], pa.int64()))
        table = table.append_column("verdicts", pa.array([line["verdicts"] for line in lines], _VERDICTS))
        content = BytesIO()
        pq.write_table(table, content)
        return content.getvalue()


def _table_row(line: int, values: dict[str, pa.Scalar]) -> Row:
    """A row with the Python values of what scoring reads; one that Python cannot hold makes it a bad row."""
    read = {}
    for name in columns_of(values):
        try:
            read[name] = values[name].as_py()
        except _UNREADABLE as error:
            return BadRow(line, f"column {name!r} cannot be read: {error}; expected valid text")
    return line, {**values, **read}


def _told(column: pa.ChunkedArray) -> object:
    """The one value of a column, or how Arrow prints it where Python has no value for it."""
    try:
        return column[0].as_py()
    except _UNREADABLE:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return bytes(column[0].as_buffer()).decode(errors="replace")
        printed: str = column.combine_chunks().to_string(skip_new_lines=True, **_WHOLE)
        return printed.removeprefix("[").removesuffix("]").strip()
