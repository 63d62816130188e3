#!/usr/bin/env bash
# A first picture and a control video, on sketches that the prompt leaves open: the tables and contact sheets of
# examples/conditioning/README.md. The prompt names colour, line and proportion; what is drawn, how large and where is
# anyone's guess, and the condition says it.
#   ./examples/conditioning/run.sh                                     # all; a quarter of an hour a training on two cores
#   CONDITIONS=control SEEDS=0 ./examples/conditioning/run.sh          # one of them
# Further arguments are flags of the training script. After an interruption run the same command again.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/conditioning}"
CONDITIONS="${CONDITIONS:-picture control}"
SEEDS="${SEEDS:-0 1 2}"
PROCESSES="${PROCESSES:-2}"
CONTROL="${CONTROL:-outline}" # or pen
DATASET_FLAGS="${DATASET_FLAGS:-}" # of examples/sketch/make_dataset.py
export ACCELERATE_USE_CPU="${ACCELERATE_USE_CPU:-true}"

for condition in $CONDITIONS; do
    folder="$OUTPUT_DIR/$condition" runs=()
    if [ "$condition" = picture ]; then
        data=(--drawn_at_start 0.4) # the first frame shows what it is going to be
        train=(--first_frame_probability 0.5)
    else
        data=(--controls outline,pen)
        train=(--control_column "$CONTROL" --control_dropout 0.1)
    fi
    # shellcheck disable=SC2086
    [ -f "$folder/data/targets.csv" ] ||
        python examples/sketch/make_dataset.py --output_dir "$folder/data" --ambiguous "${data[@]}" $DATASET_FLAGS
    python examples/conditioning/tables.py --data_dir "$folder/data" --condition "$condition" --control "$CONTROL"
    for seed in $SEEDS; do
        run="$folder/seed-$seed"
        echo "=== $condition, seed $seed"
        accelerate launch --config_file accelerate_configs/cpu_ddp.yaml --num_processes "$PROCESSES" \
            --main_process_port 0 train_video_regression.py --config examples/sketch/recipe.yaml \
            --train_batch_size $((8 / PROCESSES)) --dataset_base_path "$folder/data/videos" \
            --metadata_path "$folder/data/train.csv" --validation_metadata_path "$folder/data/heldout.csv" \
            --latents_dir "$folder/latents" --cache_latents True --seed "$seed" --output_dir "$run" \
            --resume_from_checkpoint latest "${train[@]}" "$@"
        for given in own wrong none; do
            python generate.py --checkpoint "$run" --prompts_file "$folder/data/$given.csv" \
                --dataset_base_path "$folder/data/videos" --output "$run/$given"
        done
        runs+=("$run")
    done
    python examples/conditioning/compare.py --data_dir "$folder/data" --runs "${runs[@]}" \
        --output "examples/conditioning/$condition"
done
