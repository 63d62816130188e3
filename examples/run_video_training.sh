#!/usr/bin/env bash
# Video regression on the GPUs of one machine.
#   NPROC_PER_NODE=4 ./examples/run_video_training.sh
#   CONFIG_PATH=path/to/your/config.yaml NPROC_PER_NODE=2 ./examples/run_video_training.sh --learning_rate 2e-6
# Further arguments are flags of train_video_regression.py and override the recipe.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG_PATH="${CONFIG_PATH:-examples/wan_1.3b_full.yaml}"
NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
if [ "$NPROC_PER_NODE" -gt 1 ]; then
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/ddp.yaml}"
else
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/single_gpu.yaml}"
fi

exec accelerate launch --config_file "$ACCELERATE_CONFIG" --num_processes "$NPROC_PER_NODE" \
    train_video_regression.py --config "$CONFIG_PATH" "$@"
