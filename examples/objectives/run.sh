#!/usr/bin/env bash
# Ways to train and to sample, on sketches that the prompt determines and on sketches that it leaves open: the tables
# and contact sheets of examples/objectives/README.md.
#   ./examples/objectives/run.sh                    # all; hours on two cores
#   DATA=ambiguous METHODS="regression teacher-forcing" ./examples/objectives/run.sh
# Further arguments are flags of the training scripts. After an interruption run the same command again.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/objectives}"
DATA="${DATA:-sketch ambiguous}"
METHODS="${METHODS:-regression l1 huber velocity bell lower-levels diffusion-forcing min-snr teacher-forcing augmented ode}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-200}"
NUM_INFERENCE_STEPS="${NUM_INFERENCE_STEPS:-24}"
NUM_TRAJECTORIES="${NUM_TRAJECTORIES:-120}" # in all, several counts one after another
DATASET_FLAGS="${DATASET_FLAGS:-}" # of examples/sketch/make_dataset.py
export ACCELERATE_USE_CPU="${ACCELERATE_USE_CPU:-true}"

launch() { # a script, on the clips of a data set
    accelerate launch --config_file "${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}" \
        --num_processes "${NPROC_PER_NODE:-1}" --main_process_port 0 "$1" --config examples/objectives/recipe.yaml \
        --dataset_base_path "$folder/data/videos" --metadata_path "$folder/data/train.csv" "${@:2}"
}

train() { # script, method, flags
    echo "=== $data: $2"
    launch "$1" --output_dir "$folder/$2" --validation_metadata_path "$folder/data/heldout.csv" \
        --validation_steps 50 --latents_dir "$folder/latents" --cache_latents True \
        --max_train_steps "$MAX_TRAIN_STEPS" --resume_from_checkpoint latest "${@:3}"
}

sample() { # run, steps, sampler, flags of generate.py
    local videos="$folder/samples/$1-$2-$3"
    python generate.py --checkpoint "$folder/$1" --prompts_file "$folder/data/heldout.csv" --output "$videos" \
        --sampler "$3" "${@:4}"
    samples+=("$1, $3:$2=$videos")
}

sample_list() { # run, steps of its list
    for sampler in renoise euler; do sample "$1" "$2" "$sampler"; done
}

sample_flow() { # run, numbers of steps along the flow
    for steps in "${@:2}"; do sample "$1" "$steps" euler --num_inference_steps "$steps" --timestep_shift 5; done
}

many=(--num_inference_steps "$NUM_INFERENCE_STEPS")
continuous=(--timestep_sampling logit_normal --loss_space velocity "${many[@]}")

for data in $DATA; do
    folder="$OUTPUT_DIR/$data" samples=()
    flags=(--kinds bird,umbrella)
    if [ "$data" = ambiguous ]; then flags=(--ambiguous); fi
    # shellcheck disable=SC2086
    [ -f "$folder/data/heldout.csv" ] ||
        python examples/sketch/make_dataset.py --output_dir "$folder/data" "${flags[@]}" $DATASET_FLAGS
    for method in $METHODS; do
        case "$method" in
        regression)
            train train_video_regression.py "$method" "$@"
            sample_list "$method" 3
            sample_flow "$method" "$NUM_INFERENCE_STEPS"
            ;;
        l1 | huber)
            train train_video_regression.py "$method" --loss_type "$method" "$@"
            sample_list "$method" 3
            ;;
        velocity)
            train train_video_regression.py "$method" --loss_space velocity "$@"
            sample_list "$method" 3
            ;;
        bell)
            train train_video_regression.py "$method" --loss_space velocity --loss_weighting bell "$@"
            sample_list "$method" 3
            ;;
        lower-levels)
            train train_video_regression.py "$method" --denoising_step_list 1000 757 522 250 100 0 "$@"
            sample_list "$method" 5
            ;;
        diffusion-forcing)
            train train_video_regression.py "$method" "${continuous[@]}" --clean_block_probability 0.25 "$@"
            sample_flow "$method" 3 "$NUM_INFERENCE_STEPS"
            ;;
        min-snr) # diffusion forcing, weighted
            train train_video_regression.py "$method" "${continuous[@]}" --clean_block_probability 0.25 \
                --loss_weighting min_snr "$@"
            sample_flow "$method" 3 "$NUM_INFERENCE_STEPS"
            ;;
        teacher-forcing)
            train train_video_regression.py "$method" "${continuous[@]}" --context clean "$@"
            sample "$method" 3 renoise --denoising_step_list 1000 757 522
            sample_flow "$method" 1 2 3 6 12 "$NUM_INFERENCE_STEPS"
            ;;
        augmented) # teacher forcing, with noise on the context
            train train_video_regression.py "$method" "${continuous[@]}" --context augmented "$@"
            sample_flow "$method" 3 "$NUM_INFERENCE_STEPS"
            ;;
        ode) # of the teacher that teacher-forcing makes
            prompts=$(python -c "import csv, sys; print(len({r['prompt'] for r in csv.DictReader(open(sys.argv[1]))}))" \
                "$folder/data/train.csv")
            for count in $NUM_TRAJECTORIES; do
                launch precompute_trajectories.py --teacher "$folder/teacher-forcing" --guidance_scale 1 \
                    --trajectories_dir "$folder/trajectories-$count" "${many[@]}" --timestep_shift 5 \
                    --sample_batch_size 4 --num_trajectories_per_prompt $(((count + prompts - 1) / prompts))
                train train_ode_regression.py "ode-$count" --generator_ckpt "$folder/teacher-forcing" \
                    --trajectories_dir "$folder/trajectories-$count" --context clean "$@"
                sample_list "ode-$count" 3
            done
            ;;
        *)
            echo "there is no method $method; see the head of this file" >&2
            exit 2
            ;;
        esac
    done
    limit=()
    if [ -d "$folder/regression" ]; then limit=(--run "$folder/regression"); fi
    python examples/sketch/compare.py --data_dir "$folder/data" --output_dir "$folder" --samples "${samples[@]}" \
        --vae examples/sketch/tiny-wan "${limit[@]}"
done
