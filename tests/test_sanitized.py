"""What counts as a problem in the reports of the sanitizers."""

import pytest
import sanitized

LOG = """
=================================================================
==17==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 616 byte(s) in 2 object(s) allocated from:
    #0 0x7f in malloc (/usr/lib/libasan.so+0xf4c57) (BuildId: 23)
    #1 0x7f in _PyObject_Malloc Objects/obmalloc.c:2003

Direct leak of 308 byte(s) in 1 object(s) allocated from:
    #0 0x7f in malloc (/usr/lib/libasan.so+0xf4c57) (BuildId: 23)
    #1 0x7f in llama_batch_init /cache/sources/llama.cpp-0c1e5709-50/src/llama-batch.cpp:995

SUMMARY: AddressSanitizer: 924 byte(s) leaked in 3 allocation(s).
"""
OVERFLOW = """
=================================================================
==17==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60 at pc 0x7f
READ of size 4 at 0x60 thread T0
    #0 0x7f in qaflora_pack_init /src/patches/src/qaflora-pack.cpp:9
"""
UNDEFINED = (
    "/src/patches/src/qaflora-pack.cpp:9:3: runtime error: division by zero\n    #0 0x7f in f\n"
)


def test_leaks_count_where_our_libraries_allocated() -> None:
    reports = sanitized.split_reports(LOG)
    assert len(reports) == 3
    problems = [report for report in reports if sanitized.is_problem(report)]
    assert len(problems) == 1
    assert "llama_batch_init" in problems[0]


@pytest.mark.parametrize("log", [OVERFLOW, UNDEFINED, UNDEFINED + UNDEFINED])
def test_every_other_report_is_a_problem(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = sanitized.split_reports(log)
    assert len(reports) == log.count("ERROR: ") + log.count("runtime error:")
    assert all(sanitized.is_problem(report) for report in reports)
    monkeypatch.setattr(sanitized, "KNOWN", {"qaflora-pack.cpp:9": "a reason"})
    assert not any(sanitized.is_problem(report) for report in reports)
