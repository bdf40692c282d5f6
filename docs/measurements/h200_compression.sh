#!/usr/bin/env bash
# The compression suite on a datacentre GPU: one prompt length a call, so that each fits a short lease.
# usage: h200_compression.sh PROMPT_TOKENS OUT [more pytest options]
set -euo pipefail
prompt=$1 out=$2
shift 2
python3 -m pytest -p kvsuite.plugin benchmarks -q -p no:cacheprovider -p no:benchmark \
    --kv-model=dummy:Llama-3-8B --kv-device=cuda:0 --kv-dtype=bfloat16 \
    --kv-method=streaming_llm,fix_size_l2,kvpress:SnapKV,kvpress:ExpectedAttention \
    --kv-recent-sizes=1020 --kv-fix-kv-sizes=1024 --kv-keep-ratios=0.5 \
    --kv-prompt-tokens="$prompt" --kv-max-new-tokens=64 --kv-rounds=7 --kv-num-warmup=2 \
    --kv-report-dir="$out" "$@"
