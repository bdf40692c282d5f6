"""Is every window protocol what it says? kvsuite's scores against a plain float64 loop, token by token, on real text.

    python docs/measurements/window_reference.py wiki.test.raw
    python docs/measurements/window_reference.py wiki.test.raw --tokens 2000 --ctx 128 --stride 32 --protocols disjoint

The reference shares nothing with kvsuite but the weights and the token ids. Its windows are written from the table in
docs/perplexity.md, its model is Llama in plain float64 tensor operations (transformers computes norms, rotary angles and
softmax in float32 whatever the weights are), and each window is decoded one token a step through a cache of its own, many
windows side by side. Exits with 1 if the loss of any token or any perplexity differs by 1e-4.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvsuite.engines.window_scoring import score_windows
from kvsuite.models import resolve_model
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.workloads.corpus import load_corpus
from kvsuite.workloads.windows import plan_windows

PERPLEXITY_BOUND, TOKEN_BOUND = 1e-4, 5e-4
RULES = {"hf-strided": "none", "disjoint": "none", "lm-eval-rolling": "bos_first", "llama.cpp-half": "bos_over_first"}


@dataclass(frozen=True)
class Sequence64:
    """Tokens of one window, and which step predicts which position of the text."""

    ids: list[int]
    targets: dict[int, int]


def strided(tokens: Sequence[int], ctx: int, stride: int) -> Iterator[Sequence64]:
    for i in range(0, len(tokens), stride):
        begin, end = max(i + stride - ctx, 0), min(i + stride, len(tokens))
        targets = {t - 1 - begin: t for t in range(i, end) if t > begin}
        yield Sequence64(list(tokens[begin : end - 1]), targets)


def rolling(tokens: Sequence[int], ctx: int, prefix: int) -> Iterator[Sequence64]:
    text = [prefix, *tokens]  # token t of the text is text[t + 1], predicted from text[t]
    for first in range(0, len(tokens), ctx):
        end = min(first + ctx, len(tokens))
        begin = max(end - ctx, 0)
        yield Sequence64(text[begin:end], {t - begin: t for t in range(first, end)})


def halves(tokens: Sequence[int], ctx: int, prefix: int) -> Iterator[Sequence64]:
    for chunk in range(len(tokens) // ctx):
        ids = list(tokens[chunk * ctx : chunk * ctx + ctx])
        ids[0] = prefix
        yield Sequence64(ids[:-1], {j - 1: chunk * ctx + j for j in range(ctx // 2 + 1, ctx)})


def sequences(protocol: str, tokens: Sequence[int], ctx: int, stride: int, prefix: int) -> list[Sequence64]:
    if protocol == "lm-eval-rolling":
        return list(rolling(tokens, ctx, prefix))
    if protocol == "llama.cpp-half":
        return list(halves(tokens, ctx, prefix))
    return list(strided(tokens, ctx, stride if protocol == "hf-strided" else ctx))


class Llama64:
    """Llama's decoder, one token a step, float64 throughout."""

    def __init__(self, loaded: LoadedModel) -> None:
        config = loaded.text_config
        assert config.model_type == "llama"
        assert config.rope_parameters["rope_type"] == "default"
        self.weights = {name: value.double() for name, value in loaded.model.state_dict().items()}
        self.layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        half = torch.arange(0, self.size, 2, dtype=torch.float64, device=loaded.device) / self.size
        self.frequencies = config.rope_parameters["rope_theta"] ** -half

    def start(self, rows: int, steps: int) -> None:
        shape = (self.layers, rows, self.kv_heads, steps, self.size)
        device = self.frequencies.device
        self.keys, self.values = (torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2))

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Final states ``[rows, hidden]`` of ``ids`` ``[rows]``, all of them at ``position``."""
        x = self.weights["model.embed_tokens.weight"][ids]
        angle = position * self.frequencies
        cos, sin = torch.cat([angle, angle]).cos(), torch.cat([angle, angle]).sin()
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            h = self._norm(x, name + "input_layernorm")
            q, k, v = (self._linear(h, f"{name}self_attn.{part}_proj").view(len(ids), -1, self.size) for part in "qkv")
            self.keys[layer, :, :, position] = k * cos + _turned(k) * sin
            self.values[layer, :, :, position] = v
            q = (q * cos + _turned(q) * sin).view(len(ids), self.kv_heads, -1, self.size)
            keys, values = self.keys[layer, :, :, : position + 1], self.values[layer, :, :, : position + 1]
            weights = torch.softmax(q @ keys.transpose(-1, -2) / math.sqrt(self.size), dim=-1)
            x = x + self._linear((weights @ values).reshape(len(ids), -1), name + "self_attn.o_proj")
            h = self._norm(x, name + "post_attention_layernorm")
            gated = F.silu(self._linear(h, name + "mlp.gate_proj")) * self._linear(h, name + "mlp.up_proj")
            x = x + self._linear(gated, name + "mlp.down_proj")
        return self._norm(x, "model.norm")

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return F.cross_entropy(states @ head.T, targets, reduction="none")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weights[name + ".weight"]


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def reference(model: Llama64, tokens: Sequence[int], windows: list[Sequence64], side_by_side: int) -> dict[int, float]:
    """Loss in nats of every target by its position."""
    found: dict[int, float] = {}
    device = model.frequencies.device
    for at in range(0, len(windows), side_by_side):
        batch = windows[at : at + side_by_side]
        steps = max(len(each.ids) for each in batch)
        ids = torch.zeros(len(batch), steps, dtype=torch.int64)
        for row, each in enumerate(batch):
            ids[row, : len(each.ids)] = torch.tensor(each.ids, dtype=torch.int64)
        ids = ids.to(device)
        model.start(*ids.shape)
        for j in range(steps):
            states = model.step(ids[:, j], j)
            rows = [row for row, each in enumerate(batch) if j in each.targets]
            if rows:
                positions = [batch[row].targets[j] for row in rows]
                wanted = torch.tensor([tokens[p] for p in positions], device=device)
                found |= dict(zip(positions, model.losses(states[rows], wanted).tolist(), strict=True))
    return found


def text_tokens(loaded: LoadedModel, path: str, count: int) -> list[int]:
    text = load_corpus(path, num_texts=1).texts[0]
    tokens = loaded.tokenizer(text[: 16 * count], verbose=False, add_special_tokens=False)["input_ids"][:count]
    if len(tokens) < count:
        raise SystemExit(f"{path} has only {len(tokens)} tokens in its first {16 * count} characters")
    return list(tokens)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="text file, for example WikiText-2's wiki.test.raw")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256, help="of hf-strided")
    parser.add_argument("--protocols", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--side-by-side", type=int, default=40, help="windows decoded at the same time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # products in TF32 would be another model
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(resolve_model("smollm2"), device=options.device, dtype="float32")
    tokens = text_tokens(loaded, options.text, options.tokens)
    plain = Llama64(loaded)
    prefix = loaded.tokenizer.bos_token_id
    print(f"SmolLM2, {len(tokens)} tokens, ctx {options.ctx}, stride {options.stride}, {options.device}")
    print("| protocol | windows | scored | kvsuite, float32 | plain loop, float64 | difference | largest of a token |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for protocol in options.protocols:
        planned = plan_windows(protocol, len(tokens), options.ctx, options.stride, prefix=RULES[protocol])
        scores = score_windows(loaded.model, tokens, planned, prefix=RULES[protocol], prefix_token=prefix).tokens
        begun = time.perf_counter()
        own = sequences(protocol, tokens, options.ctx, options.stride, prefix)
        exact = reference(plain, tokens, own, options.side_by_side)
        took = time.perf_counter() - begun
        ours = dict(zip(scores.positions, scores.nll, strict=True))
        assert ours.keys() == exact.keys(), (protocol, len(ours), len(exact))
        largest = max(abs(ours[position] - exact[position]) for position in exact)
        pair = [math.exp(math.fsum(each.values()) / len(each)) for each in (ours, exact)]
        difference = abs(pair[0] - pair[1])
        failed |= difference >= PERPLEXITY_BOUND or largest >= TOKEN_BOUND
        print(
            f"| `{protocol}` | {len(own)} | {len(exact)} | {pair[0]:.6f} | {pair[1]:.6f} | {difference:.1e} | {largest:.1e} |",
            flush=True,
        )
        print(f"{protocol}: {took:.0f} s for the loop", file=sys.stderr)
    if failed:
        raise SystemExit(f"a perplexity differs by {PERPLEXITY_BOUND} or more, or a token's loss by {TOKEN_BOUND}")


if __name__ == "__main__":
    main()
