"""Documents that become context: texts and PDFs, and what is said of those that cannot be read."""

import codecs
import socket
import threading
from io import BytesIO

import httpx2 as httpx
import pytest
from fuzz.targets import pdf
from patience import PATIENCE_S, wait_until
from pypdf import PdfReader, PdfWriter
from refusals import refused
from serving import listening

from qaflora_edge.errors import CancelledError, InputFileError
from qaflora_edge.formats import document
from qaflora_edge.formats.document import document_text, read_pdf
from qaflora_edge.server import uploads
from qaflora_edge.server.receive import SLOW_S


def pdf_of(*pages: str) -> bytes:
    """A PDF with a line of text a page, written by hand."""
    n_page = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(n_page))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {n_page} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        font = "<< /Font << /F1 3 0 R >> >>"
        page = f"/Type /Page /Parent 2 0 R /Contents {5 + 2 * i} 0 R /Resources {font}"
        objects.append(f"<< {page} /MediaBox [0 0 612 792] >>")
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    return pdf([text.encode() for text in objects])


def encrypted(password: str) -> bytes:
    writer = PdfWriter(PdfReader(BytesIO(pdf_of("secret"))))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize("data", [b"a\r\nb\n", codecs.BOM_UTF8 + b"a\nb", "a\nb".encode("utf-16")])
def test_a_text_is_read_in_the_encoding_that_it_has(data) -> None:
    assert document_text("a.txt", data) == "a\nb"


def test_the_pages_of_a_pdf_are_read() -> None:
    assert document_text("a.pdf", pdf_of("One page", "and another")) == "One page\n\nand another"


def test_a_pdf_that_opens_without_a_password_is_read() -> None:
    assert read_pdf(encrypted("")) == {"text": "secret"}


def test_characters_that_no_text_has_are_left_out() -> None:
    table = ") begincmap 2 beginbfchar <41> <D800> <42> <0000> endbfchar ("
    data = pdf_of("ABC", table).replace(b"/BaseFont /Helvetica", b"/ToUnicode 7 0 R    ")
    assert read_pdf(data)["text"].startswith("?C")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"a" * (5 << 20), "it has more than 4 MiB of text. Give a part of it."),
        (encrypted("key"), "it is encrypted. Save it without a password."),
        (pdf_of(*["x"] * 501), "it has 501 pages, expected at most 500. Give a part of it."),
        (pdf_of(""), "it has no text. Recognise the text of pages that are pictures first."),
        (b"\x89PNG\r\n\0", "it is neither a text in UTF-8 nor a PDF. Save it as one of them."),
    ],
)
def test_what_cannot_be_read_is_said(data, fault) -> None:
    assert refused(InputFileError, document_text, "a.pdf", data) == f"Cannot read a.pdf: {fault}"


def test_a_damaged_pdf_and_one_of_much_text_are_said_to_be_so(monkeypatch) -> None:
    monkeypatch.setattr(document, "MAX_TEXT_BYTES", 9)
    assert read_pdf(pdf_of("One page", "and another"))["fault"].startswith("it has more than 4 M")
    assert read_pdf(pdf_of("One page")[:60])["fault"].startswith("it is no whole PDF (")


def test_a_pdf_has_limited_time(monkeypatch) -> None:
    monkeypatch.setattr(document, "READ_S", 0.001)
    with pytest.raises(InputFileError, match="it takes longer"):
        document_text("a.pdf", pdf_of("x"))


def test_a_pdf_that_nobody_waits_for_is_read_no_further() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError, match="Nobody waits"):
        document_text("a.pdf", pdf_of("x"), cancel)


def test_a_document_is_sent_as_text_with_its_size_in_tokens(client) -> None:
    response = client.post("/document?name=a.pdf", content=pdf_of("the thing"))
    n_token = len(client.post("/tokenize", json={"content": "the thing"}).json()["tokens"])
    assert response.json() == {"text": "the thing", "n_token": n_token}


def test_a_document_that_cannot_be_read_is_refused(client) -> None:
    response = client.post("/document?name=a.png", content=b"\0")
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("Cannot read a.png: it is neither")


def test_a_document_is_not_larger_than_50_megabytes(client) -> None:
    size = {"content-length": str(60 * 10**6)}
    response = client.post("/document?name=a.pdf", content=b"", headers=size)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_a_document_that_comes_slowly_stops_no_other_and_is_dropped_with_its_sender(
    made, monkeypatch
) -> None:
    def read(name: str, data: bytes, cancel: threading.Event) -> str:
        begun.set()
        ended.append(cancel.wait(PATIENCE_S))
        return ""

    begun = threading.Event()
    ended: list[bool] = []
    with listening(made.folder) as url:
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port), PATIENCE_S) as slow:
            slow.sendall(b"POST /document HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
            other = httpx.post(f"{url}/document", content=b"text", timeout=SLOW_S / 2)
            assert other.json()["text"] == "text"
            monkeypatch.setattr(uploads, "document_text", read)
            slow.sendall(b"%PDF-")
            assert begun.wait(PATIENCE_S)
        wait_until(lambda: ended == [True])
