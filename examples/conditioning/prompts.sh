#!/usr/bin/env bash
# Prompts along the video, on sketches whose colour changes while they are drawn: the table and the contact sheet of
# examples/conditioning/README.md.
#   ./examples/conditioning/prompts.sh              # three seeds; a training takes about ten minutes
#   SEEDS=0 STUDENTS="schedules plain" ./examples/conditioning/prompts.sh
# Trains students on clips with a prompt_schedule, or, as `plain`, on the same drawings without a change. Each is given
# the held-out schedules, with and without recache, the first prompt alone, and a wrong second colour.
# Further arguments are flags of the training script. After an interruption run the same command again.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/prompts}"
SEEDS="${SEEDS:-0 1 2}"
STUDENTS="${STUDENTS:-schedules}" # and plain
DATASET_FLAGS="${DATASET_FLAGS:-}" # of prompts_dataset.py
export ACCELERATE_USE_CPU="${ACCELERATE_USE_CPU:-true}"
data="$OUTPUT_DIR/data" samples=()

# shellcheck disable=SC2086
[ -f "$data/wrong.csv" ] || python examples/conditioning/prompts_dataset.py --output_dir "$data" $DATASET_FLAGS

train() { # table, run, seed, flags
    accelerate launch --config_file "${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}" \
        --num_processes "${NPROC_PER_NODE:-1}" --main_process_port 0 train_video_regression.py \
        --config examples/conditioning/prompts.yaml --dataset_base_path "$data/videos" --metadata_path "$data/$1.csv" \
        --latents_dir "$OUTPUT_DIR/latents" --output_dir "$OUTPUT_DIR/$2-$3" --seed "$3" \
        --resume_from_checkpoint latest "${@:4}"
}

sample() { # run, seed, table, name, flags of generate.py
    local videos="$OUTPUT_DIR/samples/$1-$2-$4"
    python generate.py --checkpoint "$OUTPUT_DIR/$1-$2" --prompts_file "$data/$3.csv" --output "$videos" "${@:5}"
    samples+=("$1, $4=$videos")
}

for seed in $SEEDS; do
    for run in $STUDENTS; do
        table=train
        if [ "$run" = plain ]; then table=plain; fi
        train "$table" "$run" "$seed" "$@"
        sample "$run" "$seed" heldout switch
        sample "$run" "$seed" heldout recache --recache
        sample "$run" "$seed" without "no switch"
        sample "$run" "$seed" wrong "wrong switch"
    done
done
python examples/conditioning/prompts_figures.py --data_dir "$data" --output_dir "$OUTPUT_DIR" --samples "${samples[@]}"
