#!/bin/bash
#SBATCH --job-name=opd-qwen3-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%x-%j.out
# Imports the Hugging Face directories of student and teacher into the converted format that every layout loads. Works on
# CPUs; no GPU is needed. The converted directories then serve as STUDENT and TEACHER of train_qwen3.sh.
#
#   sbatch slurm/convert_qwen3.sh
#   sbatch --mem=200G slurm/convert_qwen3.sh --dtype bf16         options go to `tools/convert.py import`
#
# MODELS        directory of the models                                    $HOME/models
# SOURCES       Hugging Face directories, separated by blanks              $MODELS/Qwen3-4B $MODELS/Qwen3-8B
# DESTINATION   where DESTINATION/NAME is written                          $MODELS/converted
# VERIFY=1      also compare the logits of both formats (a second pass over each model)
# PYTHON        interpreter with megatron_opd installed                    .venv/bin/python
set -euo pipefail

MODELS=${MODELS:-$HOME/models}
SOURCES=${SOURCES:-$MODELS/Qwen3-4B $MODELS/Qwen3-8B}
DESTINATION=${DESTINATION:-$MODELS/converted}

if [[ -n ${CONTAINER_IMAGE:-} ]]; then
  echo "convert_qwen3.sh runs on the node itself, and CONTAINER_IMAGE is set: unset it, or run tools/convert.py inside" >&2
  exit 2
fi
REPO=${REPO:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
if [[ -z ${PYTHON:-} ]]; then PYTHON=$REPO/.venv/bin/python; [[ -x $PYTHON ]] || PYTHON=python3; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}
for source in $SOURCES; do
  out=$DESTINATION/$(basename "$source")
  if [[ -e $out/megatron_opd.json ]]; then echo "$out is there already"; continue; fi
  mkdir -p "$DESTINATION"
  echo "$source -> $out"
  "$PYTHON" "$REPO/tools/convert.py" import --hf "$source" --out "$out" "$@"
  if [[ ${VERIFY:-0} == 1 ]]; then "$PYTHON" "$REPO/tools/convert.py" verify --hf "$source" --megatron "$out"; fi
done
