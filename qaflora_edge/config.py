"""Every option, declared once; and the user's settings file.

Commands, settings, Python calls, server requests and docs/settings.md are made from it.
`cli.settings` has what one command has besides, and checks the options of the file; `cache` and
`bundles` are the library's as well.
"""

import contextlib
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from qaflora_edge.errors import SettingsError, nearest, wrong_option

MAX_CTX = 2**24  # tokens; some sequences of so many still fit llama.cpp's 32-bit counts
MAX_PARALLEL = 256  # sequences of one context: llama-cparams.h LLAMA_MAX_SEQ
MAX_SEED = 2**32 - 1  # llama.h LLAMA_DEFAULT_SEED: a new one each time
MAX_THREADS = 512  # ggml.h GGML_MAX_N_THREADS: ggml aborts the process above it
KV_TYPES = {"f16": 1, "f32": 0, "q8_0": 8}  # ggml.h GGML_TYPE_*
LENSES, POOLS = ("norm", "raw"), ("last", "question")
REASONING = ("auto", "on", "off")
PREFILLS = ("auto", "base", "mix")
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
ADAPTER_TYPES = {"auto": 0, "q8_0": 1, "q4_0": 2}  # qaflora.h enum qaflora_adapter_type
# Where options stand in the help, in this order; those of the last one are in --help-all alone.
SECTIONS = ("Options", "Server", "Prompt", "Answer", "Mix", "Model", ADVANCED := "Advanced")

NEVER = "never"  # of an option's words


@dataclass(frozen=True)
class Option:
    """One option.

    name      its keyword in Python
    kind      int, float, str, bool, tuple for texts, or dict for numbers by token id
    default   None: unset is a value too
    groups    who takes it, apart by spaces: engine (Engine's keywords), weighing, sampling
              (Engine.generate's), answers (Engine.answers')
    flag      on the command line, empty where it has no place there; a flag that begins with
              `--no-` turns off what is on by default
    short     a flag of one letter, as llm and llama.cpp have it
    section   of SECTIONS
    help      sentences, of which `--help` shows the first; {strategies} stands for the forms of all
              strategies, {options} for those of their options
    low, high, is_open  the range; is_open: low itself is not in it
    noun      what a number is, in messages
    words     texts that may stand in place of a number; NEVER is read as None
    unset     the default in words, where `default` does not say it
    defaults  command -> the default that it has instead
    aliases   other names in OpenAI's calls
    variable  a further variable of the environment that sets it
    is_secret whether its value is not to be shown
    old_flag  what it was called before, which still works
    """

    name: str
    kind: type
    default: Any = None
    groups: str = ""
    flag: str = ""
    short: str = ""
    section: str = ADVANCED
    help: str = ""
    low: float | None = None
    high: float | None = None
    is_open: bool = False
    noun: str = ""
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    metavar: str | None = None
    unset: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    variable: str = ""
    is_secret: bool = False
    old_flag: str = ""

    @property
    def key(self) -> str:
        return self.flag.partition("/")[0].removeprefix("--").replace("-", "_")

    @property
    def is_negated(self) -> bool:
        """Whether its flag says the contrary of its name."""
        return self.flag.startswith("--no-")

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        noun = self.noun or _EXPECTED[self.kind]
        low = "" if self.low is None else f" {'above' if self.is_open else 'from'} {self.low:g}"
        high = "" if self.high is None else f" to {self.high:.10g}"
        up = "" if high or not low else " up"
        return " or ".join((f"{noun}{low}{high}{up}", *self.words))

    def fits(self, value: object) -> bool:
        """Tell whether a value has the type and lies in the range."""
        if self.kind is tuple:
            texts = value if isinstance(value, (list, tuple)) else [None]
            return all(isinstance(text, str) and text for text in texts)
        if self.kind is dict:
            pairs = value.items() if isinstance(value, Mapping) else [("", None)]
            return all(_ID.fullmatch(str(key)) and self._is_in_range(n) for key, n in pairs)
        if value is None:
            return NEVER in self.words
        if isinstance(value, str) and value in self.words:
            return True
        if self.kind not in (int, float):
            return isinstance(value, self.kind) and (not self.choices or value in self.choices)
        return self._is_in_range(value)

    def parsed(self, text: str) -> Any:
        """Read a text as a value of this kind; one that is none stays text, and fits nowhere."""
        if text == NEVER and text in self.words:
            return None
        if self.kind in (int, float) and text not in self.words:
            with contextlib.suppress(ValueError):
                return self.kind(text)
        return text

    def _is_in_range(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            return False
        number = int(value) if isinstance(value, Integral) else float(value)
        low = -_LARGEST if self.low is None else self.low
        high = _LARGEST if self.high is None else self.high
        return low <= number <= high and not (self.is_open and number == low)


_ID = re.compile("[0-9]{1,10}")  # of a token: a number, or the text that JSON makes of it
_LARGEST = sys.float_info.max  # infinity is above it, and NaN fits nowhere
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list of texts that are not empty",
    dict: "token ids, each with a number",
}
_TOKENS = "a number of tokens"
# A line or two for each: one call an option, in the order of the help texts.
# fmt: off
OPTIONS = (
    Option("strategy", str, None, "engine weighing", "--strategy", section="Mix", metavar="NAME",
           help="Choose how to weigh: {strategies}. Those that look at the query take options "
           "after a colon, as in qa-flora:power=2. Options: {options}.", unset="the bundle's"),
    Option("lens", str, None, "engine weighing", "--lens", choices=LENSES,
           help="Take a layer's state through the final norm, or raw.",
           unset="the bundle's, else norm"),
    Option("prefill", str, None, "engine weighing", "--prefill", choices=PREFILLS,
           help="Let the base prefill prompts, or the mix that answers. What the base prefills "
           "serves every mix. auto: the base for chats under relay, two-place and single, else "
            "the mix.",
           unset="the bundle's, else auto"),
    Option("pool", str, None, "engine weighing", "--pool", choices=POOLS,
           help="Weigh by the last token of the prompt, or by the mean of the question's tokens: "
           "the last user turn without its template.", unset="the bundle's, else last"),
    Option("guesses", int, "auto", "engine", "--guesses", old_flag="--draft",
           low=0, high=15, words=("auto",),
           metavar="auto|N", noun="a number of tokens",
           help="Guess at most N tokens of an answer from the prompt and the answer so far, and "
           "verify them in one pass. auto: as many as pay; 0: none."),
    Option("reasoning", str, "auto", "engine", "--reasoning", choices=REASONING,
           help="Ask the chat template for a thought before each answer, or for none; auto: "
           "neither."),
    Option("raw_prompt", bool, False, "", "--raw-prompt/--no-raw-prompt",
           help="Take the prompt as it is: no chat template."),
    Option("n_ctx", int, None, "engine", "--ctx", "-c", "Model", low=1, high=MAX_CTX,
           noun=_TOKENS, unset="what the base was trained for, within memory",
           help="Limit prompt and answer to so many tokens. They are allocated at once."),
    Option("n_parallel", int, 1, "engine", "--parallel", low=1, high=MAX_PARALLEL,
           noun="a number of requests", help="Decode so many requests together.",
           defaults={"compare": 4, "eval": 8, "serve": 4}),
    Option("kv_type", str, "f16", "engine", "--kv-type", choices=tuple(KV_TYPES),
           help="Store the KV cache in this type."),
    Option("adapter_type", str, "auto", "engine", "--adapter-type", choices=tuple(ADAPTER_TYPES),
           help="Convert adapters to 8 or 4 bits as they are loaded, for fewer bytes a token. "
           "auto leaves them as they are. On the CPU only."),
    Option("flash_attn", bool, None, "engine", "--no-flash-attn/--flash-attn",
           help="Do without flash attention, or use it.", unset="where it is quicker"),
    Option("threads", int, None, "engine", "--threads", "-t", "Model", low=1, high=MAX_THREADS,
           noun="a number of threads", help="Use so many CPU threads.", unset="all cores"),
    Option("gpu_layers", int, None, "engine", "--gpu-layers", section="Model", unset="all",
           help="Put so many layers on the GPU, or on the workers of --rpc."),
    Option("rpc", str, None, "engine", "--rpc", metavar="HOST:PORT,...", unset="none",
           help="Put layers on these workers (qaflora worker), for a base that does not fit this "
           "machine."),
    Option("tensor_split", str, None, "engine", "--tensor-split", metavar="N,...",
           unset="by their free memory",
           help="Give each worker and then each GPU this share of the layers."),
    Option("max_tokens", int, None, "sampling", "--max-tokens", "-n", "Answer", low=0, noun=_TOKENS,
           help="Generate at most so many tokens.", aliases=("max_completion_tokens",),
           defaults={"run": 512, "chat": 512, "eval": 512, "compare": 256,
                     "bench": 64}),
    Option("temperature", float, 0.0, "sampling", "--temp", section="Answer", low=0,
           defaults={"chat": 0.2, "serve": 0.2},  # small bases err soon above
           help="Sample at temperature X; 0 is greedy."),
    Option("top_p", float, 0.95, "sampling", "--top-p", low=0, high=1,
           help="Sample from the likeliest tokens that make up this much; 1 is all."),
    Option("top_k", int, 0, "sampling", "--top-k", low=0, high=2**31 - 1, noun=_TOKENS,
           help="Sample from so many likeliest tokens; 0 is all."),
    Option("min_p", float, 0.0, "sampling", "--min-p", low=0, high=1,
           help="Sample from tokens at least this part as likely as the likeliest; 0 is all."),
    Option("repeat_penalty", float, 1.0, "sampling", "--repeat-penalty", defaults={"chat": 1.03},
           low=0, is_open=True, high=100,
           help="Make the answer's last 64 tokens less likely; 1 changes nothing."),
    Option("presence_penalty", float, 0.0, "sampling", "--presence-penalty", low=-100, high=100,
           help="Lower the logit of a token by this if it is among the answer's last 64."),
    Option("frequency_penalty", float, 0.0, "sampling", "--frequency-penalty", low=-100, high=100,
           help="Lower the logit of a token by this for each time among the answer's last 64."),
    Option("seed", int, None, "engine sampling answers", "--seed", section="Answer", low=0,
           high=MAX_SEED - 1, help="Sample with this seed.", unset="a new one",
           defaults={"eval": 0}),
    Option("stop", tuple, (), "sampling", "--stop", section="Answer", metavar="TEXT",
           help="End the answer before TEXT; repeatable."),
    Option("reasoning_budget", int, -1, "sampling", "--reasoning-budget", low=-1, noun=_TOKENS,
           aliases=("reasoning_budget_tokens", "thinking_budget_tokens"),
           help="Close a thought after so many tokens, and go on with the answer; -1: no limit."),
    Option("grammar", str, None, "sampling", help="Answer under this GBNF grammar."),
    Option("logit_bias", dict, None, "sampling", low=-100, high=100,
           help="Add this to the logits of tokens."),
    Option("logprobs", int, None, "sampling", low=0, high=20, noun=_TOKENS,
           help="Keep how likely each token was, and so many of the likeliest."),
    Option("n", int, 1, "answers", low=1, noun="a number of answers", help="Give so many answers."),
)
SHARED = {option.key: option for option in OPTIONS if option.flag}
# Options of strategies that probe, as in calibrated:power=2,total=1.5; done in this order.
SHAPING = (
    Option("power", float, 1.0, low=0, is_open=True, high=16, metavar="P",
           help="weigh by the power P of the shares: above 1 sharper, below 1 more even"),
    Option("layers", str, "each", choices=("each", "mean"),
           help="each layer for itself, or its mean over all layers for each adapter"),
    Option("top", int, None, low=1, noun="a number of adapters", metavar="N", unset="all",
           help="only the N adapters that are heaviest in the mean over layers"),
    Option("total", float, 1.0, low=0, is_open=True, high=16, words=("l2",), metavar="T",
           help="each layer's weights sum to T; l2: their squares sum to 1"),
)
# Those of strategies that run each adapter: their own pool, and which adapters they run.
PROBING = (
    Option("pool", str, None, choices=POOLS, unset="that of `--pool`",
           help="the token or tokens that are weighed by"),
)
# fmt: on
DEFAULTS: dict[str, Any] = {option.name: option.default for option in OPTIONS}  # in Python


def in_group(group: str) -> dict[str, Option]:
    """The options that something takes, by their names."""
    return {option.name: option for option in OPTIONS if group in option.groups.split()}


def check(group: str, values: Mapping[str, Any]) -> None:
    """Raise OptionError for the first value that is none of the group's, or out of its range."""
    options = in_group(group)
    for name, value in values.items():
        if name not in options:
            raise wrong_option(name, value, f"no such option; {group} takes {', '.join(options)}")
        option = options[name]
        if not (value is None and option.default is None) and not option.fits(value):
            raise wrong_option(name, value, option.expected)


APP = "qaflora-edge"
FILE = "config.toml"
MAX_SETTINGS_BYTES = 1 << 20
LIBRARY_KEYS = ("cache", "bundles")
Table = dict[str, Any]  # of TOML


def expanded(text: str) -> Path:
    """A path with `~` for the home of the user; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(text))


def settings_path() -> Path:
    """Name the settings file; it may not exist."""
    if chosen := os.environ.get("QAFLORA_CONFIG"):
        return expanded(chosen).absolute()
    import platformdirs

    return platformdirs.user_config_path(APP, appauthor=False, roaming=True) / FILE


def read_settings() -> Table:
    """Read the settings file; no file means no settings, unless QAFLORA_CONFIG names it.

    Raises SettingsError when it cannot be read, is no TOML, or has a wrong `cache` or `bundles`.
    """
    path = settings_path()
    if str(path) == os.devnull or not (os.path.exists(path) or os.environ.get("QAFLORA_CONFIG")):
        return {}
    settings = _read_toml(path)
    if "cache" in settings and not _is_text(settings["cache"]):
        raise wrong_value(path, "cache", settings["cache"], "the path of a folder, as a text")
    folders = settings.get("bundles", [])
    if not (isinstance(folders, list) and all(_is_text(folder) for folder in folders)):
        raise wrong_value(path, "bundles", folders, "a list of paths of folders, as texts")
    return settings


def _read_toml(path: Path) -> Table:
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no plain file" if os.path.exists(path) else "it does not exist")
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS_BYTES + 1)
        if len(data) > MAX_SETTINGS_BYTES:
            raise ValueError(f"it has more than {MAX_SETTINGS_BYTES} bytes")
        return tomllib.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"Cannot read the settings in {path}: {reason}; expected TOML in UTF-8, with lines "
            'such as strategy = "calibrated". Correct or remove the file, or set QAFLORA_CONFIG '
            "to another one."
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def wrong_value(path: Path, key: str, found: object, expected: str) -> SettingsError:
    return SettingsError(
        f"Cannot use the settings in {path}: the key {key} is {found!r}, expected {expected}. "
        "Correct it, or remove it for the default."
    )


def unknown_key(path: Path, key: str, known: Iterable[str]) -> SettingsError:
    """The error for a key that is no setting, with the nearest one that is."""
    for option in OPTIONS:
        if option.old_flag and key.rpartition(".")[2] == option.old_flag.removeprefix("--"):
            raise SettingsError(
                f"Cannot use the settings in {path}: the key {key} is called {option.key} now. "
                f"Write {option.key} in its place."
            )
    names = sorted(known)
    near = nearest(key, names)
    meant = f"Did you mean {near}? Correct the key" if near else "Correct the key"
    return SettingsError(
        f"Cannot use the settings in {path}: there is no key {key!r} here, expected one of "
        f"{', '.join(names)}. {meant}, or remove it."
    )


def cache_setting() -> Path | None:
    """The folder for downloads that the user chose: by environment, else by file, else None."""
    if chosen := os.environ.get("QAFLORA_CACHE"):
        return expanded(chosen).absolute()
    text = read_settings().get("cache")
    return None if text is None else _from_file(text)


def bundle_places() -> list[Path]:
    """Folders that hold bundles, or are bundles, as the user named them; they may not exist."""
    if chosen := os.environ.get("QAFLORA_BUNDLES"):
        return [expanded(text).absolute() for text in chosen.split(os.pathsep) if text]
    return [_from_file(text) for text in read_settings().get("bundles", [])]


def _from_file(text: str) -> Path:
    return settings_path().parent / expanded(text)
