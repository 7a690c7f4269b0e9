"""LoRA-Flow (arXiv 2402.11455) on the adapters of a bundle, in torch: gates trained, then scored.

    python benchmarks/lora_flow.py BUNDLE TRAIN.jsonl TEST.jsonl -o RESULTS.jsonl

The gate of a layer gives each token x that the layer reads the weights softmax(W x) + b, one for
each adapter; W and b are trained on the answers of TRAIN, and nothing else is. As published: 200
examples, 5 epochs, batches of 4, a learning rate of 1e-3. W and b begin at 0, which is the static
mix. The base is the bundle's own, dequantised to float32; it has to be a llama or qwen2.

TEST is asked as `qaflora eval` asks it, greedily, and RESULTS is a file of its format, with the
strategy `lora-flow`. TRAIN and TEST may be one file: --train-half dev --half test keeps them apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import code_metric
import numpy as np
import torch
from as_peft import MODULES
from lorahub import HALVES, choose, read_examples
from torch.nn import functional
from transformers import AutoModelForCausalLM, GgufConfig

from qaflora_edge import Engine, FusionWeights, Plan
from qaflora_edge.bundles.open import BundleFiles, load_bundle
from qaflora_edge.evaluation.metrics import listed
from qaflora_edge.evaluation.run import asked_fields, header, score_fields, task_prompt
from qaflora_edge.evaluation.tasks import Task, kept_results, read_task
from qaflora_edge.formats.adapter import read_pair

STRATEGY = "lora-flow"


class Gate(torch.nn.Module):
    """softmax(W x) + b of what a layer reads, kept for the layer's modules."""

    def __init__(self, n_adapter: int, n_embd: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(n_adapter, n_embd))
        self.bias = torch.nn.Parameter(torch.zeros(n_adapter))
        self.given = torch.zeros(0)  # [n_row, n_token, n_adapter]

    def forward(self, x: torch.Tensor) -> None:
        """Weigh x [n_row, n_token, n_embd]."""
        self.given = (x @ self.weight.T).softmax(dim=-1) + self.bias


class Mixed(torch.nn.Module):
    """A linear module and what the adapters add to it, under the weights of its layer's gate."""

    def __init__(
        self,
        base: torch.nn.Module,
        gate: Gate,
        pairs: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
    ) -> None:
        """pairs  index of the adapter, A [rank, n_in], and B [n_out, rank] with the scale in it"""
        super().__init__()
        self.base, self._gate = base, [gate]  # in a list: the gate is no part of this module
        self.register_buffer("a", torch.cat([a for _, a, _ in pairs]))
        self.register_buffer("b", torch.cat([b for _, _, b in pairs], dim=1))
        of_rank = [index for index, a, _ in pairs for _ in range(a.shape[0])]
        self.register_buffer("of_rank", torch.tensor(of_rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self._gate[0].given[..., self.of_rank]
        mixed: torch.Tensor = self.base(x) + ((x @ self.a.T) * weights) @ self.b.T
        return mixed


@dataclass
class Flow:
    """A base with gated adapters.

    gates  of each layer; only they are trained
    """

    model: Any
    gates: torch.nn.ModuleList
    device: str

    @classmethod
    def load(cls, bundle: BundleFiles, adapters: Sequence[str], device: str) -> Flow:
        """The bundle's base and adapters, with gates that mix them alike."""
        header = bundle.header
        if header.architecture not in ("llama", "qwen2"):
            raise SystemExit(f"The base is {header.architecture}, expected llama or qwen2.")
        model = AutoModelForCausalLM.from_pretrained(
            header.path.parent,
            gguf_file=header.path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.requires_grad_(False)
        config = model.config
        gates = torch.nn.ModuleList(
            Gate(len(adapters), config.hidden_size) for _ in model.model.layers
        )
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for il, (layer, gate) in enumerate(zip(model.model.layers, gates, strict=True)):
            layer.register_forward_pre_hook(
                lambda _module, args, kwargs, gate=gate: gate(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            for stem, module in MODULES.items():
                pairs = []
                for index, name in enumerate(adapters):
                    info = bundle.adapters[name]
                    tensor = f"blk.{il}.{stem}.weight"
                    if tensor in info.ranks:
                        a, b, scale = read_pair(info, tensor)
                        if header.architecture == "llama" and stem in heads:
                            b = halves_of_heads(b, heads[stem])
                        pairs.append((index, torch.from_numpy(a), torch.from_numpy(scale * b)))
                if pairs:
                    parent, _, last = module.partition(".")
                    owner = getattr(layer, parent)
                    setattr(owner, last, Mixed(getattr(owner, last), gate, pairs))
        model.to(device).eval()
        gates.to(device)
        return cls(model, gates, device)

    def answer_logits(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Any]:
        """Logits [n_token, n_vocab] of each row's continuation, of rows of one batch."""
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, answer) in enumerate(rows):
            n = len(prompt) + len(answer)
            ids[i, :n] = torch.tensor([*prompt, *answer])
            mask[i, :n] = 1
        first = min(len(prompt) for prompt, _ in rows) - 1  # what precedes it answers nothing
        found = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            use_cache=False,
            logits_to_keep=torch.arange(first, longest, device=self.device),
        ).logits
        for i, (prompt, answer) in enumerate(rows):
            at = len(prompt) - 1 - first
            yield found[i, at : at + len(answer)]

    def mean_loss(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
        """The mean over rows of nats a token of the answer."""
        losses = [
            functional.cross_entropy(logits, torch.tensor(answer, device=self.device))
            for logits, (_, answer) in zip(self.answer_logits(rows), rows, strict=True)
        ]
        return torch.stack(losses).mean()

    def mean_weights(self, n_token: int) -> np.ndarray[Any, Any]:
        """What the gates gave last to so many first tokens, their mean: [n_adapter, n_layer]."""
        means = [gate.given[0, :n_token].detach().double().mean(dim=0) for gate in self.gates]
        return torch.stack(means, dim=1).cpu().numpy()


def halves_of_heads(rows: np.ndarray[Any, Any], n_head: int) -> np.ndarray[Any, Any]:
    """From llama.cpp's order of a head's rows, pairs side by side, to transformers' two halves."""
    paired = rows.reshape(n_head, rows.shape[0] // n_head // 2, 2, -1)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows.shape))


def train(flow: Flow, rows: Sequence[Any], args: argparse.Namespace) -> None:
    """Train the gates on prompts and answers."""
    optimizer = torch.optim.AdamW(flow.gates.parameters(), lr=args.lr, weight_decay=0.0)
    rng = np.random.default_rng(args.seed)
    for epoch in range(args.epochs):
        losses = []
        order = rng.permutation(len(rows))
        for at in range(0, len(rows), args.batch):
            optimizer.zero_grad()
            batch = order[at : at + args.batch]
            for i in batch:  # one by one: what several leave behind takes gigabytes
                found = flow.mean_loss([rows[int(i)]])
                (found / len(batch)).backward()
                losses.append(float(found.detach()))
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}", flush=True)


def evaluate(flow: Flow, engine: Engine, task: Task, index: int) -> dict[str, Any]:
    """An item's result; its weights are the gates', the mean over the prompt's tokens."""
    item = task.items[index]
    prompt = task_prompt(engine, task, item)
    start = time.perf_counter()
    if task.by.is_likelihood:
        texts = listed(item[task.by.needs])
        rows = [(prompt, plain_tokens(engine, text)) for text in texts]
        scores = []
        for logits, (_, answer) in zip(flow.answer_logits(rows), rows, strict=True):
            chosen = torch.tensor(answer, device=flow.device)[:, None]
            log_p = logits.double().log_softmax(dim=-1).gather(1, chosen)
            scores.append(log_p[:, 0].float().cpu().numpy())
        means = flow.mean_weights(len(prompt))
        found = score_fields(task, item, scores)
        n_token, reason = sum(map(len, scores)), None
    else:
        n_most = task.max_tokens or 512
        text, n_token, reason, means = generated(flow, engine, prompt, n_most)
        found = score_fields(task, item, text)
    fusion = FusionWeights(engine.adapters, Plan.mix(means), STRATEGY)
    return {
        **asked_fields(task, index, STRATEGY),
        "weights": fusion.means,
        **found,
        "probe_ms": 0.0,
        "prefill_ms": 0.0,
        "decode_ms": round(1e3 * (time.perf_counter() - start), 3),
        "n_prompt": len(prompt),
        "n_token": n_token,
        "finish_reason": reason,
    }


def generated(
    flow: Flow, engine: Engine, prompt: Sequence[int], n_most: int
) -> tuple[str, int, str, Any]:
    """Text, tokens, reason of the end and the prompt's mean weights of a greedy answer."""
    tokens: list[int] = []
    ids = torch.tensor([list(prompt)], device=flow.device)
    out = flow.model(input_ids=ids, use_cache=True, logits_to_keep=1)
    means, reason = flow.mean_weights(len(prompt)), "length"
    while len(tokens) < n_most:
        token = int(out.logits[0, -1].argmax())
        if engine._model.is_end(token):
            reason = "stop"
            break
        tokens.append(token)
        ids = torch.tensor([[token]], device=flow.device)
        out = flow.model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
    text = b"".join(map(engine._model.piece, tokens)).decode("utf-8", "replace")
    return text, len(tokens), reason, means


def plain_tokens(engine: Engine, text: str) -> list[int]:
    """Token ids of what follows a prompt."""
    return engine._model.tokenize(text, add_special=False, parse_special=False)


def training(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the results file tells."""
    names = ("examples", "epochs", "lr", "batch", "train_half", "seed")
    return {
        "float32": True,
        "train": "itself" if args.train == args.test else read_task(args.train).sha256,
        **{name: getattr(args, name) for name in names},
    }


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, or words in its place."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--adapters", help="names, with commas; all by default")
    parser.add_argument("--train-half", choices=HALVES, default="all")
    parser.add_argument("--half", choices=HALVES, default="all")
    parser.add_argument("--limit", type=int, help="items of TEST")
    parser.add_argument("--examples", type=int, default=200, help="at most so many of TRAIN")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--allow-code", action="store_true", help="run what the model writes")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Train the gates, then score what the results file has not."""
    args = arguments(words)
    torch.manual_seed(args.seed)
    bundle = load_bundle(args.bundle)
    if args.allow_code:
        code_metric.register()
    task, train_task = read_task(args.test), read_task(args.train)
    with Engine(args.bundle, strategy="base", n_ctx=4096) as engine:
        if args.adapters:
            engine.use_adapters(args.adapters.split(","))
        head = header(args.bundle, engine, [task], [STRATEGY], training(args))
        with kept_results(args.out, head) as file:
            indexes = range(len(task.items))[HALVES[args.half]][: args.limit]
            left = [i for i in indexes if (task.name, i, STRATEGY) not in file.records]
            if not left:
                return
            items = range(len(train_task.items))[HALVES[args.train_half]]
            chosen = choose(items, min(args.examples, len(items)), args.seed)
            examples = read_examples(engine, train_task, chosen)
            answers = [plain_tokens(engine, text) for text in examples.answers]
            flow = Flow.load(bundle, engine.adapters, args.device)
            train(flow, list(zip(examples.prompts, answers, strict=True)), args)
            with torch.inference_mode():
                for index in left:
                    found = evaluate(flow, engine, task, index)
                    file.add(found)
                    print(f"{task.name} {index}: {found['score']:.4g}", flush=True)


if __name__ == "__main__":
    main()
