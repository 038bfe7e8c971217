#!/usr/bin/env bash
# Starts Moonlight's scaling-law study (arXiv 2502.16982, figure 3) on the 8 GPUs of this node; not run by this project.
#
#   bash examples/scaling_law/moonlight.sh CORPUS OUT
#
# CORPUS holds `train` and `valid`, Megatron indexed datasets of a tokenizer with 163,840 tokens (tools/preprocess_data.py), and a
# corpus.json that describes them. One run after the other takes the whole node; call it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
python examples/scaling_law run --ladder moonlight.yaml --corpus "$1" --out "$2" --side-by-side 1
for command in fit plot report; do
    python examples/scaling_law "$command" --ladder moonlight.yaml --out "$2"
done
