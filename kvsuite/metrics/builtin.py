"""The metrics that kvsuite defines: what a number is called, which way is better, how it comes about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricClass = Literal["deterministic", "near_deterministic", "timed", "ambient"]
Better = Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Metric:
    """Definition of one number.

    Parameters
    ----------
    name
        Field name; the unit is its suffix (``_s``, ``_bytes``, ``_tok_s``) where it has one.
    unit
        Unit as text, ``"1"`` for a pure number.
    better
        Direction, ``"none"`` for a fact without one.
    metric_class
        ``deterministic`` (bytes, counts), ``near_deterministic`` (perplexity, allocator peaks), ``timed``, ``ambient``.
    formula
        How the number is computed, in words a reader can check.
    version
        Raised when the formula changes; numbers of different versions are not compared.
    """

    name: str
    unit: str
    better: Better
    metric_class: MetricClass
    formula: str
    version: int = 1


_T: MetricClass = "timed"
_D: MetricClass = "deterministic"
_N: MetricClass = "near_deterministic"
_A: MetricClass = "ambient"

BUILTIN: tuple[Metric, ...] = (
    Metric("ttft_s", "s", "lower", _T, "t1 - t0: prefill, cache compression of the prompt, first sampled token"),
    Metric("e2e_s", "s", "lower", _T, "tn - t0"),
    Metric("tpot_s", "s", "lower", _T, "(e2e_s - ttft_s) / (n - 1)"),
    Metric("itl_s", "s", "lower", _T, "t(k+1) - t(k), raw gaps pooled over rounds (pooled_tokens)"),
    Metric(
        "prefill_s",
        "s",
        "lower",
        _T,
        "prompt forward, t0 to logits; holds compress_s where a method compresses inside the forward",
    ),
    Metric(
        "compress_s",
        "s",
        "lower",
        _T,
        "time spent selecting and copying the prompt's cache, measured in the separate instrumented pass",
    ),
    Metric(
        "evict_s",
        "s",
        "lower",
        _T,
        "time per decode step spent selecting and evicting, measured in the separate instrumented pass",
    ),
    Metric("prefill_tok_s_computed", "tok/s", "higher", _T, "prompt tokens that went through the model / prefill_s"),
    Metric("prefill_tok_s_logical", "tok/s", "higher", _T, "prompt tokens / prefill_s"),
    Metric("decode_tok_s_req", "tok/s", "higher", _T, "1 / tpot_s of one request"),
    Metric("decode_tok_s_agg", "tok/s", "higher", _T, "sum(n_i - 1) / (max tn - min t1)"),
    Metric("output_tok_s", "tok/s", "higher", _T, "sum n_i / wall; includes TTFT, not a decode speed"),
    Metric("ttft_cached_s", "s", "lower", _T, "t1 - t0 of prompts that the prefix cache holds, served a second time"),
    Metric(
        "decode_step_s",
        "s",
        "lower",
        _T,
        "a decode step while all requests decode: (first tn - last t1) / tokens that each gets meanwhile",
    ),
    Metric("decode_tok_s_batch", "tok/s", "higher", _T, "tokens of all requests while all decode / that time"),
    Metric(
        "engine_ttft_s",
        "s",
        "lower",
        _T,
        "the server's own ttft_s, mean over the requests: prompt computed - request added",
    ),
    Metric("engine_tpot_s", "s", "lower", _T, "1 / the server's own decode_tokens_per_s, mean over the requests"),
    Metric("prefill_steps", "steps", "lower", _D, "steps of a round that fed prompts"),
    Metric("decode_batch", "sequences", "none", _D, "most sequences that a decode step of a round served"),
    Metric("first_step_s", "s", "lower", _T, "one token through an empty cache: what the original called TTFT"),
    Metric(
        "host_wait_share",
        "1",
        "none",
        _A,
        "share of the timed rounds' wall time that a thread of the process was ready to run and others had the CPU",
    ),
    Metric(
        "host_probe_s",
        "s",
        "none",
        _A,
        "a fixed loop of the interpreter (100,000 turns), ten right before and ten right after the timed rounds",
    ),
    Metric(
        "tpot_floor_s",
        "s",
        "none",
        _A,
        "(weights a step reads + mean cache bytes of the decode phase) / measured copy bandwidth: no step is faster",
    ),
    Metric(
        "perplexity", "1", "lower", _N, "exp(nll_sum / nll_tokens), natural log, log-softmax in float32, texts pooled"
    ),
    Metric("perplexity_se", "1", "none", _N, "perplexity * sqrt(var(nll) / (n - 1)); a lower bound, losses correlate"),
    Metric("nll_sum", "nat", "lower", _N, "sum of -log p(token) over the scored tokens"),
    Metric("nll_tokens", "tokens", "none", _D, "number of scored tokens"),
    Metric(
        "perplexity_full",
        "1",
        "lower",
        _N,
        "perplexity of the same tokens with the full cache: one teacher-forced forward",
    ),
    Metric("ppl_ratio", "1", "lower", _N, "exp(mean paired difference of nll against the full cache)"),
    Metric("ppl_ratio_se", "1", "none", _N, "ppl_ratio * standard error of the mean paired nll difference"),
    Metric("next_token_acc", "1", "higher", _N, "teacher-forced top-1 hits / scored tokens"),
    Metric(
        "ppl_original_formula",
        "1",
        "none",
        _N,
        "exp(sum over windows of mean nll * tokens added / N): the original program's, beside its published values only",
    ),
    Metric("word_perplexity", "1", "lower", _N, "exp(nll_sum / words), words between runs of white space"),
    Metric("byte_perplexity", "1", "lower", _N, "exp(nll_sum / UTF-8 bytes of the scored text)"),
    Metric("bits_per_byte", "bit", "lower", _N, "nll_sum / (UTF-8 bytes of the scored text * ln 2)"),
    Metric("kld", "nat", "lower", _N, "mean over scored tokens of sum_v P_ref(v) * (log P_ref(v) - log P(v)), float32"),
    Metric("kld_median", "nat", "lower", _N, "median over scored tokens of the divergence"),
    Metric("kld_p99", "nat", "lower", _N, "99th percentile over scored tokens, from 100 on"),
    Metric("kld_max", "nat", "lower", _N, "largest divergence of a scored token"),
    Metric("same_top1", "1", "higher", _N, "share of scored tokens where reference and case rank the same token first"),
    Metric("rms_delta_p", "1", "lower", _N, "root mean square of p(token) - p_ref(token), in [0, 1]"),
    Metric("mean_delta_p", "1", "higher", _N, "mean of p(token) - p_ref(token)"),
    Metric("perplexity_reference", "1", "lower", _N, "perplexity of the same tokens with the reference weights"),
    Metric("delta_perplexity", "1", "lower", _N, "perplexity - perplexity_reference"),
    Metric("ppl_ratio_reference", "1", "lower", _N, "exp(mean paired difference of nll against the reference weights)"),
    Metric(
        "ppl_ratio_reference_se",
        "1",
        "none",
        _N,
        "ppl_ratio_reference * standard error of the mean paired nll difference",
    ),
    Metric("score_s", "s", "lower", _T, "one pass over all windows of all texts, until the losses are on the host"),
    Metric("score_tok_s", "tok/s", "higher", _T, "scored tokens / score_s"),
    Metric(
        "mem_predicted_weights_bytes", "bytes", "lower", _D, "closed form of the weight format over the model's shapes"
    ),
    Metric("bits_per_weight", "bit", "lower", _D, "8 * mem_weights_bytes / parameters, embeddings in, tied ones once"),
    Metric(
        "bits_per_weight_without_embeddings",
        "bit",
        "lower",
        _D,
        "the same without the input embedding and a final layer that shares its table",
    ),
    Metric("kv_bytes_exact", "bytes", "lower", _D, "sum of the distinct live cache storages at the end of decode"),
    Metric(
        "kv_bytes_exact_prefill", "bytes", "lower", _D, "sum of the distinct live cache storages at the end of prefill"
    ),
    Metric(
        "mem_predicted_kv_bytes",
        "bytes",
        "lower",
        _D,
        "sum over layers of 2 * kv_heads * head_dim * bytes * kept tokens",
    ),
    Metric("cache_tokens_mean", "tokens", "lower", _D, "mean over layers of the cached tokens at the end of decode"),
    Metric("cache_tokens_min", "tokens", "lower", _D, "fewest cached tokens of a layer at the end of decode"),
    Metric("cache_tokens_max", "tokens", "lower", _D, "most cached tokens of a layer at the end of decode"),
    Metric("ratio_requested", "1", "none", _D, "fraction of the prompt's cache a method was asked to remove"),
    Metric(
        "ratio_effective",
        "1",
        "higher",
        _D,
        "1 - cache bytes of the method / cache bytes of the full cache, end of prefill",
    ),
    Metric("mem_weights_bytes", "bytes", "lower", _D, "sum of the distinct parameter and buffer storages"),
    Metric("mem_measured_before_bytes", "bytes", "none", _N, "allocated right before the prefill phase"),
    Metric("mem_measured_prefill_peak_bytes", "bytes", "lower", _N, "peak allocated in the prefill phase"),
    Metric("mem_measured_decode_peak_bytes", "bytes", "lower", _N, "peak allocated in the decode phase"),
    Metric("mem_measured_peak_bytes", "bytes", "lower", _N, "larger of the prefill and the decode allocated peaks"),
    Metric("mem_measured_dynamic_bytes", "bytes", "lower", _N, "mem_measured_peak_bytes - mem_measured_before_bytes"),
    Metric("mem_measured_reserved_bytes", "bytes", "none", _A, "peak reserved by torch's caching allocator"),
    Metric("mem_measured_driver_bytes", "bytes", "none", _A, "peak of NVML used memory, sampled in another process"),
    Metric("mem_measured_rss_peak_bytes", "bytes", "none", _A, "peak resident set of the process over the memory pass"),
)
