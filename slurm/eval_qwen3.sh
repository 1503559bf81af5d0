#!/bin/bash
#SBATCH --job-name=opd-qwen3-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Evaluates a checkpoint; an interrupted evaluation goes on from the responses that it has.
#
#   sbatch slurm/eval_qwen3.sh                                    the newest checkpoint of RUN_DIR
#   CHECKPOINT=DIR sbatch --nodes=4 slurm/eval_qwen3.sh           a Hugging Face, converted or run checkpoint
#   sbatch slurm/eval_qwen3.sh 'eval.sets=[{name: aime24, prompts: FILE}]'
#
# CHECKPOINT    what to evaluate                                           newest RUN_DIR/checkpoints/step_*
# EVAL_DATA     aime24.parquet, aime25.parquet, amc23.parquet              $HOME/data/eval
# CONFIG        data sets and sampling                                     examples/qwen3/eval.yaml
# MODELS, STUDENT, TEACHER, PROMPTS, RUN_DIR, PYTHON, CONTAINER_IMAGE, CONTAINER_MOUNTS, PREFLIGHT: see train_qwen3.sh
set -uo pipefail

export MODELS=${MODELS:-$HOME/models}
export STUDENT=${STUDENT:-$MODELS/Qwen3-4B}
export TEACHER=${TEACHER:-$MODELS/Qwen3-8B}
export PROMPTS=${PROMPTS:-$HOME/data/dapo-math-17k.parquet}
export RUN_DIR=${RUN_DIR:-$HOME/runs/qwen3-4b-from-8b}
export EVAL_DATA=${EVAL_DATA:-$HOME/data/eval}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

REPO=${REPO:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
[[ -f $REPO/slurm/lib.sh ]] || { echo "no slurm/lib.sh in $REPO: submit from the repository, or set REPO" >&2; exit 2; }
source "$REPO/slurm/lib.sh"
CONFIG=${CONFIG:-$REPO/examples/qwen3/eval.yaml}

prepare "$@"
CHECKPOINT=${CHECKPOINT:-$(newest_checkpoint)}
[[ -e $CHECKPOINT ]] || stop 2 "no checkpoint in $RUN_DIR/checkpoints: set CHECKPOINT"
say "evaluating $CHECKPOINT"
MIN_FREE_GB=${MIN_FREE_GB:-1} preflight   # responses and numbers are all that it writes
run_command eval "$CONFIG" --checkpoint "$CHECKPOINT" "run_dir=$RUN_DIR" "${GIVEN[@]}"
finish
