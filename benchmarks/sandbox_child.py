"""The process that runs a model's code: it gives up what it may do, then runs it.

It is started by `sandbox`, as a script of its own that imports nothing of the package: stdin has
what it runs, and its last word goes to a pipe. This keeps mistakes of models in bounds: loops,
memory, files, processes, the network. It is no wall against code that was written to break out.
"""

import ctypes
import json
import os
import resource
import sys
import types
from typing import Any

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 8, 38  # linux/prctl.h
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2  # linux/capability.h
# linux/landlock.h; the numbers of its calls are the same on every processor.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
WRITING = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # and making and removing files
SINCE = {2: 1 << 13, 3: TRUNCATE}  # version -> what it can forbid besides: moving, truncating
TCP, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals


def main() -> None:
    """Run the first source that is Python, then its test; say whether both ended as they should."""
    asked: dict[str, Any] = json.load(sys.stdin)
    tell = os.fdopen(asked["pipe"], "w", encoding="utf-8")
    try:
        isolated, problem = give_up(asked["limits"]), ""
    except OSError as error:
        isolated, problem = [], str(error)
    print(json.dumps({"isolated": isolated, "problem": problem}), file=tell, flush=True)
    if problem:
        return
    failure = ""
    try:
        module = sys.modules["answer"] = types.ModuleType("answer")  # dataclasses look there
        exec(first_that_compiles(asked["sources"]), module.__dict__)
        module.__name__, sys.modules["__main__"] = "__main__", module
        exec(compile(asked["test"], "<test>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        failure = f"SystemExit: {error.code}"
    except BaseException as error:
        failure = describe(error)
    print(json.dumps({"word": asked["word"], "failure": failure}), file=tell, flush=True)
    tell.close()
    os._exit(0)  # whatever the code left to be done


def describe(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    try:
        text = str(error)
    except BaseException:  # of a class that the code made
        text = "?"
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")


def first_that_compiles(sources: list[str]) -> Any:
    """The first of several readings of an answer that is Python, compiled."""
    first: BaseException | None = None
    for source in sources:
        try:
            return compile(source, "<answer>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            first = first or error
    raise first or SyntaxError("there is no code in the answer")


def give_up(limits: dict[str, int]) -> list[str]:
    """Bound this process for good; what it is kept from besides: "network", "tcp", "files".

    limits  name of a resource.RLIMIT_* -> its value
    """
    isolated = []
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    is_root = os.geteuid() == 0
    if libc is not None:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # A user who is not root may have a network of their own in a namespace of their own.
        flags = CLONE_NEWNET if is_root else CLONE_NEWUSER | CLONE_NEWNET
        if libc.unshare(flags) == 0:
            isolated.append("network")
    if is_root:
        become_nobody(libc)
    elif libc is not None:
        capset(libc, 0)  # those that the namespace gave
    if libc is not None:
        isolated += landlock(libc, isolated)
    for name, value in limits.items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    return isolated


def become_nobody(libc: Any) -> None:
    """Limits on processes do not bind root, and nobody may write hardly anywhere.

    Where Python lies in a folder of root's, reading stays allowed.
    """
    if libc is not None:
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if libc is not None:
        kept = 0 if os.access(os.__file__, os.R_OK) else CAP_DAC_READ_SEARCH
        capset(libc, kept)
    try:
        open(os.__file__, "rb").close()
    except OSError as error:
        raise PermissionError(
            "in place of root the user nobody runs the code of answers, and may not read "
            f"{os.__file__} ({error.strerror}); evaluate as another user"
        ) from error


def capset(libc: Any, kept: int) -> None:
    """Drop all capabilities but these."""
    data = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), data)


def landlock(libc: Any, isolated: list[str]) -> list[str]:
    """Forbid writing outside this folder, and TCP, where Linux can; what was forbidden."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return []
    writing = WRITING | sum(bit for since, bit in SINCE.items() if version >= since)
    has_net, has_scopes = version >= 4, version >= 6
    rules = (ctypes.c_uint64 * 3)(writing, TCP * has_net, SCOPES * has_scopes)
    ruleset = libc.syscall(CREATE_RULESET, rules, 8 * (1 + has_net + has_scopes), 0)
    if ruleset < 0:
        return []
    in_file = writing & (WRITE_FILE | TRUNCATE)
    for path, allowed in ((os.getcwd(), writing), (os.devnull, in_file)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = allowed.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        is_added = libc.syscall(ADD_RULE, ruleset, 1, rule, 0) == 0
        os.close(place)
        if not is_added:
            return []
    if libc.syscall(RESTRICT_SELF, ruleset, 0) != 0:
        return []
    os.close(ruleset)
    return ["files"] + (["tcp"] if has_net and "network" not in isolated else [])


if __name__ == "__main__":
    main()
