"""Parts of a table: how it is cut, and reading one out of a file and nothing else of it."""

from collections.abc import Iterator

from qaflora_edge.files import AnyPath, open_input


def parts(n: int, n_part: int) -> Iterator[range]:
    """Cut 0 to n into neighbouring parts of n_part; the last may have fewer."""
    for begin in range(0, n, n_part):
        yield range(begin, min(begin + n_part, n))


def read_columns(path: AnyPath, offset: int, row_bytes: int, rows: range, columns: range) -> bytes:
    """Read a part of a table of bytes: the same bytes out of each of neighbouring rows.

    offset   of the table in the file
    rows     neighbouring rows, and `columns` neighbouring bytes of each
    returns  len(rows) * len(columns) bytes; less where the file ends before

    Raises OSError.
    """
    with open_input(path) as file:
        if len(columns) == row_bytes:
            file.seek(offset + rows.start * row_bytes)
            return file.read(len(rows) * row_bytes)
        pieces = []
        for row in rows:
            file.seek(offset + row * row_bytes + columns.start)
            pieces.append(file.read(len(columns)))
        return b"".join(pieces)
