#!/usr/bin/env bash
# Two machines of eight GPUs under SLURM: sbatch examples/slurm.sh --config examples/wan_14b_lora.yaml ...
# Three minutes before the time is up the run writes a checkpoint; the job goes back to the queue and continues from it.
#SBATCH --job-name=causal-wan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail

# Only the training processes understand the signal: it would end their launcher.
stop() { srun --overlap --ntasks-per-node=1 pkill -USR1 --full 'python[0-9.]* -u train_video_regression.py'; }
stopped=false
trap 'stopped=true; stop' USR1 TERM

main_process_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file accelerate_configs/fsdp2_multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 8))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$0" \
    train_video_regression.py --resume_from_checkpoint latest "$@"' "$main_process_ip" "$@" &
training=$!
wait "$training"
if $stopped; then
    wait "$training" # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
