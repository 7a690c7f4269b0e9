"""Documents: the text of a text file or a PDF, read in limited time and memory.

A PDF may do anything to the library that reads it. So a process of its own reads it:
`python -m qaflora_edge.formats.document`.
"""

import codecs
import contextlib
import json
import os
import subprocess
import sys
import threading
from io import BytesIO

from qaflora_edge.errors import CancelledError, InputFileError

MAX_BYTES = 50 * 10**6
MAX_PAGES = 500
MAX_TEXT_BYTES = 4 << 20  # no request has room for more
READ_S = 60.0  # the longest that a PDF may take
MEMORY_BYTES = 1 << 30
_PDF = b"%PDF-"
_START = 1024  # bytes in which a PDF says that it is one
_TOO_LONG = f"it has more than {MAX_TEXT_BYTES >> 20} MiB of text. Give a part of it"


def document_text(name: str, data: bytes, cancel: threading.Event | None = None) -> str:
    """Give the text of a document. Raises InputFileError that says what is wrong with it.

    cancel  once set, ends the process that reads a PDF: CancelledError. Set afterwards in any case
    """
    if _PDF in data[:_START]:
        text = _pdf_text(name, data, cancel or threading.Event())
    else:
        text = _plain_text(name, data)
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise _wrong(name, "it has no text. Recognise the text of pages that are pictures first")
    if len(text.encode()) > MAX_TEXT_BYTES:
        raise _wrong(name, _TOO_LONG)
    return text


def _plain_text(name: str, data: bytes) -> str:
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
        if "\0" not in text:
            return text
    raise _wrong(name, "it is neither a text in UTF-8 nor a PDF. Save it as one of them")


def _pdf_text(name: str, data: bytes, cancel: threading.Event) -> str:
    command = [sys.executable, "-P", "-m", __name__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:

        def end() -> None:
            cancel.wait()
            process.kill()

        ending = threading.Thread(target=end)
        ending.start()
        try:
            output, _ = process.communicate(data, timeout=READ_S)
            is_cancelled = cancel.is_set()
        except subprocess.TimeoutExpired as error:
            fault = f"it takes longer than {READ_S:g} s. Give a part of it"
            raise _wrong(name, fault) from error
        finally:
            cancel.set()
            ending.join()
    if is_cancelled:
        raise CancelledError("Nobody waits for the document any more.")
    answer: dict[str, str] = {}
    with contextlib.suppress(ValueError):  # it ended for lack of memory
        answer = json.loads(output)
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
        pages = []
        n_byte = 0
        for page in reader.pages:
            # A damaged table of characters gives halves of surrogate pairs, and NUL.
            text = page.extract_text().encode("utf-8", "replace").replace(b"\0", b"")
            pages.append(text.decode())
            n_byte += len(text)
            if n_byte > MAX_TEXT_BYTES:
                return {"fault": _TOO_LONG}
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

        os.nice(5)  # answers come first
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        seconds = int(READ_S) + 1  # where nobody is left to end it
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    json.dump(read_pdf(sys.stdin.buffer.read()), sys.stdout)


if __name__ == "__main__":
    main()
