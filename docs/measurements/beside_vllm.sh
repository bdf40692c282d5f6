#!/usr/bin/env bash
# vLLM and nano on one card, one after the other: the table of docs/measurements.md and docs/vllm.md. It was run part by part in
# three sittings (which part in which: docs/measurements.md). Run nothing beside it.
# usage: beside_vllm.sh OUT VLLM_PYTHON       (the interpreter that has vLLM; from the repository's root, kvsuite importable)
set -euo pipefail
out=${1:?usage: beside_vllm.sh OUT VLLM_PYTHON} vllm=${2:?usage: beside_vllm.sh OUT VLLM_PYTHON}
mkdir -p "$out"
points() { # ENGINE [OPTION]...
    python3 -m pytest benchmarks -q -p no:cacheprovider -p no:benchmark -k dse --kv-engine="$1" --kv-device=cuda:0 \
        --kv-model=dummy:Qwen3-8B --kv-quantization=none --kv-space="ctx=4096;chunk=16384;batch=64,32,16,8,4,1" \
        --kv-prompt-share=0.96875 --kv-max-new-tokens=64 --kv-cache-dtype=auto,fp8 --kv-rounds=1 --kv-num-warmup=1 \
        --kv-report-dir="$out/$1" "${@:2}"
}
steps() { PYTHONPATH=.:docs/measurements "$vllm" docs/measurements/vllm_steps.py "$@" | tee -a "$out/vllm_steps.txt"; }

python3 -m kvsuite doctor --prepare --kv-model dummy:Qwen3-8B
points nano
points vllm --kv-vllm-python="$vllm" --kv-vllm-max-capture-size=64
steps --points 128x3968,64x960
python3 docs/measurements/nano_serving.py points --out "$out"
steps --points mixed --preset Qwen3-0.6B
python3 docs/measurements/nano_serving.py mixed --out "$out"
python3 docs/measurements/engines_figure.py "$out/points.png" "$out"/nano/*/records.jsonl "$out"/vllm/*/records.jsonl
