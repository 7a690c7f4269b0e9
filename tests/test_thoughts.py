"""Thoughts before answers: split from them, closed in time, and never weighed."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, qaflora
from serving import client_of
from tiny import EOS, QWEN, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.ask import Thinking
from qaflora_edge.inference.sequence import ThoughtSplitter

# As Qwen3 has it; `opens`: as Qwen3-Thinking.
HYBRID = QWEN.replace("m.content", "m.content.split('</think>')[-1]") + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
OPENS = QWEN.replace("m.content", "m.content.split('</think>')[-1]") + "{{ '<think>\n' }}"
TAGS = ("<think>", "</think>")
USER = [{"role": "user", "content": "the <think>?"}]
CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}


def speaking(place: Path, words: tuple[str, ...], template: str) -> Path:
    """A base that says these words, each a token, after "\\n", whatever it was asked.

    Where EOS is one of them, an answer ends there, and a prompt that ends with the next has others.
    """
    options: dict[str, Any] = {"n_layer": 1, "tied": False, "chat_template": template}
    spelt = dict.fromkeys((*TAGS, *words))
    spelt.pop(EOS, None)
    options |= {"n_ctx": 1024, "user_defined": (*spelt,)}
    base = write_tiny_base(place / "speaking.gguf", **options)
    rows = {name: np.zeros_like(base.tensors[name]) for name in base.tensors if "_" in name}
    rows |= {name: np.ones_like(each) for name, each in base.tensors.items() if "norm" in name}
    embedding = base.tensors["token_embd.weight"]
    output = np.zeros_like(embedding)
    chain = [base.tokens.index(word) for word in ("Ċ", *words, EOS)]
    for token, following in itertools.pairwise(chain):
        output[following] += embedding[token]
    replace = {**rows, "token_embd.weight": embedding, "output.weight": output}
    return write_tiny_base(base.path, replace=replace, **options).path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("hybrid")
    words = ("<think>", " I", " END é", "</think>", "\n\n Yes", "<b>", "END", "no")
    with Engine(speaking(place, words, HYBRID)) as engine:
        yield engine


@pytest.fixture(scope="module")
def opening(tmp_path_factory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("opening")
    # Its tags come in pieces.
    words = ("Hm", " <", "/thi", "nk> \n", CALL)
    with Engine(speaking(place, words, OPENS)) as engine:
        yield engine


def said(engine: Engine, **options: Any) -> tuple[str | None, str, str]:
    """Thought, answer and end, whole; a stream has to say the same."""
    whole = engine.chat(USER, **options)
    (choice,) = whole.choices
    found = choice.message.reasoning_content, choice.message.content
    streamed = {"reasoning_content": "", "content": ""}
    for chunk in engine.chat(USER, stream=True, **options):
        for name, text in chunk.choices[0].delta.items():
            if name in streamed:
                streamed[name] += text
    assert (streamed["reasoning_content"], streamed["content"]) == (found[0] or "", found[1] or "")
    return *found, choice.finish_reason


CASES = [
    ("<think>\nI\n</think>\n\nA </think> <think>", False, ("I", "A </think> <think>")),
    (" \n<think> a <b> </thin c\n\nd </think>e ", False, ("a <b> </thin c\n\nd", "e ")),
    ("I </think>\n\n", True, ("I", "")),
    ("<think>\n\n</think>\n\nNo", False, ("", "No")),
    (" <thin <think>a</think>", False, ("", " <thin <think>a</think>")),
    ("\n I <think> so </thi", True, ("I <think> so </thi", "")),
    ("<thi", False, ("", "<thi")),
]


@pytest.mark.parametrize(("text", "is_open", "expected"), CASES)
def test_a_thought_is_split_off_wherever_its_tags_are_cut(text, is_open, expected) -> None:
    n = len(text)
    cuts = [[*range(n + 1)], *([0, i, j, n] for i in range(n) for j in range(i, n))]
    for cut in cuts:
        split = ThoughtSplitter(Thinking(is_open=is_open))
        found = [split.feed(text[i:j]) for i, j in itertools.pairwise(cut)]
        found.append(split.feed("", is_last=True))
        assert tuple(map("".join, zip(*found, strict=True))) == expected


def test_a_base_thinks_before_it_answers(hybrid, opening) -> None:
    assert said(hybrid) == ("I END é", "Yes<b>ENDno", "stop")
    # A stop text in the thought ends nothing.
    assert said(hybrid, stop="END") == ("I END é", "Yes<b>", "stop")
    assert said(opening) == ("Hm", CALL, "stop")
    assert said(opening, tools=[TOOL]) == ("Hm", None, "tool_calls")
    assert said(hybrid, max_tokens=3) == ("I END é", "", "length")
    usage = hybrid.chat(USER).usage
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert usage["completion_tokens"] == 8
    answer = hybrid.generate(hybrid.chat_tokens(USER))
    assert (answer.text(), answer.reasoning) == ("Yes<b>ENDno", "I END é")
    assert hybrid.generate("the\n", max_tokens=2).text() == "<think> I"  # no chat


def test_log_probabilities_are_those_of_the_answer(hybrid, opening) -> None:
    for engine, tokens in ((hybrid, ["\n\n Yes", "<b>", "END", "no"]), (opening, [CALL])):
        content = engine.chat(USER, logprobs=True).choices[0].logprobs["content"]
        assert [each["token"] for each in content] == tokens
        chunks = engine.chat(USER, logprobs=True, stream=True, stop="no")
        found = [chunk.choices[0].logprobs for chunk in chunks]
        streamed = [each["token"] for part in found if part for each in part["content"]]
        assert streamed == [token for token in tokens if token != "no"]


def test_a_budget_closes_the_thought(hybrid, opening) -> None:
    """After the forced tag both say what they say after "\\n" and after a tag."""
    assert said(hybrid, reasoning_budget=1) == ("I", "Yes<b>ENDno", "stop")
    assert said(hybrid, reasoning_budget_tokens=0) == (None, "Yes<b>ENDno", "stop")
    assert said(hybrid, reasoning_budget=2) == said(hybrid)
    assert said(opening, reasoning_budget=1, max_tokens=4)[0] == "Hm"
    assert said(opening, reasoning_budget=0, max_tokens=4)[0] is None
    usage = opening.chat(USER, reasoning_budget=0).usage
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2}


@pytest.mark.parametrize("template", [HYBRID, OPENS])
def test_a_grammar_begins_after_the_thought(tmp_path, template) -> None:
    """The base would end within the thought, which is closed then."""
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
    thoughts = ["Hm" if template == OPENS else None, None]
    with Engine(speaking(tmp_path, ("Hm",), template)) as engine:
        for thought, is_on in zip(thoughts, (True, False), strict=True):
            how = {"chat_template_kwargs": {"enable_thinking": is_on}}
            found, answer, reason = said(engine, response_format=form, **how)
            assert (found, reason) == (thought, "stop")
            assert json.loads(answer) in ("yes", "no")
        tokens = engine.chat_tokens(USER)
        answer = engine.generate(tokens, grammar='root ::= " a"')
        assert (answer.text(), answer.is_whole) == (" a", True)
        cut = engine.generate(tokens, grammar='root ::= " a" "b"{9}', max_tokens=1)
        assert (cut.text() in ("", " a"), cut.is_whole) == (True, False)


def test_reasoning_asks_the_template_or_closes_what_it_opens(tmp_path) -> None:
    def end(template: str, messages: Any = USER, **options: Any) -> str:
        path = speaking(tmp_path, ("Hm",), template)
        with Engine(path, **options) as engine:
            tokens = engine.chat_tokens(messages)
            text = engine._model.detokenize(tokens, special=True).decode()
        return text.rpartition("assistant\n")[2]

    empty = "<think>\n\n</think>\n\n"
    assert end(HYBRID) == end(HYBRID, reasoning="on") == ""
    assert end(HYBRID, reasoning="off") == end(OPENS, reasoning="off") == empty
    assert end(OPENS) == "<think>\n"
    begun: list[Any] = [*USER, {"role": "assistant", "content": "So"}]
    assert (end(HYBRID, begun), end(OPENS, begun)) == ("So", f"{empty}So")


@pytest.mark.parametrize(
    "strategy", ["two-place", "qa-flora", "spectr", "qa-flora:distance=cosine,pool=question"]
)
def test_a_thought_changes_no_weights(tmp_path, strategy) -> None:
    """Oracle: the prompt up to the answer, with nothing after it."""
    template = HYBRID + "{% if opens %}<think>\n{% endif %}"
    made = make_bundle(tmp_path, calibrate=True, chat_template=template, user_defined=TAGS)
    with Engine(made.folder, kv_type="f32", flash_attn=False) as engine:
        expected = engine.weights(engine.chat_tokens(USER), strategy=strategy)
        for more in ({"enable_thinking": False}, {"opens": True}):
            tokens = engine.chat_tokens(USER, chat_template_kwargs=more)
            found = engine.weights(tokens, strategy=strategy)
            assert found.prompt_tokens > expected.prompt_tokens
            np.testing.assert_allclose(found.weights, expected.weights, atol=1e-5)
            np.testing.assert_allclose(found.divergence, expected.divergence, rtol=1e-4)


def test_the_server_tells_thoughts(hybrid) -> None:
    with client_of(hybrid._model.path) as client:
        body: dict[str, Any] = {"messages": USER, "temperature": 0}
        found = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert (found["reasoning_content"], found["content"]) == ("I END é", "Yes<b>ENDno")
        body = {"input": "the?", "temperature": 0}
        found = client.post("/v1/responses", json=body).json()
        (message,) = found["output"]
        assert message["content"][0]["text"] == "Yes<b>ENDno"
        assert found["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}
        raw = {"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "temperature": 0}
        text = client.post("/v1/completions", json={**raw, "max_tokens": 2}).json()
        assert text["choices"][0]["text"] == "<think> I"


# What the dialects call the tokens of a prompt.
N_PROMPT = ("prompt_tokens", "input_tokens", "prompt_eval_count")


@pytest.mark.parametrize(
    ("effort", "is_wanted"),
    [("none", False), ("minimal", False), ("low", True), ("xhigh", True), (None, True)],
)
def test_an_effort_is_one_rule_in_every_dialect(hybrid, effort, is_wanted) -> None:
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": USER, "reasoning_effort": effort},
        "/v1/responses": {"input": USER, "reasoning": {"effort": effort}},
        "/api/chat": {"model": "speaking", "messages": USER, "think": effort, "stream": False},
    }
    # A thought that is not wanted is one without words, and makes the prompt longer.
    with_thought, without = (
        len(hybrid.chat_tokens(USER, chat_template_kwargs={"enable_thinking": is_on}))
        for is_on in (True, False)
    )
    n_prompt = with_thought if is_wanted else without
    with client_of(hybrid._model.path) as client:
        for path, body in asked.items():
            found = client.post(path, json=body).json()
            usage = found.get("usage", found)
            assert n_prompt in [usage.get(key) for key in N_PROMPT]
        body = {"messages": USER, "reasoning_effort": "none"}
        body["chat_template_kwargs"] = {"enable_thinking": True}  # says it for this very base
        found = client.post("/v1/chat/completions", json=body).json()
        assert found["usage"]["prompt_tokens"] == with_thought < without
        refused = client.post("/v1/chat/completions", json={**body, "reasoning_effort": 3})
        assert refused.json()["error"]["param"] == "reasoning_effort"


def test_commands_keep_thoughts_out_of_stdout(hybrid) -> None:
    path = str(hybrid._model.path)

    def run(*words: str, stdin: str = "") -> Any:
        result = qaflora(*words, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result

    result = run("run", path, "the?")
    assert result.stdout == "Yes<b>ENDno\n"
    assert "; 4 tokens of thought]" in result.stderr
    cut = run("run", path, "the?", "-n", "2").stderr
    assert "2 tokens of thought, no answer: raise --max-tokens, or give --reasoning-budget" in cut
    shown = json.loads(run("run", path, "the?", "--json", "--reasoning-budget", "1").stdout)
    assert (shown["text"], shown["reasoning_content"]) == ("Yes<b>ENDno", "I")
    assert shown["usage"]["reasoning_tokens"] == 4
    result = run("chat", path, "--temp", "0", stdin="the?\nand?\n")
    assert result.stdout == "Yes<b>ENDno\n" * 2
    assert "[4 tokens of thought; " in result.stderr
