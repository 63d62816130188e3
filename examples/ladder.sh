#!/usr/bin/env bash
# From clips to a sharp few-step generator, rung by rung, on the tiny model; after each rung the table of all so far.
#   ./examples/ladder.sh
#   OUTPUT_DIR=outputs/ladder MAX_TRAIN_STEPS=1000 NPROC_PER_NODE=4 ./examples/ladder.sh --learning_rate 1e-3
# 1. video regression in few steps: what prompt and past leave open is blurred
# 2. continuous levels with teacher forcing, sampled in many steps: sharp and slow
# 3. ODE pairs of that teacher, sampled block by block
# 4. a student of the pairs in few steps
# 5. a bidirectional teacher, which sees all of a clip at once
# 6. distribution matching: the student's own clips become like this teacher's
# Further arguments are flags of the training scripts. After an interruption run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/ladder}"
CONFIG_PATH="${CONFIG_PATH:-examples/objectives/recipe.yaml}"
NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-300}" # of each rung
NUM_INFERENCE_STEPS="${NUM_INFERENCE_STEPS:-50}" # of the teacher
TIMESTEP_SHIFT="${TIMESTEP_SHIFT:-5}"
GUIDANCE_SCALE="${GUIDANCE_SCALE:-1}" # above 1 add --caption_dropout 0.1
TEACHER_GUIDANCE_SCALE="${TEACHER_GUIDANCE_SCALE:-1}" # in distribution matching
NUM_TRAJECTORIES_PER_PROMPT="${NUM_TRAJECTORIES_PER_PROMPT:-24}"
MATCHING_STEPS="${MATCHING_STEPS:-120}" # of distribution matching
MATCHING_FLAGS="${MATCHING_FLAGS:---learning_rate 1e-4 --critic_learning_rate 4e-4 --student_every 3}"
DATASET_FLAGS="${DATASET_FLAGS:-}" # of examples/sketch/make_dataset.py, beside --ambiguous
DATA="$OUTPUT_DIR/data"
if [ "$NPROC_PER_NODE" -gt 1 ]; then
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/cpu_ddp.yaml}"
else
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}"
fi
case "$ACCELERATE_CONFIG" in *cpu*) export ACCELERATE_USE_CPU=true ;; esac

run() { # a script of the repository, on the ladder's clips
    accelerate launch --config_file "$ACCELERATE_CONFIG" --num_processes "$NPROC_PER_NODE" --main_process_port 0 \
        "$1" --config "$CONFIG_PATH" --dataset_base_path "$DATA/videos" --metadata_path "$DATA/train.csv" "${@:2}"
}

train() { # script, name of the run, flags
    echo "=== $2"
    run "$1" --output_dir "$OUTPUT_DIR/$2" --validation_metadata_path "$DATA/heldout.csv" \
        --latents_dir "$OUTPUT_DIR/latents" --max_train_steps "$MAX_TRAIN_STEPS" --resume_from_checkpoint latest "${@:3}"
}

SAMPLES=()
sample() { # name of the run, steps, sampler, flags of generate.py
    python generate.py --checkpoint "$OUTPUT_DIR/$1" --prompts_file "$DATA/heldout.csv" \
        --output "$OUTPUT_DIR/samples/$1-$2-$3" --sampler "$3" "${@:4}"
    SAMPLES+=("$1, $3:$2=$OUTPUT_DIR/samples/$1-$2-$3")
}

compare() {
    python examples/sketch/compare.py --data_dir "$DATA" --output_dir "$OUTPUT_DIR" --samples "${SAMPLES[@]}"
}

STEPS=(--num_inference_steps "$NUM_INFERENCE_STEPS" --timestep_shift "$TIMESTEP_SHIFT")

# shellcheck disable=SC2086
[ -f "$DATA/heldout.csv" ] || python examples/sketch/make_dataset.py --ambiguous --output_dir "$DATA" $DATASET_FLAGS

train train_video_regression.py video-regression "$@"
sample video-regression 3 renoise
compare

train train_video_regression.py teacher --timestep_sampling logit_normal --loss_space velocity --context clean \
    "${STEPS[@]}" "$@"
for number in 3 "$NUM_INFERENCE_STEPS"; do
    sample teacher "$number" euler --num_inference_steps "$number" --timestep_shift "$TIMESTEP_SHIFT" \
        --guidance_scale "$GUIDANCE_SCALE"
done
compare

echo "=== trajectories"
run precompute_trajectories.py --teacher "$OUTPUT_DIR/teacher" --trajectories_dir "$OUTPUT_DIR/trajectories" \
    "${STEPS[@]}" --guidance_scale "$GUIDANCE_SCALE" --num_trajectories_per_prompt "$NUM_TRAJECTORIES_PER_PROMPT" \
    --sample_batch_size 4

train train_ode_regression.py student --generator_ckpt "$OUTPUT_DIR/teacher" \
    --trajectories_dir "$OUTPUT_DIR/trajectories" --context clean "$@"
for sampler in renoise euler; do sample student 3 "$sampler"; done
compare

train train_video_regression.py bidirectional --generator_task bidirectional_video --timestep_sampling logit_normal \
    --loss_space velocity --caption_dropout 0.1 "${STEPS[@]}" "$@"
sample bidirectional "$NUM_INFERENCE_STEPS" euler
compare

# shellcheck disable=SC2086
train train_dmd.py matched --generator_ckpt "$OUTPUT_DIR/student" --teacher "$OUTPUT_DIR/bidirectional" \
    --teacher_guidance_scale "$TEACHER_GUIDANCE_SCALE" --critic_warmup_steps 20 "$@" $MATCHING_FLAGS \
    --max_train_steps "$MATCHING_STEPS"
for sampler in renoise euler; do sample matched 3 "$sampler"; done
compare
