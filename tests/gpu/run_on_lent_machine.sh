#!/usr/bin/env bash
# GPU tests and benchmarks on a Hopper machine that has no network: Python 3.12, torch 2.11 for CUDA 13, transformers.
#
#   tests/gpu/run_on_lent_machine.sh bundle     where there is a package registry, no GPU needed, about 15 minutes:
#       te_on_gpu.sh builds Transformer Engine, with Megatron-Core and mbridge beside it, into .gpu/, which git ignores.
#       Bring .gpu/ along to the GPU machine.
#   tests/gpu/run_on_lent_machine.sh WHAT...             there, from the repository:
#       install   unpacks the bundle into .gpu/site and checks FP8 against bf16: always the first thing to run
#       test      tests/gpu
#       kernels memory train score steps fp8    parts of `tools/benchmark.py gpu`, which collect in one file
#
# In three calls of at most ten minutes:  install test kernels memory  /  train  /  score steps fp8
# Reports go to $OUT where that is set, else to runs/benchmark; what runs/benchmark/gpu.json has already is kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
export SITE=$PWD/.gpu/site PYTHONUNBUFFERED=1
out=${OUT:-runs/benchmark}

if [ "${1:?install, test, a part of the benchmark, or bundle}" = bundle ]; then
  exec bash tests/gpu/te_on_gpu.sh build .gpu
fi

install() {
  [ -e .gpu/part1/te_on_gpu.sh ] || { echo "no bundle in .gpu/: make it with 'bundle' and bring it along" >&2; exit 1; }
  bash .gpu/part1/te_on_gpu.sh install .gpu
}

[ -e "$SITE/te_env.sh" ] || [ "$1" = install ] || CHECK=0 install
code=0
for what in "$@"; do
  echo "== $what"
  case $what in
    install) install ;;
    test)
      . "$SITE/te_env.sh"
      python3 -m pytest tests/gpu -m gpu -v || code=1 ;;
    *)
      . "$SITE/te_env.sh"
      mkdir -p "$out"
      [ -e "$out/gpu.json" ] || [ ! -e runs/benchmark/gpu.json ] || cp runs/benchmark/gpu.json "$out/gpu.json"
      python3 tools/benchmark.py gpu --part "$what" --json "$out/gpu.json" || code=1 ;;
  esac
done
exit $code
