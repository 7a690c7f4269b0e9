"""Time and memory of converting a random adapter of a large base, in processes without torch.

    python benchmarks/convert.py [--layers 32] [--runs 5] [--outtype f16] [--verify]

The base is a sparse file of an 8B Llama's shapes; nothing of its weights is read. Peak memory is
counted over the floor, which is that of the same interpreter with the code imported that
converts and writes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

N_EMBD, N_KV, N_FF, N_VOCAB, N_MERGE = 4096, 1024, 14336, 128256, 280147
SHAPES = {  # module -> stem, [n_out, n_in]
    "self_attn.q_proj": ("attn_q", (N_EMBD, N_EMBD)),
    "self_attn.k_proj": ("attn_k", (N_KV, N_EMBD)),
    "self_attn.v_proj": ("attn_v", (N_KV, N_EMBD)),
    "self_attn.o_proj": ("attn_output", (N_EMBD, N_EMBD)),
    "mlp.gate_proj": ("ffn_gate", (N_FF, N_EMBD)),
    "mlp.up_proj": ("ffn_up", (N_FF, N_EMBD)),
    "mlp.down_proj": ("ffn_down", (N_EMBD, N_FF)),
}
OUT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}

# What the measured process runs: argv is a request. VmHWM knows no parent's peak; ru_maxrss does.
CHILD = """
import os, json, re, resource, sys, time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `qaflora convert` does
import filelock, gguf, msgspec  # imported late: they belong to the floor
gguf.GGUFWriter  # the package runs when a name of it is asked for
from qaflora_edge.convert.adapter import convert_adapter
def peak():
    try:
        status = open("/proc/self/status").read()
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
floor, begin, cpu = peak(), time.perf_counter(), time.process_time()
convert_adapter(*sys.argv[1:4], outtype=sys.argv[4], verify=sys.argv[5] == "True")
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
assert "torch" not in sys.modules
times = {"seconds": seconds, "cpu_seconds": cpu}
print(json.dumps({**times, "floor_bytes": floor, "peak_bytes": peak()}))
"""


def write_base(path: Path, n_layer: int) -> int:
    """Write the header of an 8B Llama and a hole for its weights; give the bytes of the header."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_embedding_length(N_EMBD)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_token_list([f"token{index}" for index in range(N_VOCAB)])
    writer.add_token_merges([f"t{index} e{index}" for index in range(N_MERGE)])
    tensors = {"token_embd": (N_VOCAB, N_EMBD), "output": (N_VOCAB, N_EMBD)}
    for layer in range(n_layer):
        tensors |= {f"blk.{layer}.{stem}": shape for stem, shape in SHAPES.values()}
    for stem, shape in tensors.items():
        n_bytes = 2 * shape[0] * shape[1]
        writer.add_tensor_info(f"{stem}.weight", shape, np.dtype(np.float16), n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header_bytes = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(header_bytes + 32 + sum(2 * n * m for n, m in tensors.values()))
    return header_bytes


def write_adapter(folder: Path, n_layer: int, rank: int, dtype: str, modules: list[str]) -> None:
    """Write a PEFT folder on these projections, one tensor in memory at a time."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    item_bytes = 4 if dtype == "F32" else 2
    header, end, counts = {}, 0, []
    for layer in range(n_layer):
        for module in modules:
            n_out, n_in = SHAPES[module][1]
            name = f"base_model.model.model.layers.{layer}.{module}"
            for side, shape in (("A", [rank, n_in]), ("B", [n_out, rank])):
                begin, end = end, end + item_bytes * shape[0] * shape[1]
                counts.append(shape[0] * shape[1])
                entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
                header[f"{name}.lora_{side}.weight"] = entry
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for count in counts:
            values = (rng.standard_normal(count, np.float32) / 64).astype(np.float32)
            if dtype == "F32":
                file.write(values.tobytes())
            else:
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def measure(folder: Path, runs: int, outtype: str, verify: bool) -> list[dict[str, float]]:
    """Convert in a new process for each run."""
    request = [folder / "adapter", folder / "base.gguf", folder / "out.gguf", outtype, verify]
    command = [sys.executable, "-c", CHILD, *map(str, request)]
    return [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for _ in range(runs)
    ]


def report(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Make the files, measure, and set the medians beside the largest tensors."""
    header_bytes = write_base(folder / "base.gguf", options.layers)
    write_adapter(folder / "adapter", options.layers, options.rank, options.dtype, options.modules)
    runs = measure(folder, options.runs, options.outtype, options.verify)
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    item_bytes = 4 if options.dtype == "F32" else 2
    pair_bytes = item_bytes * options.rank * (N_FF + N_EMBD)
    buffer_bytes = OUT_BYTES[options.outtype] * options.rank * N_FF
    over_bytes = middle["peak_bytes"] - middle["floor_bytes"]
    return {
        **middle,
        "over_floor_bytes": over_bytes,
        "largest_pair_bytes": pair_bytes,  # as the adapter's file has it
        "output_buffer_bytes": buffer_bytes,
        "header_bytes": header_bytes,  # of the base, which is in memory
        "pairs_beyond": (over_bytes - header_bytes - buffer_bytes) / pair_bytes,
        "adapter_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "output_bytes": (folder / "out.gguf").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--modules", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("BF16", "F32"), default="BF16")
    parser.add_argument("--outtype", choices=tuple(OUT_BYTES), default="f16")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qaflora-bench-") as folder:
        result = report(options, Path(folder))
    if options.json:
        print(json.dumps(result))
        return
    most = 4 if options.verify else 2  # a pair as float32 is two; the file's and its source's
    mb = {name: value / 1e6 for name, value in result.items() if name.endswith("_bytes")}
    print(
        f"{options.layers} layers of an 8B Llama, rank {options.rank}, {options.dtype} to "
        f"{options.outtype}: {mb['adapter_bytes']:.0f} MB to {mb['output_bytes']:.0f} MB\n"
        f"median of {options.runs}: {result['seconds']:.2f} s "
        f"({result['cpu_seconds']:.2f} s of a CPU); peak {mb['peak_bytes']:.1f} MB, "
        f"{mb['over_floor_bytes']:.1f} MB over the interpreter's {mb['floor_bytes']:.1f} MB\n"
        f"the base's header {mb['header_bytes']:.2f} MB, largest pair "
        f"{mb['largest_pair_bytes']:.2f} MB, its output buffer {mb['output_buffer_bytes']:.2f} MB: "
        f"{result['pairs_beyond']:.2f} pairs beyond header and buffer (at most {most})"
    )
    sys.exit(result["pairs_beyond"] > most)


if __name__ == "__main__":
    main()
