"""Documents: the text of a text file or a PDF, read in limited time and memory.

A PDF may do anything to the library that reads it. So a process of its own reads it:
`python -m qaflora_edge.formats.document`.
"""

import codecs
import contextlib
import json
import subprocess
import sys
from io import BytesIO

from qaflora_edge.errors import InputFileError

MAX_BYTES = 50 * 10**6
MAX_PAGES = 500
READ_S = 60.0  # the longest that a PDF may take
MEMORY_BYTES = 2 << 30
_PDF = b"%PDF-"
_START = 1024  # bytes in which a PDF says that it is one


def document_text(name: str, data: bytes) -> str:
    """Give the text of a document. Raises InputFileError that says what is wrong with it."""
    text = _pdf_text(name, data) if _PDF in data[:_START] else _plain_text(name, data)
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise _wrong(name, "it has no text. Recognise the text of pages that are pictures first")
    return text


def _plain_text(name: str, data: bytes) -> str:
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
        if "\0" not in text:
            return text
    raise _wrong(name, "it is neither a text in UTF-8 nor a PDF. Save it as one of them")


def _pdf_text(name: str, data: bytes) -> str:
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=READ_S)
    except subprocess.TimeoutExpired as error:
        fault = f"it takes longer than {READ_S:g} s. Give a part of it"
        raise _wrong(name, fault) from error
    answer: dict[str, str] = {}
    with contextlib.suppress(ValueError):  # it ended for lack of memory
        answer = json.loads(done.stdout)
    if "text" not in answer:
        fault = f"it needs more than {MEMORY_BYTES >> 30} GiB of memory. Give a part of it"
        raise _wrong(name, answer.get("fault", fault))
    return answer["text"]


def _wrong(name: str, fault: str) -> InputFileError:
    return InputFileError(f"Cannot read {name}: {fault}.")


def read_pdf(data: bytes) -> dict[str, str]:
    """Give the `text` of a PDF, or its `fault`."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError

    locked = {"fault": "it is encrypted. Save it without a password"}
    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            return locked
        n_page = len(reader.pages)
        if n_page > MAX_PAGES:
            limit = f"expected at most {MAX_PAGES}. Give a part of it"
            return {"fault": f"it has {n_page} pages, {limit}"}
        pages = [page.extract_text() for page in reader.pages]
    except (DependencyError, FileNotDecryptedError):
        return locked
    except MemoryError:
        raise
    except Exception as error:  # of any kind, where a file is damaged
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        return {"fault": f"it is no whole PDF ({reason}). Export or download it again"}
    return {"text": "\n\n".join(pages)}


def main() -> None:
    """Read a PDF from the standard input, and write what came of it as JSON."""
    with contextlib.suppress(ImportError):  # there is none on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    json.dump(read_pdf(sys.stdin.buffer.read()), sys.stdout)


if __name__ == "__main__":
    main()
