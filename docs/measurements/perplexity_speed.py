"""How fast is window scoring? kvsuite, the loop of the Hugging Face documentation and lm-evaluation-harness, in turns.

    python docs/measurements/perplexity_speed.py --tokens 6000 --rounds 3
    python docs/measurements/perplexity_speed.py --device cuda --dtype bfloat16 --corpus pydoc --tokens 100000
    python docs/measurements/perplexity_speed.py --model random:SmolLM2-135M --device cuda --dtype bfloat16 --tokens 100000
    python docs/measurements/perplexity_speed.py --model dummy:Llama-3-8B --device cuda --tokens 100000 --only kvsuite

Same text, same model, one process; medians of interleaved rounds, on the CPU in processor time as well. Peak memory of
each arm: on the CPU the kernel's high-water mark of a process of its own, on CUDA the allocator's; both less what was there
before the arm ran.
``random:SmolLM2-135M`` has that model's shapes with random weights, for machines to which the weights cannot be brought;
its times are right and its values mean nothing. ``--tokenizer FOLDER`` gives it a tokenizer, which lm-eval needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvsuite.engines.window_scoring import WindowScores, score_windows
from kvsuite.meters.memory import resident_set_peak
from kvsuite.models import resolve_model
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.workloads.corpus import load_corpus
from kvsuite.workloads.windows import merge_windows, plan_windows

Score = tuple[float, int]  # sum of losses, scored tokens

SMOLLM2_SHAPES = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def load(options: argparse.Namespace) -> LoadedModel:
    if options.model != "random:SmolLM2-135M":
        return load_model(resolve_model(options.model), device=options.device, dtype=options.dtype)
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = load_model(resolve_model("dummy:Llama-3.2-1B"), device="meta", dtype=options.dtype)
    torch.manual_seed(0)
    with torch.device(options.device):
        loaded.model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPES, dtype=options.dtype)).to(loaded.dtype)
    loaded.model.eval().requires_grad_(False)
    loaded.text_config, loaded.device = loaded.model.config, loaded.model.device
    loaded.tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    return loaded


def documentation_loop(model: Any, ids: torch.Tensor, ctx: int, stride: int) -> Score:
    """Windows of ``ctx`` every ``stride`` tokens; labels of tokens scored before are masked; the model computes the loss."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + ctx, ids.shape[1])
        inputs = ids[:, begin:end]
        labels = inputs.clone()
        labels[:, : before - end] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        # the model shifts the labels, so the first one of a window never counts
        scored = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * scored, count + scored, end
        if end == ids.shape[1]:
            break
    return total, count


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.threads:
            torch.set_num_threads(options.threads)
        self.loaded = load(options)
        self.model, self.device = self.loaded.model, self.loaded.device
        self.dummy = self.loaded.tokenizer is None
        self.random = self.loaded.spec.is_dummy
        self.text, self.tokens = self._text()
        self.ids = torch.tensor([self.tokens], device=self.device)
        self.prefix_token = self._prefix_token()
        self.last: WindowScores | None = None
        self.arms: dict[str, Callable[[], Score]] = {
            "kvsuite": self.kvsuite,
            "documentation loop": lambda: documentation_loop(self.model, self.ids, options.ctx, options.stride),
            "kvsuite, rolling": self.kvsuite_rolling,
        }
        if importlib.util.find_spec("lm_eval") and not self.dummy:
            self.arms["lm-eval, rolling"] = self._lm_eval()
        if options.only:
            self.arms = {name: arm for name, arm in self.arms.items() if name in options.only}

    def _text(self) -> tuple[str, list[int]]:
        wanted = self.options.tokens
        if self.dummy:
            size = self.loaded.text_config.vocab_size
            return "", torch.randint(0, size, (wanted,), generator=torch.Generator().manual_seed(0)).tolist()
        text = load_corpus(self.options.corpus, num_texts=1).texts[0]
        found = self.loaded.tokenizer(text, return_offsets_mapping=True, verbose=False, add_special_tokens=False)
        if len(found["input_ids"]) > wanted:
            # cut at the end of a token, so that text and tokens are the same thing
            text = text[: found["offset_mapping"][wanted - 1][1]]
        return text, self.loaded.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    def _prefix_token(self) -> int:
        config = self.loaded.text_config
        of = config if self.dummy else self.loaded.tokenizer
        return of.eos_token_id if of.bos_token_id is None else of.bos_token_id

    def kvsuite(self) -> Score:
        windows = plan_windows("hf-strided", len(self.tokens), self.options.ctx, self.options.stride)
        return self._score(windows, "none")

    def kvsuite_rolling(self) -> Score:
        return self._score(plan_windows("lm-eval-rolling", len(self.tokens), self.options.ctx), "bos_first")

    def _score(self, windows: list[Any], prefix: str) -> Score:
        self.last = score_windows(
            self.model, self.tokens, windows, prefix=prefix, prefix_token=self.prefix_token,
            batch_tokens=self.options.batch_tokens,
        )  # fmt: skip
        return math.fsum(self.last.tokens.nll), len(self.last.tokens.nll)

    def _lm_eval(self) -> Callable[[], Score]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(
            pretrained=self.model, tokenizer=self.loaded.tokenizer, max_length=self.options.ctx,
            batch_size=self.options.lm_eval_batch, add_bos_token=False,
        )  # fmt: skip
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(self.text,), idx=0)
        return lambda: (-float(harness.loglikelihood_rolling([request], disable_tqdm=True)[0]), len(self.tokens))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, name: str) -> tuple[float, float, Score]:
        """Seconds of an arm, seconds of processor time in them, and its score."""
        self.synchronize()
        begin, processor = time.perf_counter(), time.process_time()
        score = self.arms[name]()
        self.synchronize()
        return time.perf_counter() - begin, time.process_time() - processor, score

    def dynamic_bytes(self, name: str) -> int:
        """Peak of an arm, less the weights and all else that was there before."""
        # weights are mapped from a file: they count once they were read
        with torch.inference_mode():
            self.model(self.ids[:, :16], use_cache=False)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.arms[name]()
            return torch.cuda.max_memory_allocated(self.device) - before
        before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        with resident_set_peak() as peak:
            self.arms[name]()
        if peak.value is None:
            raise SystemExit(f"no peak memory: {peak.reason}")
        return peak.value - before

    def flops(self, name: str) -> tuple[float, float]:
        """FLOP of the decoder layers over all windows, and of the final layer over the rows that an arm projects."""
        options, config, n = self.options, self.loaded.text_config, len(self.tokens)
        rolling = "rolling" in name
        planned = plan_windows("lm-eval-rolling" if rolling else "hf-strided", n, options.ctx, options.stride)
        lengths = [window.end - 1 - window.begin for window in merge_windows(planned)]
        tables = {
            id(m.weight): m.weight for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        }
        inner = sum(p.numel() for p in self.model.parameters() if id(p) not in tables)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        # two products, half of each below the diagonal
        attention = sum(2 * length * (length + 1) * width for length in lengths) * config.num_hidden_layers
        rows = n if name.startswith("kvsuite") else sum(lengths)
        return 2.0 * inner * sum(lengths) + attention, 2.0 * rows * config.hidden_size * config.vocab_size


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(10 if device.type == "cuda" else 1):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begin) / (10 if device.type == "cuda" else 1))
    return 2 * n**3 / best


def memory_in_a_process(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokenizer", default=None, help="folder, for random:SmolLM2-135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--corpus", default="default")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--lm-eval-batch", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="arms to run")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    bench = Bench(options := parser.parse_args())
    if options.memory_of:
        print(json.dumps(bench.dynamic_bytes(options.memory_of)))
        return
    print(
        f"{options.model} on {bench.device}, {bench.loaded.dtype}, {len(bench.tokens)} tokens, ctx {options.ctx}, "
        f"stride {options.stride}, {options.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if "lm-eval, rolling" not in bench.arms and not bench.dummy:
        print("lm-evaluation-harness is not installed, its arm is left out; to have it: pip install lm-eval")
    rate = matmul_rate(bench.device, bench.loaded.dtype)
    print(f"matrix product of this dtype here: {rate / 1e12:.3f} TFLOP/s")
    seconds: dict[str, list[float]] = {name: [] for name in bench.arms}
    processor: dict[str, list[float]] = {name: [] for name in bench.arms}
    scores, effective = {}, {}
    names = list(bench.arms)
    for index in range(options.rounds + (bench.device.type == "cuda")):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            took, busy, scores[name] = bench.timed(name)
            effective[name] = bench.last.effective if name.startswith("kvsuite") and bench.last else {}
            # the first round on CUDA is warm-up
            if index or bench.device.type != "cuda":
                seconds[name].append(took)
                processor[name].append(busy)
    on_cpu = bench.device.type == "cpu"
    for name in names:
        took = median(seconds[name])
        dynamic = memory_in_a_process(name) if on_cpu else bench.dynamic_bytes(name)
        layers, final = bench.flops(name)
        nll, n = scores[name]
        value = "random weights" if bench.random else f"ppl {math.exp(nll / n):.6f}"
        print(
            f"{name:20} {value}  {n} scored  {took:.3f} s  {n / took:.1f} tok/s  dynamic {dynamic / 2**20:.0f} MiB  "
            f"{(layers + final) / took / 1e12:.3f} TFLOP/s = {(layers + final) / took / rate:.0%} of the product's  "
            f"(layers alone at that rate: {layers / rate:.3f} s)  {effective[name] or ''}"
        )
    for ours, theirs in (("kvsuite", "documentation loop"), ("kvsuite, rolling", "lm-eval, rolling")):
        if ours in seconds and theirs in seconds:
            wall, busy = (
                sorted(b / a for a, b in zip(each[ours], each[theirs], strict=True)) for each in (seconds, processor)
            )
            print(
                f"{ours} against {theirs}: {median(wall):.2f}x (paired rounds: {wall[0]:.2f} to {wall[-1]:.2f})", end=""
            )
            # on a machine that others use, the clock counts their work too
            print(f", in processor time {median(busy):.2f}x ({busy[0]:.2f} to {busy[-1]:.2f})" if on_cpu else "")


if __name__ == "__main__":
    main()
