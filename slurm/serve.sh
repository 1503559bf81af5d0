#!/bin/bash
# vLLM servers of one node: SERVERS_EACH of them, each on VLLM_TENSOR GPUs, ports from VLLM_PORT on. Started by lib.sh.
set -uo pipefail
python=$1 pids=()
max_batch=${VLLM_MAX_BATCH:-256} precision=${VLLM_PRECISION:-bf16}
for ((i = 0; i < SERVERS_EACH; i++)); do
  gpus=$(seq -s, $((i * VLLM_TENSOR)) $((i * VLLM_TENSOR + VLLM_TENSOR - 1)))
  CUDA_VISIBLE_DEVICES=$gpus "$python" -m megatron_opd.rollout.vllm.serve --model "$STUDENT" --host 0.0.0.0 \
    --port $((VLLM_PORT + i)) --tensor "$VLLM_TENSOR" --max-batch "$max_batch" --precision "$precision" \
    2>&1 | sed -u "s/^/[server $i]: /" &
  pids+=($!)
done
trap 'kill $(jobs -p) 2>/dev/null' TERM
trap '' USR1
wait "${pids[@]}"
