"""Damage files: bytes anywhere, or by the structure that a reader steps through.

Nothing of the package is used here: what a file may hold is not taken from its reader.
"""

import json
import random
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

Case = dict[str, bytes]  # name in the folder -> content

COUNTS = (0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 255, 256, 4095, 65535, 65536, 1 << 24)
BORDERS = (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = ("", " ", ".", "..", "../x", "/etc/passwd", "a/../../b", "C:\\x", "a\0b", "é")
WORDS = ("NaN", "null", "0", "-1", "1e999", "%s%n", "{0}")
TEXTS = (*NAMES, "x" * 300, "x" * 70000, "\x1b[31m", *WORDS)
PATTERNS = ("(", "a?" * 30, "(a|a)*b", ".*.*.*.*", "[z-a]", "\\", "(?P<x>a)(?P=x)", "a{1000}", "^$")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.0, -0.5, 1e-300, 1e300,
    [], {}, [[]], {"": ""}, [None] * 100, *TEXTS, *PATTERNS,
)  # fmt: skip
JSON_BITS = (b"NaN", b"Infinity", b"1e999", b"\xff", b"\\ud800", b"[" * 2000, b"9" * 5000, b"\0")


def mutate(case: Mapping[str, bytes], rng: random.Random) -> Case:
    """Give a copy of a case with one to four damages, in one of its files as a rule."""
    damaged = dict(case)
    name = rng.choice(sorted(damaged))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        damaged[name] = _damage_file(name, damaged[name], rng)
        if rng.random() < 0.1:
            name = rng.choice(sorted(damaged))
    return damaged


def _damage_file(name: str, data: bytes, rng: random.Random) -> bytes:
    ways = {
        "json": damage_json,
        "safetensors": damage_safetensors,
        "gguf": damage_gguf,
        "pdf": partial(damage_words, words=PDF_WORDS),
        "jinja": partial(damage_words, words=JINJA_WORDS),
        "Modelfile": partial(damage_words, words=MODELFILE_WORDS),
    }
    by_structure = ways.get(name.rpartition(".")[2])
    if by_structure is not None and rng.random() < 0.8:
        try:
            return by_structure(data, rng)
        except (ValueError, KeyError, IndexError, struct.error, RecursionError, OverflowError):
            pass  # an earlier damage took the structure away
    return damage_bytes(data, rng)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or insert bytes anywhere."""
    if not data:
        return rng.randbytes(rng.randint(1, 16))
    raw, at = bytearray(data), rng.randrange(len(data))
    length = rng.choice((1, 2, 4, 8, 64, len(data)))
    choice = rng.randrange(6)
    if choice == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif choice == 1:
        raw[at] = rng.choice((0, 1, 8, 9, 127, 128, 255))
    elif choice == 2:
        del raw[at : at + length]
    elif choice == 3:
        raw[at:at] = raw[at : at + length]
    elif choice == 4:
        raw[at : at + 8] = struct.pack("<Q", rng.choice(COUNTS + BORDERS) & (2**64 - 1))
    else:
        raw[at:at] = rng.randbytes(rng.randint(1, 9))
    return bytes(raw)


PDF_WORDS = (
    *(b"/Filter/FlateDecode", b"/Filter[/ASCIIHexDecode/FlateDecode]", b"/Length 99999999999"),
    *(b"/Kids[2 0 R]", b"/Count -1", b"/Parent 3 0 R", b"/Prev 0", b"/Encrypt 4 0 R", b"<<", b">>"),
    *(b"stream\n", b"endobj\n", b"1 0 obj\n", b"[" * 999, b"(", b" 0 R", b"BT", b"Tj", b"-"),
    *(
        b"/ToUnicode 4 0 R",
        b"/Type0",
        b"/Identity-H",
        b"/ObjStm",
        b"/XRef",
        b"99999999999999999999",
    ),
)
JINJA_WORDS = (
    *(b"{% for x in range(10**9) %}", b"{% endfor %}", b"{{ messages * 10**9 }}", b"{% if x %}"),
    *(
        b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        b"{{ ().__class__ }}",
        b"|replace('','x')",
    ),
    *(b"{% set x = x ~ x %}", b"|tojson", b"|join('x' * 10**8)", b"{{ '%99999999d' % 1 }}", b"-%}"),
    *(
        b"{{ 9 ** 9 ** 9 }}",
        b"{% generation %}",
        b"{{ [1] * 10**12 }}",
        b"|list|sort",
        b"{{",
        b"}}",
    ),
    *(
        b"{{ cycler.__init__.__globals__ }}",
        b"{{ 'x'.format(x) }}",
        b"{% include 'x' %}",
        b"[::-1]",
    ),
)
MODELFILE_WORDS = (
    *(b'"""', b'"', b"\n", b"FROM ", b"FROM ../../x:y\n", b"ADAPTER ", b"SYSTEM ", b"TEMPLATE x\n"),
    *(b"MESSAGE user ", b"MESSAGE robot x\n", b"PARAMETER stop ", b"PARAMETER seed 1e999\n"),
    *(b"PARAMETER temperature nan\n", b"LICENSE ", b"#", b"\xff\xfe", b"\0", b"~root/x", b"/etc\n"),
)


def damage_words(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """Put a word of the format anywhere, or repeat a piece many times."""
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.2:
        return data[:at] + data[at : at + 40] * rng.choice((2, 50, 2000)) + data[at:]
    return data[:at] + rng.choice(words) + data[at:]


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Change one value or key at any depth, or write what the grammar forbids."""
    root = json.loads(data)
    places = _places(root)
    if not places or rng.random() < 0.15:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice(JSON_BITS) + data[at:]
    parent, key = rng.choice(places)
    choice = rng.randrange(8)
    if choice <= 3:
        parent[key] = _other_value(parent[key], rng)
    elif choice == 4:
        del parent[key]
    elif choice == 5 and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, *PATTERNS, str(key) + "x"))] = parent.pop(key)
    elif choice == 6:
        other_parent, other_key = rng.choice(places)
        parent[key] = json.loads(json.dumps(other_parent[other_key]))
    else:
        return _repeat_key(root, parent, key, rng)
    return json.dumps(root, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    places: list[tuple[Any, Any]] = []
    pending = [root]
    while pending and len(places) < 5000:
        item = pending.pop()
        keys = (
            item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        )
        for key in keys:
            places.append((item, key))
            pending.append(item[key])
    return places


def _other_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((value + 1, value - 1, -value, value * 2, *COUNTS, *BORDERS))
    if isinstance(value, list) and value and rng.random() < 0.6:
        return rng.choice((value[:-1], value * 2, [value], value[::-1], [*value, None]))
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value + value, value[:-1], value + "\n", value.upper(), value + "é"))
    if rng.random() < 0.05:
        for _ in range(rng.choice((10, 70, 900))):
            value = [value]
        return value
    return rng.choice(VALUES)


def _repeat_key(root: Any, parent: Any, key: Any, rng: random.Random) -> bytes:
    if not isinstance(parent, dict):
        parent.append(parent[key])
        return json.dumps(root).encode()
    mark = "qaflora-fuzz-mark"
    parent[mark] = rng.choice((parent[key], None, 0))
    return json.dumps(root).replace(json.dumps(mark), json.dumps(str(key))).encode()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header and keep its length right, lie about it, or change the values."""
    n_header = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + n_header], data[8 + n_header :]
    choice = rng.randrange(8)
    if choice == 0:
        lie = rng.choice((n_header + 1, n_header - 1, len(data), *COUNTS, *BORDERS))
        return struct.pack("<Q", lie & (2**64 - 1)) + data[8:]
    if choice == 1:
        values = _damage_floats(values, rng)
    elif choice == 2:
        values = rng.choice((values[:-1], values + b"\0", b"", values * 2))
    elif choice == 3:
        header = damage_bytes(header, rng)
    else:
        header = damage_json(header, rng)
    return struct.pack("<Q", len(header)) + header + values


def _damage_floats(values: bytes, rng: random.Random) -> bytes:
    if len(values) < 4:
        return values
    at = rng.randrange(len(values) // 4) * 4
    number = rng.choice((0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x80000000, 0x7C007C00))
    return values[:at] + struct.pack("<I", number) + values[at + 4 :]


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class Gguf:
    """A GGUF taken apart, with counts that may lie when it is put together again."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 4
        self.version, n_tensor, n_field = self._unpack("<IQQ")
        self.count_lies = [0, 0]  # added to the numbers of tensors and fields
        self.fields = [self._field() for _ in range(n_field)]
        self.tensors = [self._tensor() for _ in range(n_tensor)]
        self.alignment = 32
        self.values = data[-(-self.position // 32) * 32 :]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return found

    def _text(self) -> bytes:
        (length,) = self._unpack("<Q")
        self._step(length)
        return self.data[self.position - length : self.position]

    def _field(self) -> list[Any]:
        key, (kind,) = self._text(), self._unpack("<I")
        begin = self.position
        self._skip(kind)
        return [key, kind, self.data[begin : self.position]]

    def _skip(self, kind: int) -> None:
        if kind == 8:
            self._text()
        elif kind == 9:
            item_kind, length = self._unpack("<IQ")
            if item_kind in _SIZES:
                self._step(length * _SIZES[item_kind])
            for _ in range(0 if item_kind in _SIZES else length):
                self._skip(item_kind)
        else:
            self._step(_SIZES[kind])

    def _step(self, n_bytes: int) -> None:
        self.position += n_bytes
        if self.position > len(self.data):
            raise ValueError("past the end")

    def _tensor(self) -> list[Any]:
        name, (n_dims,) = self._text(), self._unpack("<I")
        dims = list(self._unpack(f"<{n_dims}Q"))
        return [name, dims, *self._unpack("<IQ")]

    def join(self) -> bytes:
        counts = (len(self.tensors) + self.count_lies[0], len(self.fields) + self.count_lies[1])
        parts = [b"GGUF", struct.pack("<I", self.version % 2**32)]
        parts += [struct.pack("<Q", count % 2**64) for count in counts]
        for key, kind, value in self.fields:
            parts += [struct.pack("<Q", len(key)), key, struct.pack("<I", kind), value]
        for name, dims, kind, offset in self.tensors:
            parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(dims))]
            parts += [struct.pack("<Q", dim % 2**64) for dim in dims]
            parts += [struct.pack("<IQ", kind % 2**32, offset % 2**64)]
        head = b"".join(parts)
        return head + b"\0" * (-len(head) % self.alignment) + self.values


def damage_gguf(data: bytes, rng: random.Random) -> bytes:
    """Change a count, a field, a tensor's entry or the values, and write the file anew."""
    parts = Gguf(data)
    choice = rng.randrange(10)
    if choice == 0:
        parts.count_lies[rng.randrange(2)] = rng.choice((-1, 1, *COUNTS, *BORDERS))
    elif choice <= 4 and parts.fields:
        _damage_field(parts, rng)
    elif choice <= 8 and parts.tensors:
        _damage_tensor(parts, rng)
    else:
        parts.values = rng.choice(
            (_damage_floats(parts.values, rng), damage_bytes(parts.values, rng))
        )
    return parts.join()


def _damage_field(parts: Gguf, rng: random.Random) -> None:
    field = rng.choice(parts.fields)
    choice = rng.randrange(7)
    if choice == 0:
        parts.fields.remove(field)
    elif choice == 1:
        parts.fields.append(list(rng.choice((field, parts.fields[0]))))
    elif choice == 2:
        field[0] = rng.choice((field[0] + b"x", b"", b"\xff", b"general.alignment", b"split.count"))
    elif choice == 3:
        field[1] = rng.choice((*_SIZES, 8, 9, 13, 255))
    elif choice == 4 and len(field[2]) >= 4:
        number = rng.choice(COUNTS + BORDERS)
        width = 8 if len(field[2]) >= 8 and rng.random() < 0.7 else 4
        field[2] = (number % 2 ** (8 * width)).to_bytes(width, "little") + field[2][width:]
    elif choice == 5:
        text = rng.choice((*TEXTS, "lora", "adapter", "llama")).encode()
        field[1:] = [8, struct.pack("<Q", len(text)) + text]
    else:
        field[2] = damage_bytes(field[2], rng)


def _damage_tensor(parts: Gguf, rng: random.Random) -> None:
    tensor = rng.choice(parts.tensors)
    other = rng.choice(parts.tensors)
    choice = rng.randrange(9)
    if choice == 0:
        parts.tensors.remove(tensor)
    elif choice == 1:
        parts.tensors.append([tensor[0], list(tensor[1]), *tensor[2:]])
    elif choice == 2:
        new = rng.choice(TEXTS).encode()
        tensor[0] = rng.choice(
            (tensor[0] + b"x", tensor[0][:-1], new, other[0], b"x" * 63, b"x" * 64)
        )
    elif choice == 3 and tensor[1]:
        at = rng.randrange(len(tensor[1]))
        tensor[1][at] = rng.choice((tensor[1][at] + 1, tensor[1][at] * 2, *COUNTS, *BORDERS))
    elif choice == 4:
        tensor[1] = rng.choice((tensor[1][::-1], [*tensor[1], 1], tensor[1][:-1], [1] * 5, []))
    elif choice == 5:
        tensor[2] = rng.randrange(45)
    elif choice == 6:
        tensor[3] = rng.choice((other[3], tensor[3] + 1, tensor[3] + 32, *COUNTS, *BORDERS))
    elif choice == 7:
        tensor[1], other[1] = other[1], tensor[1]
    else:
        tensor[0], other[0] = other[0], tensor[0]
