#!/usr/bin/env bash
# A teacher of sketches whose prompt leaves the drawing open: trained, sampled, and compared with the model that it starts
# from; see examples/objectives/teacher/README.md.
#   ./examples/objectives/teacher.sh                                    # hours on two cores
#   TEACHER=outputs/my-teacher ./examples/objectives/teacher.sh         # measures one that is there
# Further arguments are flags of build_teacher.py.
# After an interruption run the same command again.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/teacher}"
TEACHER="${TEACHER:-$OUTPUT_DIR/result}"
NUM_INFERENCE_STEPS="${NUM_INFERENCE_STEPS:-24}"
SEEDS="${SEEDS:-0 1 2}"
GUIDANCE_SCALES="${GUIDANCE_SCALES:-1 3}"
data="$OUTPUT_DIR/data" samples=()

[ -f "$data/heldout.csv" ] ||
    python examples/sketch/make_dataset.py --output_dir "$data" --ambiguous --num_targets 8
[ -d "$TEACHER/transformer" ] ||
    OMP_NUM_THREADS=1 torchrun --nproc_per_node "${NPROC_PER_NODE:-2}" examples/objectives/build_teacher.py \
        --output_dir "$TEACHER" --work_dir "$OUTPUT_DIR/work" "$@"

sample() { # name in the table, checkpoint, guidance, seed
    local videos="$OUTPUT_DIR/samples/$1-$3-$4"
    python generate.py --checkpoint "$2" --prompts_file "$data/heldout.csv" --output "$videos" --seed "$4" \
        --guidance_scale "$3" --num_inference_steps "$NUM_INFERENCE_STEPS" --sampler euler --timestep_shift 5 \
        --num_frames 81 --height 64 --width 112
    samples+=("$1, guidance $3:$NUM_INFERENCE_STEPS=$videos")
}

for seed in $SEEDS; do
    sample untrained examples/sketch/tiny-wan 1 "$seed"
    for scale in $GUIDANCE_SCALES; do sample teacher "$TEACHER" "$scale" "$seed"; done
done
python examples/sketch/compare.py --data_dir "$data" --output_dir "$OUTPUT_DIR" --samples "${samples[@]}" \
    --vae examples/sketch/tiny-wan
