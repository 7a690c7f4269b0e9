"""Read safetensors files tensor by tensor, as float32.

The safetensors package checks the header: known dtypes, dtype x shape equal to the bytes, no holes
up to the end of the file. It accepts a tensor named twice, gives numpy no bfloat16, and maps a file
that someone may shorten. So names are checked and values read here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.errors import SafetensorsFileError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.gguf import DIVERGED, read_bytes
from qaflora_edge.formats.inputs import open_input, reading
from qaflora_edge.formats.json_text import read_json_object

MAX_HEADER_BYTES = 1 << 24  # the format allows 100 MB; an adapter needs a few hundred KB
MAX_NAME_LENGTH = 256
MAX_READ_BYTES = 1 << 32  # of one tensor; rank 4096 on 256,000 tokens as F32
FORMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # the upper half of a float32


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: shape in numpy order, bytes from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    def read(self) -> F32:
        """Read all values.

        returns  [*shape]  float32, finite

        Raises InputFileError when the file is gone, SafetensorsFileError when it became shorter,
        the type is no float, or a value is NaN or infinite.
        """
        if self.dtype not in FORMS:
            expected = f"{', '.join(FORMS)}. Save the adapter in one of these."
            raise self._wrong(f"its dtype is {self.dtype}", expected)
        if self.n_bytes > MAX_READ_BYTES:
            expected = f"at most {MAX_READ_BYTES} of a matrix. Check that it is a plain LoRA."
            raise self._wrong(f"it has {self.n_bytes} bytes", expected)
        raw = read_bytes(self.path, self.offset, self.n_bytes, SafetensorsFileError)
        values = np.frombuffer(raw, FORMS[self.dtype])
        if self.dtype == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        if n_bad := values.size - int(np.count_nonzero(np.isfinite(values))):
            found = f"{n_bad} of its {values.size} values are NaN or infinite"
            raise self._wrong(found, f"finite numbers. {DIVERGED}")
        return values.astype(np.float32, copy=False).reshape(self.shape)

    def _wrong(self, found: str, expected: str) -> SafetensorsFileError:
        start = f"Cannot use tensor {self.name} of {self.path}"
        return SafetensorsFileError(f"{start}: {found}; expected {expected}")


def read_safetensors(path: AnyPath) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file; values are read later, one by one.

    Raises InputFileError when it cannot be opened, SafetensorsFileError when it is not sound.
    """
    import safetensors

    path = Path(path)

    try:
        with reading(path), open_input(path) as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_header > MAX_HEADER_BYTES:
                raise ValueError(f"it has {n_header} bytes, expected at most {MAX_HEADER_BYTES}")
            header = file.read(n_header)
        with reading(path), safetensors.safe_open(path, "numpy"):
            entries = read_json_object(header)
        entries.pop("__metadata__", None)
        if (longest := max(map(len, entries), default=0)) > MAX_NAME_LENGTH:
            found = f"a tensor's name has {longest} characters, expected at most {MAX_NAME_LENGTH}"
            raise ValueError(found)
    except (safetensors.SafetensorError, ValueError) as error:  # errors of JSON and UTF-8 too
        raise SafetensorsFileError(
            f"Cannot read {path}: its header cannot be used ({error}). The file is truncated, "
            "corrupted or not a safetensors file; fetch or save it again."
        ) from error
    tensors = {}
    for name, entry in entries.items():
        begin, end = (8 + n_header + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, name, entry["dtype"], shape, begin, end - begin)
    return tensors
