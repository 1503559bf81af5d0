#!/bin/bash
#SBATCH --job-name=opd-qwen3
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Trains a Qwen3 student on many nodes, from the newest checkpoint of its run directory where there is one.
#
#   sbatch slurm/train_qwen3.sh                                   2 nodes x 8 GPUs
#   sbatch --nodes=16 slurm/train_qwen3.sh train.steps=500        any config key as an override
#   RUN_DIR=/scratch/me/run1 sbatch slurm/train_qwen3.sh          paths by environment variables:
#
# MODELS        directory of the two models                                $HOME/models
# STUDENT       Hugging Face directory, or one made by convert_qwen3.sh    $MODELS/Qwen3-4B
# TEACHER       the same for the teacher                                   $MODELS/Qwen3-8B
# PROMPTS       DAPO-Math prompts, .jsonl or .parquet                      $HOME/data/dapo-math-17k.parquet
# RUN_DIR       metrics, logs and checkpoints; must be on a file system that all nodes share
#                                                                          $HOME/runs/qwen3-4b-from-8b
# CONFIG        recipe with all hyperparameters                            examples/qwen3/recipe.yaml
# PYTHON        interpreter with megatron_opd installed                    .venv/bin/python, in a container python3
# CONTAINER_IMAGE, CONTAINER_MOUNTS   run in a container (pyxis if srun has it, else apptainer); mounts as /a:/a,/b:/b
# VLLM_NODES=k  the last k nodes of the job run vLLM servers instead of training (0: engines inside the training ranks)
# VLLM_TENSOR   GPUs of one server                                         1
# PREFLIGHT=0   skip the check of the nodes. Its limits, which it names when a node breaks one:
#   MIN_GBPS          all-reduce of two nodes in GB/s                      1 with GPUs, 0.05 without
#   MIN_SHARE         the same, as a share of the fastest pair             0.25
#   MIN_FREE_GB       room for a checkpoint in RUN_DIR, GiB                eight times the size of STUDENT
#   MAX_SKEW_S, PREFLIGHT_WAIT_S   clocks; how long nodes are waited for   2, 60
# NODE_WAIT_S   how long a failed job waits for a node that does not answer before it requeues itself: 900
# MAX_FAILURES  crashes in a row without a new checkpoint after which the job is not requeued any more: 3
#
# At the time limit (five minutes' notice), on preemption and after a crash the job checkpoints where it can, requeues itself
# and goes on. `scancel --batch --signal=USR2 JOB` makes it save and end. See docs/cluster.md.
set -uo pipefail

# ---- paths
export MODELS=${MODELS:-$HOME/models}
export STUDENT=${STUDENT:-$MODELS/Qwen3-4B}
export TEACHER=${TEACHER:-$MODELS/Qwen3-8B}
export PROMPTS=${PROMPTS:-$HOME/data/dapo-math-17k.parquet}
export RUN_DIR=${RUN_DIR:-$HOME/runs/qwen3-4b-from-8b}

# ---- NCCL and InfiniBand: what a site may have to change
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-0}                 # 1: no InfiniBand, TCP only
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}                # ride out link flaps of some seconds
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3             # which adapters, if not all
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0     # else: the interface that reaches the first node
# export NCCL_IB_GID_INDEX=3                                 # RoCE
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}     # flight recorder, dumped on a timeout
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}          # Megatron-Core: tensor parallelism needs it

# ---- run
REPO=${REPO:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
[[ -f $REPO/slurm/lib.sh ]] || { echo "no slurm/lib.sh in $REPO: submit from the repository, or set REPO" >&2; exit 2; }
source "$REPO/slurm/lib.sh"
CONFIG=${CONFIG:-$REPO/examples/qwen3/recipe.yaml}

prepare "$@"            # logs, node lists, container
preflight               # names a bad node and stops
start_servers           # only with VLLM_NODES
run_training            # torchrun on every node; returns its exit code in CODE
finish                  # done, requeue, or stop
