"""Run the steps of packages/Containerfile in a folder, without a container engine; ask a question.

    python packages/container.py FOLDER [--mount OUTSIDE:INSIDE]... [--env NAME=VALUE]...

FOLDER becomes a minimal Debian, made by mmdebstrap, in place of the image after FROM; each RUN is
run in it with chroot, and timed. Then the ENTRYPOINT serves models/demo as the USER, its
HEALTHCHECK is awaited and one question is answered. --mount and --env hold for all steps: models at
/models, certificates, pip's settings. Needs root and Linux; mounts are gone with the process.
"""

import argparse
import ctypes
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 1 << 14, 1 << 18
KEY, ADDRESS, PATIENCE_S = "a-key-for-this-test", "http://127.0.0.1:8080", 120
QUESTION = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 16,
    "temperature": 0,
}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Read the file: word and arguments of each instruction, lines joined, comments gone."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]  # type: ignore[misc]


class Room:
    """A folder that stands for a container, in a mount namespace of this process's own."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.user, self.workdir = "root", "/"
        self.mounts: list[Path] = []
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
            sys.exit(f"No mount namespace: {os.strerror(ctypes.get_errno())}. Run this as root.")

    def mount(self, outside: str | Path, inside: str) -> None:
        place = self.folder / inside.lstrip("/")
        if Path(outside).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.touch()
        subprocess.run(["mount", "--rbind", outside, place], check=True)
        self.mounts.append(place)

    def words(self, command: list[str]) -> list[str]:
        """What runs a command inside, as the last USER and in the last WORKDIR."""
        inside = f"cd {shlex.quote(self.workdir)} && exec {shlex.join(command)}"
        env = [f"{name}={value}" for name, value in self.env.items()]
        words = ["chroot", f"--userspec={self.user}", str(self.folder), "/usr/bin/env", "-i", *env]
        return [*words, "/bin/sh", "-c", inside]

    def size_mb(self) -> int:
        """What is in the folder, without mounts."""
        words = ["du", "--summarize", "--block-size=1000000"]
        words += [f"--exclude={place}" for place in self.mounts]
        done = subprocess.run([*words, self.folder], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[0])


def build(room: Room, mounts: list[str], steps: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Run FROM and each RUN; give the command of ENTRYPOINT and of HEALTHCHECK."""
    commands: dict[str, list[str]] = {}
    for word, text in steps:
        begin = time.monotonic()
        if word == "FROM":
            suite = text.partition(":")[2].removesuffix("-slim")
            subprocess.run(["mmdebstrap", "--variant=minbase", suite, room.folder], check=True)
            for place in ("/proc", "/dev", "/etc/resolv.conf"):
                room.mount(place, place)
            for pair in mounts:
                room.mount(*pair.split(":"))
        elif word == "RUN":
            while text.startswith("--mount="):
                option, text = text.removeprefix("--mount=").split(maxsplit=1)
                bind = dict(part.split("=") for part in option.split(","))
                room.mount(CHECKOUT / "dist" / bind["source"], bind["target"])
            subprocess.run(room.words(["/bin/sh", "-c", text]), check=True)
        elif word == "ENV":
            room.env |= dict(pair.split("=", 1) for pair in shlex.split(text))
        elif word in ("USER", "WORKDIR"):
            setattr(room, word.lower(), text)
        elif word in ("ENTRYPOINT", "HEALTHCHECK"):
            commands[word] = json.loads(text[text.index("[") :])
        if word in ("FROM", "RUN"):
            print(
                f"{time.monotonic() - begin:.0f} s, {room.size_mb()} MB after {word} {text[:60]}",
                flush=True,
            )
    return commands


def serve(room: Room, commands: dict[str, list[str]]) -> None:
    """Start the entry point, await its health and print one answer."""
    room.mount(CHECKOUT / "models", "/bundles")
    room.env["QAFLORA_API_KEY"] = KEY
    subprocess.run(room.words(["qaflora", "pull", "smollm2-135m-instruct"]), check=True)
    begin = time.monotonic()
    with subprocess.Popen(room.words([*commands["ENTRYPOINT"], "demo"])) as server:
        try:
            while subprocess.run(
                room.words(commands["HEALTHCHECK"]), capture_output=True
            ).returncode:
                if server.poll() is not None or time.monotonic() - begin > PATIENCE_S:
                    sys.exit(f"The server is not healthy; it ended with {server.poll()}.")
                time.sleep(2)
            print(f"healthy after {time.monotonic() - begin:.1f} s", flush=True)
            request = urllib.request.Request(
                f"{ADDRESS}/v1/chat/completions",
                json.dumps(QUESTION).encode(),
                {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                print(json.load(answer)["choices"][0]["message"]["content"])
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mount", action="append", default=[], metavar="OUTSIDE:INSIDE")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    room = Room(options.folder.resolve(), dict(pair.split("=", 1) for pair in options.env))
    room.env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    serve(room, build(room, options.mount, instructions(CHECKOUT / "packages" / "Containerfile")))


if __name__ == "__main__":
    main()
