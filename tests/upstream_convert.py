"""llama.cpp's own converters at the pin, run in a process of their own: the oracle of conversion.

    python upstream_convert.py TREE JOBS.json

TREE is llama.cpp with conversion/, gguf-py/ and convert_lora_to_gguf.py. JOBS lists objects with
`hf` (a folder that transformers wrote), `out`, for an adapter `peft`, and for a base `tokens` and
`merges` of a byte-level vocabulary. A job's failure is written beside `out` as `.error`.
"""

import copy
import json
import logging
import sys
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any


def convert_base(job: dict[str, Any]) -> None:
    """Write a float32 base, with a vocabulary of our own in place of a tokeniser's files."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.mamba import Mamba2Model

    hf = Path(job["hf"])
    hparams = ModelBase.load_hparams(hf, False)
    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    options = {}
    if issubclass(model_class, Mamba2Model):  # they read config.json themselves
        options["hparams"] = restored(hf, json.loads((hf / "config.json").read_text("utf-8")))
    model = model_class(hf, gguf.LlamaFileType.ALL_F32, Path(job["out"]), eager=True, **options)
    writes = getattr(model, "impl", model)  # of mistral3, whose class only chooses another

    def set_vocab() -> None:
        writer, tokens = writes.gguf_writer, job["tokens"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        kinds = [gguf.TokenType.NORMAL] * len(tokens)
        kinds[-job["n_control"] :] = [gguf.TokenType.CONTROL] * job["n_control"]
        writer.add_token_types(kinds)
        writer.add_token_merges(job["merges"])
        writer.add_bos_token_id(len(tokens) - 1)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(False)

    writes.set_vocab = set_vocab
    model.write()


def restore_fields(load: Any) -> Any:
    """Wrap load_hparams: with fields that this transformers no longer writes, each read once."""
    loaded = cache(load)

    def load_hparams(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        return restored(folder, copy.deepcopy(loaded(folder, is_mistral_format)))

    return staticmethod(load_hparams)


def restored(folder: Path, hparams: dict[str, Any]) -> dict[str, Any]:
    """Put the fields of `upstream.json` in; null takes a field out."""
    if (folder / "upstream.json").is_file():
        hparams |= json.loads((folder / "upstream.json").read_text("utf-8"))
    return {name: value for name, value in hparams.items() if value is not None}


@cache
def compiled(script: Path) -> CodeType:
    return compile(script.read_text(encoding="utf-8"), str(script), "exec")


def convert_adapter(tree: Path, job: dict[str, Any]) -> None:
    """Run convert_lora_to_gguf.py as its command line would."""
    script = tree / "convert_lora_to_gguf.py"
    options = ["--outtype", job["outtype"], "--base", job["hf"], "--outfile", job["out"]]
    sys.argv = [str(script), *options, job["peft"]]
    exec(compiled(script), {"__name__": "__main__", "__file__": str(script)})


def main(tree: Path, jobs: Path) -> None:
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    from conversion import ModelBase

    logging.disable(logging.INFO)  # a line for each tensor
    ModelBase.no_mtp = True  # as with --no-mtp: transformers writes no blocks of that kind
    ModelBase.load_hparams = restore_fields(ModelBase.load_hparams)  # type: ignore[method-assign]
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        try:
            if "peft" in job:
                convert_adapter(tree, job)
            else:
                convert_base(job)
        except (Exception, SystemExit) as error:
            Path(job["out"] + ".error").write_text(f"{type(error).__name__}: {error}", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
