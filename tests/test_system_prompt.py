"""A bundle's system prompt: where it is said, and where it is refused."""

from bundles import bundle_json, make_sources, qaflora

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle

SYSTEM = "You are the king of the sea, and answer what the people ask you. " * 6
QUESTION = [{"role": "user", "content": "How far is the moon?"}]


def test_conversations_without_a_system_message_begin_with_it(tmp_path) -> None:
    made = make_sources(tmp_path, n_ctx=2048)
    adapters = {"es": made.adapter.path}
    create_bundle(made.folder, made.base.path, adapters, system=SYSTEM)
    with (
        Engine(made.folder, n_ctx=1024) as engine,
        Engine(base=made.base.path, n_ctx=1024) as plain,
    ):
        assert (engine.system, plain.system) == (SYSTEM, "")
        told = [{"role": "system", "content": SYSTEM}, *QUESTION]
        assert engine.chat_tokens(QUESTION) == plain.chat_tokens(told)
        for role in ("system", "developer"):
            own = [{"role": role, "content": "Be short."}, *QUESTION]
            assert engine.chat_tokens(own) == plain.chat_tokens(own)


def test_create_by_command_and_show(tmp_path) -> None:
    made = make_sources(tmp_path)
    (tmp_path / "system.txt").write_text(SYSTEM + "\n", encoding="utf-8")
    args = ("--adapter", f"es={made.adapter.path}", "--system", tmp_path / "system.txt")
    create = ("bundle", "create", made.folder, "--base", made.base.path, "--no-calibrate")
    result = qaflora(*create, *args)
    assert result.exit_code == 0, result.stderr
    assert bundle_json(made.folder)["system"] == SYSTEM.strip()
    shown = qaflora("bundle", "show", made.folder)
    assert f"system     {SYSTEM.strip()}\n" in shown.stdout
