"""Modelfiles of Ollama become bundles; each line that cannot be followed is named."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bundles import TinyBundle, bundle_json, make_sources, qaflora, rewrite
from refusals import refused
from serving import client_of

from qaflora_edge import Engine
from qaflora_edge.bundles import modelfile
from qaflora_edge.bundles.modelfile import read_modelfile
from qaflora_edge.errors import InputFileError

pytestmark = pytest.mark.usefixtures("own_cache")
WHOLE = '''\
# mine
from base.gguf
ADAPTER ./peft/adapter_model.safetensors
adapter es.gguf

SYSTEM """
You sell rugs.
Be short."""
PARAMETER temperature 0.5
PARAMETER stop "###"
PARAMETER stop END
PARAMETER num_predict -1
PARAMETER num_ctx 4096
LICENSE MIT
MESSAGE user "Is Toronto in Canada?"
MESSAGE assistant yes
REQUIRES 0.14.0
'''


@pytest.fixture
def sources(tmp_path, monkeypatch) -> TinyBundle:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    return make_sources(tmp_path)


def written(place: Path, text: str, encoding: str = "utf-8") -> Path:
    path = place / "Modelfile"
    path.write_bytes(text.encode(encoding))
    return path


def create(sources: TinyBundle, text: str, *more: object) -> Any:
    path = written(sources.base.path.parent, text)
    options = ("--no-calibrate", *more)
    return qaflora("bundle", "create", sources.folder, "--modelfile", path, *options)


def test_a_modelfile_becomes_a_bundle(sources) -> None:
    result = create(sources, WHOLE)
    assert result.exit_code == 0, result.stderr
    raw = bundle_json(sources.folder)
    assert raw["base"]["file"] == str(sources.base.path)
    assert [adapter["name"] for adapter in raw["adapters"]] == ["peft", "es"]
    assert raw["system"] == "You sell rugs.\nBe short."
    assert raw["license"] == "MIT"
    assert raw["sampling"] == {"temperature": 0.5, "stop": ["###", "END"]}
    asked = {"role": "user", "content": "Is Toronto in Canada?"}
    assert raw["examples"] == [asked, {"role": "assistant", "content": "yes"}]
    path = sources.base.path.parent / "Modelfile"
    notes = result.stderr.splitlines()[:2]
    assert notes == [
        f"{path}:13: num_ctx is left out: it changes no answer.",
        f"{path}:17: REQUIRES is left out: it changes no answer.",
    ]


@pytest.mark.parametrize(
    ("encoding", "end"), [("utf-16", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\r")]
)
def test_encodings_and_line_ends_say_the_same(sources, encoding, end) -> None:
    place = sources.base.path.parent
    plain = read_modelfile(written(place, WHOLE))
    assert read_modelfile(written(place, WHOLE.replace("\n", end), encoding)) == plain


def test_every_line_that_cannot_be_followed_is_named(sources) -> None:
    result = create(
        sources,
        "FROM base.gguf\nFROM es.gguf\nADAPTER nowhere\nTEMPLATE {{ .Prompt }}\nPARSER x\n"
        "PARAMETER temperature hot\nPARAMETER typical_p 0.5\nMESSAGE robot hi\n",
    )
    assert result.exit_code == 1
    assert not sources.folder.exists()
    place = sources.base.path.parent
    brings = "is not taken: the base brings its own. Leave the line out."
    options = ", ".join(modelfile.SAMPLING)
    problems = [
        "2: FROM stands in line 1 already, expected one. Leave one out.",
        f"3: the adapter {place / 'nowhere'} does not exist; expected a PEFT folder, its "
        "safetensors file, or an adapter GGUF. Correct the path.",
        f"4: TEMPLATE {brings}",
        f"5: PARSER {brings}",
        "6: PARAMETER temperature is 'hot', expected a number from 0 up.",
        f"7: PARAMETER typical_p cannot be followed; expected one of {options}.",
        "8: the role is 'robot', expected one of system, user, assistant.",
    ]
    lines = [f"{place / 'Modelfile'}:{problem}" for problem in problems]
    assert result.stderr == f"Error: {' '.join(lines)}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM hi\n", "Modelfile: FROM is missing, expected one"),
        ('FROM base.gguf\nSYSTEM """hi\n', "Modelfile:2: the text of SYSTEM never ends"),
        ("FROM base.gguf\nSYSTEM <<EOF\nhi\nEOF\n", "Modelfile:3: 'hi' is no command"),
        ("FROM peft\n", "is a folder, expected a GGUF file"),
        ("FROM llama3.2\n", "Modelfile:1: the base llama3.2 is no file in"),
        ("FROM ../../x:y\n", "Modelfile:1: the base ../../x:y is no file in"),
        ("FROM base.gguf\nADAPTER lone/a.safetensors\n", "adapter_config.json is missing in"),
        ("\0\xff", "is no command with a value"),
    ],
)
def test_a_wrong_modelfile_is_refused(sources, text, message) -> None:
    place = sources.base.path.parent
    (place / "lone").mkdir()
    (place / "lone" / "a.safetensors").write_bytes(b"")
    assert message in refused(InputFileError, lambda: read_modelfile(written(place, text)))


def test_a_text_of_a_mebibyte_is_read_at_once(sources) -> None:
    """It took a minute: each line was put behind all that came before."""
    lines = ["Sell rugs.", "", "x"] + ["a"] * 500_000
    text = "\n".join(lines)
    path = written(sources.base.path.parent, f'FROM base.gguf\nSYSTEM """{text}"""\n')
    begin_s = time.process_time()
    assert read_modelfile(path).system == text
    assert time.process_time() - begin_s < 10


def test_a_modelfile_of_many_commands_is_refused(sources) -> None:
    path = written(sources.base.path.parent, "FROM base.gguf\n" + "LICENSE a\n" * 100_000)
    assert refused(InputFileError, lambda: read_modelfile(path)) == (
        f"{path}: there are 100000 commands beside FROM, expected at most 1024. Leave some out."
    )


def test_bytes_that_are_no_text_are_refused(sources) -> None:
    path = sources.base.path.parent / "Modelfile"
    path.write_bytes(b"FROM \xff\xff")
    assert refused(InputFileError, lambda: read_modelfile(path)).endswith("Save it again as UTF-8.")


def write_ollama(place: Path, name: str, layers: Mapping[str, bytes]) -> None:
    """Write a model as Ollama keeps it: blobs, and a manifest that names them."""
    blobs = place / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    listed = []
    for kind, data in layers.items():
        digest = hashlib.sha256(data).hexdigest()
        (blobs / f"sha256-{digest}").write_bytes(data)
        media = f"application/vnd.ollama.image.{kind}"
        listed.append({"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)})
    path = place / "manifests/registry.ollama.ai/library" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": listed}))


def test_a_model_of_ollama_brings_its_adapter_and_texts(sources) -> None:
    place = sources.base.path.parent
    layers = {
        "model": sources.base.path.read_bytes(),
        "adapter": sources.adapter.path.read_bytes(),
        "template": b"{{ .Prompt }}",
        "system": b"You are old.",
        "params": b'{"temperature": 0.7, "stop": ["a", "b"], "num_ctx": 8}',
        "messages": b'[{"role": "user", "content": "hi"}]',
    }
    write_ollama(place / "ollama", "mine/v2", layers)
    result = create(sources, "FROM mine:v2\nADAPTER peft\nSYSTEM You are new.\n")
    assert result.exit_code == 0, result.stderr
    raw = bundle_json(sources.folder)
    assert [adapter["name"] for adapter in raw["adapters"]] == ["adapter", "peft"]
    assert raw["system"] == "You are new."
    assert raw["sampling"] == {"temperature": 0.7, "stop": ["a", "b"]}
    assert raw["examples"] == [{"role": "user", "content": "hi"}]
    with Engine(sources.folder, n_ctx=512) as engine:
        assert engine.adapters == ("adapter", "peft")


def test_a_model_of_ollama_without_a_gguf_is_refused(sources) -> None:
    place = sources.base.path.parent
    write_ollama(place / "ollama", "mlx/latest", {"tensor": b"x"})
    path = written(place, "FROM mlx\n")
    told = refused(InputFileError, lambda: read_modelfile(path))
    assert "mlx has 0 GGUF files of a base, expected 1" in told


def test_a_long_licence_becomes_a_file(sources) -> None:
    create(sources, 'FROM base.gguf\nADAPTER es.gguf\nLICENSE """A\nB"""\nLICENSE C\n')
    assert (sources.folder / "LICENSE").read_text() == "A\nB\n\nC\n"
    assert bundle_json(sources.folder)["license"] == "see LICENSE"


def test_what_it_says_holds_where_nobody_else_says(sources) -> None:
    create(sources, "FROM base.gguf\nADAPTER es.gguf\nPARAMETER num_predict 3\n")

    def n_token(*more: object) -> int:
        result = qaflora("run", sources.folder, "the", "--json", "--raw-prompt", *more)
        return int(json.loads(result.stdout)["usage"]["completion_tokens"])

    assert n_token() == 3
    assert n_token("-n", 2) == 2
    body = {"prompt": "the"}
    for chosen, n in (((), 3), (("max_tokens",), 5)):
        options = {"sampling": {"max_tokens": 5}, "chosen": frozenset(chosen)}
        with client_of(sources.folder, **options) as client:
            answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == n


def test_examples_stand_before_the_question(sources) -> None:
    create(sources, "FROM base.gguf\nADAPTER es.gguf\nMESSAGE user a\nMESSAGE assistant b\n")
    examples = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    question = {"role": "user", "content": "c"}
    system = {"role": "system", "content": "d"}
    with (
        Engine(sources.folder, n_ctx=512) as engine,
        Engine(base=sources.base.path, n_ctx=512) as plain,
    ):
        assert engine.chat_tokens([question]) == plain.chat_tokens([*examples, question])
        told = plain.chat_tokens([system, *examples, question])
        assert engine.chat_tokens([system, question]) == told


def test_sampling_of_a_bundle_is_checked(sources) -> None:
    create(sources, "FROM base.gguf\nADAPTER es.gguf\n")
    for sampling, problem in (
        ({"temperature": -1}, "field sampling.temperature is -1, expected a number from 0 up"),
        ({"heat": 1}, "field sampling.heat is 1, expected no such option"),
    ):
        rewrite(sources.folder, lambda raw, new=sampling: raw.update(sampling=new))
        assert problem in qaflora("bundle", "show", sources.folder).stderr
