"""Routes that take files: documents, and adapters of a served bundle.

Adapters are added and removed where --allow-adapters is given.
"""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import mkdtemp

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.dialects.options import read_body
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BusyError, DownloadError, InputFileError, QafloraError, is_disk_full
from qaflora_edge.formats.document import MAX_BYTES, document_text
from qaflora_edge.formats.inputs import checksum
from qaflora_edge.formats.names import CONFIG_FILE, WEIGHTS_FILE
from qaflora_edge.hub import fetch_hub
from qaflora_edge.peft.folder import adapter_files, adapter_folder
from qaflora_edge.progress import Tell
from qaflora_edge.server.bodies import AdapterBody
from qaflora_edge.server.receive import address_of, check_announced, read, receive
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.served_models import models_of

MAX_UPLOAD_BYTES = 1 << 30
N_DOCUMENTS = 2  # received and read at the same time
DOCUMENT_S = 120.0  # the longest that one may take to come
N_FETCHES = 2
_UPLOAD = "upload-"


async def document(request: Request) -> Response:
    """Read a text or PDF that the page sends, and count its tokens."""
    state = request.app.state
    served, _ = state.models.find(request.query_params.get("model"))
    name = request.query_params.get("name", "the file")[:200]
    data = bytearray()
    check_announced(request, MAX_BYTES)
    async with state.document_places.place(address_of(request)):
        await receive(request, data.extend, MAX_BYTES, DOCUMENT_S)
        text = await _text_of(request, name, bytes(data))
        async with state.models.engine(served) as engine:

            def count() -> int:
                with engine.model() as model:
                    tokens = model.tokenize(text)
                return len(tokens)

            n_token = await asyncio.to_thread(count)
    return JSONResponse({"text": text, "n_token": n_token})


async def _text_of(request: Request, name: str, data: bytes) -> str:
    cancel = threading.Event()

    async def watch() -> None:
        is_there = True
        while is_there:
            message = await request.receive()
            is_there = message["type"] != "http.disconnect"
        cancel.set()

    watcher = asyncio.create_task(watch())
    try:
        return await asyncio.to_thread(document_text, name, data, cancel)
    except InputFileError as error:
        raise Refusal(400, str(error), code="invalid_document") from error
    finally:
        cancel.set()
        watcher.cancel()


async def load(request: Request) -> Response:
    """Add an adapter of the allowed folder, as vLLM does, or of the Hub."""
    folder = _allowed(request)
    body = await read(request, AdapterBody)
    fetched: Path | None = None
    if body.hub is not None:
        fetched = await _fetched(request, body, body.hub)

    def add(engine: Engine, tell: Tell) -> None:
        path = fetched
        if path is None:
            path = _inside(folder, body.lora_path or "")
        engine.add_adapter(body.lora_name, path, tell)

    return await _changed(request, body, "added", add)


async def _fetched(request: Request, body: AdapterBody, hub: str) -> Path:
    """Fetch an adapter of the Hub, while others may change adapters."""
    state = request.app.state
    state.models.find(body.model)
    tell = _teller(request, body)

    def on_bytes(n_done: int, n_all: int) -> None:
        if max(n_done, n_all) > MAX_UPLOAD_BYTES:
            limit = f"more than {MAX_UPLOAD_BYTES} bytes; expected an adapter"
            raise DownloadError(f"Could not fetch {hub:.100}: it has {limit}.")
        tell("it is fetched", n_done, n_all)

    with _refused(state.progress, body.lora_name):
        async with state.fetch_places.place(address_of(request)):
            return await asyncio.to_thread(fetch_hub, hub, progress=on_bytes)


async def progress(request: Request) -> Response:
    """Tell how far a change of an adapter is: its stage, and steps or bytes; {} without one."""
    name = request.query_params.get("lora_name")
    steps = request.app.state.progress.get(name, {})
    return JSONResponse(steps)


async def unload(request: Request) -> Response:
    """Remove an adapter, as vLLM does."""
    _allowed(request)
    body = await read(request, AdapterBody)
    served, _ = models_of(request).find(body.model)

    def remove(engine: Engine, tell: Tell) -> None:
        if body.lora_name not in engine.loaded_adapters:
            raise _not_found("lora_name", body.lora_name)
        engine.remove_adapter(body.lora_name)
        place = request.app.state.uploads.pop((served.name, body.lora_name), None)
        if place is not None:  # what still runs has it open
            shutil.rmtree(place, ignore_errors=True)

    return await _changed(request, body, "removed", remove)


async def upload(request: Request) -> Response:
    """Add an adapter that the page sends: a GGUF, or adapter_config.json and then the weights."""
    folder = _allowed(request)
    body = read_body(AdapterBody, dict(request.query_params))
    state = request.app.state
    served, _ = state.models.find(body.model)
    check_announced(request, MAX_UPLOAD_BYTES)
    async with state.upload_place.place(address_of(request)):
        try:
            place, answer = await _uploaded(request, body, folder)
        except OSError as error:
            reason = error.strerror
            if is_disk_full(error):
                reason = "the disk is full"
            message = f"The upload cannot be written: {reason}."
            raise Refusal(507, message, code="insufficient_storage") from error
    state.uploads[served.name, body.lora_name] = place
    return answer


async def _uploaded(request: Request, body: AdapterBody, folder: Path) -> tuple[Path, Response]:
    place = Path(mkdtemp(prefix=_UPLOAD, dir=folder))
    gguf = place / f"{body.lora_name}.gguf"
    n_config = int(body.config_bytes)
    n_all = int(request.headers.get("content-length", 0))
    config = bytearray()
    tell = _teller(request, body)

    def add(engine: Engine, tell: Tell) -> None:
        if n_config:
            (place / CONFIG_FILE).write_bytes(config)
            convert_adapter(place, engine.memory.files.header, gguf, name=body.lora_name)
        engine.add_adapter(body.lora_name, gguf, tell)

    try:
        weights_path = gguf
        if n_config:
            weights_path = place / WEIGHTS_FILE
        with open(weights_path, "wb") as file:

            def take(part: bytes) -> None:
                n = n_config - len(config)
                config.extend(part[:n])
                file.write(part[n:])
                tell("it is sent", file.tell() + len(config), n_all)

            timeout_s = request.app.state.options.timeout_s
            await receive(request, take, MAX_UPLOAD_BYTES, timeout_s)
        answer = await _changed(request, body, "added", add, shown_from=f"{place}/")
        return place, answer
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        request.app.state.progress.pop(body.lora_name, None)


def remove_old_uploads(folder: Path) -> None:
    """Remove what a server left that was killed."""
    for place in folder.glob(f"{_UPLOAD}{'?' * 8}"):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)


def _allowed(request: Request) -> Path:
    folder: Path | None = request.app.state.options.adapters
    if folder is None:
        message = "Adapters cannot change here; `qaflora serve --allow-adapters FOLDER` allows it."
        raise Refusal(403, message, code="adapters_not_allowed")
    return folder


def _inside(folder: Path, name: str) -> Path:
    """Resolve a path; all files of the adapter have to be in the folder. Raises Refusal."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a loop of links is the last
        path = (folder / name).resolve(strict=True)
        if folder in path.parents:
            files: Iterable[Path] = ()
            if path.is_dir():
                files = adapter_files(adapter_folder(path))
            if all(folder in file.resolve().parents for file in files):
                return path
    raise _not_found("lora_path", name)


def _not_found(param: str, name: str) -> Refusal:
    message = f"The adapter {name!r:.100} is not there."
    return Refusal(404, message, param=param, code="adapter_not_found")


def _teller(request: Request, body: AdapterBody) -> Tell:
    def tell(stage: str, n_done: int, n_all: int) -> None:
        steps = {"stage": stage, "processed": n_done, "total": n_all}
        request.app.state.progress[body.lora_name] = steps

    return tell


async def _changed(
    request: Request,
    body: AdapterBody,
    what: str,
    work: Callable[[Engine, Tell], None],
    shown_from: str = "",
) -> Response:
    """Do this work for a bundle, and answer in vLLM's words.

    shown_from  left out of messages: where an upload lies is no matter of its sender
    """
    state = request.app.state
    served, _ = state.models.find(body.model)
    tell = _teller(request, body)

    def changed(engine: Engine) -> dict[str, str]:
        work(engine, tell)
        paths = engine.memory.files.adapter_paths
        return {name: checksum(path) for name, path in paths.items()}

    with _refused(state.progress, body.lora_name, shown_from):
        async with state.changing, state.models.engine(served) as engine:
            hashes = await asyncio.to_thread(changed, engine)
    served.weigher = engine.memory.current.weigher
    served.strategies = engine.strategies
    served.sha256 = dict(served.sha256) | {"adapters": hashes}
    served.is_changed = True  # it stays open
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' {what} successfully.")


@contextlib.contextmanager
def _refused(progress: dict[str, object], name: str, shown_from: str = "") -> Iterator[None]:
    try:
        yield
    except BusyError:
        raise
    except QafloraError as error:
        message = str(error)
        if shown_from:
            message = message.replace(shown_from, "")
        raise Refusal(400, message, code="invalid_value") from error
    finally:
        progress.pop(name, None)
