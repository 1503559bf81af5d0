# What the job scripts share; sourced, not run. Reads the variables that their heads list.
# shellcheck shell=bash

say() { echo "$(date +%FT%T) job ${SLURM_JOB_ID}.${RESTART}: $*"; }
stop() { local code=$1; shift; say "$*"; exit "$code"; }

RESTART=${SLURM_RESTART_COUNT:-0}
NOTICE=       # the signal that asked this job to end, if one did
CODE=1
REQUEUE_CODE=75 # megatron_opd/runtime/launch.py: asked to stop, has saved; run again

# RUN_DIR, GIVEN (the other words), LOG_DIR (of this start of the job), NODES, TRAIN_NODES, SERVER_NODES, PYTHON, IN (container prefix), SRUN
prepare() {
  local word
  GIVEN=()
  for word in "$@"; do if [[ $word == run_dir=* ]]; then RUN_DIR=${word#run_dir=}; else GIVEN+=("$word"); fi; done
  mkdir -p "$RUN_DIR/logs" || stop 2 "cannot write to RUN_DIR=$RUN_DIR"
  RUN_DIR=$(realpath "$RUN_DIR") CONFIG=$(realpath "$CONFIG")
  if [[ -n ${CHECKPOINT:-} ]]; then CHECKPOINT=$(realpath "$CHECKPOINT"); fi
  LOG_DIR=$RUN_DIR/logs/$SLURM_JOB_ID.$RESTART
  mkdir -p "$LOG_DIR/ranks" || stop 2 "cannot write to $LOG_DIR"
  mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  local servers=${VLLM_NODES:-0}
  (( servers < ${#NODES[@]} )) || stop 2 "VLLM_NODES=$servers leaves no node for training: the job has ${#NODES[@]}"
  TRAIN_NODES=("${NODES[@]:0:${#NODES[@]}-servers}")
  SERVER_NODES=("${NODES[@]:${#NODES[@]}-servers}")
  export FIRST_NODE=${TRAIN_NODES[0]} PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  # --wait bounds how long the others may go on when one node has ended; cpu-bind: torchrun's processes share the node
  SRUN=(srun --ntasks-per-node=1 --cpu-bind=none --wait="${EXIT_GRACE_S:=60}" --kill-on-bad-exit=0)
  export EXIT_GRACE_S
  IN=()
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    local mounts
    mounts=$(mounts)${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    PYTHON=${PYTHON:-python3}
    if srun --help | grep -- --container-image >/dev/null; then  # -q would end srun early, and fail under pipefail
      SRUN+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$REPO")
    elif command -v apptainer >/dev/null; then
      IN=(apptainer exec --nv --bind "$mounts" --pwd "$REPO" "$CONTAINER_IMAGE")
    else
      stop 2 "CONTAINER_IMAGE is set, but srun has no --container-image (pyxis) and there is no apptainer"
    fi
  fi
  if [[ -z ${PYTHON:-} ]]; then PYTHON=$REPO/.venv/bin/python; [[ -x $PYTHON ]] || PYTHON=python3; fi
  export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
  say "nodes ${TRAIN_NODES[*]}${SERVER_NODES[*]:+, vLLM servers on ${SERVER_NODES[*]}}; logs in $LOG_DIR"
  trap 'notice USR1' USR1   # --signal: five minutes to the time limit
  trap 'notice TERM' TERM   # preemption, scontrol requeue, scancel: Slurm tells the ranks itself
  trap 'notice USR2' USR2   # scancel --batch --signal=USR2: save and end
}

# What the container must see, at the same place: the repository, the run directory, models, data and config.
mounts() {
  local place all=
  for place in "$REPO" "$RUN_DIR" "${STUDENT:-}" "${TEACHER:-}" "$(dirname "${PROMPTS:-/}")" "${EVAL_DATA:-}" \
    "${CHECKPOINT:-}" "$(dirname "$CONFIG")"; do
    [[ -d $place && $place != / && ,$all, != *,"$place:$place",* ]] && all+=${all:+,}$place:$place
  done
  echo "$all"
}

# The ranks finish their step, save and end with REQUEUE_CODE.
notice() {
  NOTICE=$1
  if [[ -z ${TRAINING:-} ]]; then say "SIG$1"; return; fi
  say "SIG$1: the ranks finish their step and save"
  [[ $1 != TERM ]] && kill -USR1 "$TRAINING" 2>/dev/null
}

join() { local IFS=,; echo "$*"; }

# GiB that one checkpoint of STUDENT takes at most: weights of 2 bytes, and 12 more of Adam's two moments and fp32 weights.
one_checkpoint_gb() {
  local size
  size=$(du -sLm -- "${STUDENT:-}" 2>/dev/null | cut -f1)
  echo $(( ${size:-0} * 8 / 1024 + 1 ))
}

preflight() {
  [[ ${PREFLIGHT:-1} == 0 ]] && return
  say "preflight on ${NODES[*]}"
  "${SRUN[@]}" --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --label --output="$LOG_DIR/preflight.log" \
    "${IN[@]}" "$PYTHON" -m megatron_opd.runtime.preflight --nodes "$(join "${NODES[@]}")" --port "$((PORT + 10000))" \
    --directory "$RUN_DIR" --min-free-gb "${MIN_FREE_GB:-$(one_checkpoint_gb)}" ${MIN_GBPS:+--min-gbps "$MIN_GBPS"} \
    --min-share "${MIN_SHARE:-0.25}" --max-skew-s "${MAX_SKEW_S:-2}" --wait-s "${PREFLIGHT_WAIT_S:-60}" &
  TRAINING=$!
  wait_for "$TRAINING"
  TRAINING=
  sed -n "s/^[0-9 ]*: preflight/preflight/p" "$LOG_DIR/preflight.log"
  [[ $CODE == 0 ]] && return
  [[ -n $NOTICE ]] && finish
  stop 4 "preflight failed (see above, and $LOG_DIR/preflight.log): nothing was started. Submit again with --exclude=NODE," \
    "or with another limit"
}

# One server per VLLM_TENSOR GPUs (one per node without GPUs), on the last VLLM_NODES nodes.
start_servers() {
  SERVER_OVERRIDES=()
  (( ${#SERVER_NODES[@]} )) || return 0
  local gpus tensor=${VLLM_TENSOR:-1} base=${VLLM_PORT:-8100} each host i urls=()
  gpus=$(srun --nodes=1 --ntasks=1 --nodelist="${SERVER_NODES[0]}" bash -c 'nvidia-smi -L 2>/dev/null | wc -l')
  each=$(( gpus / tensor > 0 ? gpus / tensor : 1 ))
  for host in "${SERVER_NODES[@]}"; do
    for ((i = 0; i < each; i++)); do urls+=("\"http://$host:$((base + i))\""); done
  done
  export MEGATRON_OPD_VLLM_API_KEY=${MEGATRON_OPD_VLLM_API_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
  export SERVERS_EACH=$each VLLM_PORT=$base VLLM_TENSOR=$tensor
  "${SRUN[@]}" --nodes="${#SERVER_NODES[@]}" --ntasks="${#SERVER_NODES[@]}" \
    --nodelist="$(join "${SERVER_NODES[@]}")" --output="$LOG_DIR/vllm-%N.log" "${IN[@]}" bash "$REPO/slurm/serve.sh" "$PYTHON" &
  SERVERS=$!
  SERVER_OVERRIDES=(rollout.engine=vllm rollout.vllm.mode=server "rollout.vllm.servers=[$(join "${urls[@]}")]")
  (( gpus )) || SERVER_OVERRIDES+=("rollout.vllm.transfer_dir=$RUN_DIR/transfer")
  say "vLLM: ${urls[*]}"
}

run_training() {
  local own word words=()
  for own in "${SERVER_OVERRIDES[@]}"; do  # a key may be given once, and the user's word goes first
    for word in "${GIVEN[@]}"; do [[ ${word%%=*} == "${own%%=*}" ]] && continue 2; done
    words+=("$own")
  done
  run_command train "$CONFIG" "run_dir=$RUN_DIR" "${words[@]}" "${GIVEN[@]}"
}

run_command() {
  "${SRUN[@]}" --nodes="${#TRAIN_NODES[@]}" --ntasks="${#TRAIN_NODES[@]}" \
    --nodelist="$(join "${TRAIN_NODES[@]}")" --output="$LOG_DIR/%N.log" \
    "${IN[@]}" "$PYTHON" "$REPO/slurm/launch.py" --log-dir "$LOG_DIR" "$@" &
  TRAINING=$!
  # rank 0's progress, wherever rank 0 is
  touch "$LOG_DIR/${FIRST_NODE}.log"
  (cd "$LOG_DIR" && exec tail -q -n +1 -F --pid=$TRAINING "${TRAIN_NODES[@]/%/.log}" 2>/dev/null) |
    sed -un 's/^\[rank 0\]: //p' &
  local progress=$!
  [[ -n $NOTICE ]] && kill -USR1 "$TRAINING"
  wait_for "$TRAINING"
  TRAINING=
  wait "$progress" 2>/dev/null
  [[ -n ${SERVERS:-} ]] && kill "$SERVERS" 2>/dev/null
  return 0
}

# Waits for a process, also through signals; its exit code goes to CODE.
wait_for() {
  local code
  while :; do
    wait "$1"
    CODE=$?
    kill -0 "$1" 2>/dev/null || break
  done
  if (( CODE > 128 )); then  # perhaps the signal's, and not the process's own
    wait "$1" 2>/dev/null
    code=$?
    (( code == 127 )) || CODE=$code
  fi
}

newest_checkpoint() { find -H "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort | tail -n 1; }

# What went wrong, and where to read on: why each rank ended, the first one first, and what they said of it themselves.
explain() {
  local node
  for node in "${TRAIN_NODES[@]}"; do
    if [[ -s $LOG_DIR/$node.log ]]; then
      sed -n "s|^launch: \([0-9:]* rank .*\)|  \1 on $node|p" "$LOG_DIR/$node.log"
    else
      echo "  $node: no log: the node never started"
    fi
  done | sort | head -n 8
  for node in "${TRAIN_NODES[@]}"; do
    awk -v node="$node" '{ sub(/^\[rank [0-9]+\]: /, "") }
      /^megatron-opd: / { on = 1; print "  " node ": " $0; next }
      on && /^  / { print "  " node ": " $0; next }   # the rest of that message
      { on = 0 }' "$LOG_DIR/$node.log" 2>/dev/null | tail -n 5
  done | head -n 10
  echo "  logs: $LOG_DIR/NODE.log, of each rank alone: $LOG_DIR/ranks"
}

# Ends the job: done (0), requeued, or stopped with CODE.
finish() {
  local code codes failures=0 before step state=$RUN_DIR/logs/failures
  codes=$(cat "$LOG_DIR"/exit.* 2>/dev/null | sort -u | tr '\n' ' ')
  if [[ $CODE == 0 ]]; then
    rm -f "$state"
    stop 0 "done"
  fi
  for code in 2 3 4; do  # megatron_opd/runtime/launch.py: FINAL_EXIT_CODES
    if [[ " $codes " == *" $code "* ]]; then explain; stop "$code" "stopped: running again would end the same way"; fi
  done
  if [[ $NOTICE == USR2 ]]; then
    stop 0 "stopped on request after $(newest_checkpoint); submit again to go on"
  fi
  if [[ $codes == "$REQUEUE_CODE " ]]; then
    say "saved $(newest_checkpoint)"
  elif [[ -n $NOTICE ]]; then  # a node is gone, or the step took longer than Slurm waits
    explain
    say "not every rank could save; newest checkpoint: $(newest_checkpoint)"
  else
    explain
    step=$(newest_checkpoint)
    before=$(sed -n 2p "$state" 2>/dev/null)
    [[ -s $state && $before == "$step" ]] && failures=$(sed -n 1p "$state")
    printf '%s\n%s\n' "$((++failures))" "$step" >"$state"
    (( failures < ${MAX_FAILURES:-3} )) ||
      stop 1 "failed $failures times in a row since ${step:-the start}: not requeued; remove $state and submit again"
    say "failed with exit code $CODE; newest checkpoint: ${step:-none}"
  fi
  [[ $NOTICE == TERM ]] || await_lost_nodes
  # not if Slurm has requeued or cancelled it already: a cancelled job must stay so
  if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) == RUNNING ]]; then
    say "requeueing"
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID" || stop "$REQUEUE_CODE" "this job may not be requeued: submit it again to go on"
    wait_forever
  fi
  stop "$REQUEUE_CODE" "ended by Slurm"
}

# A job that is requeued while one of its nodes does not answer can start again with a broken allocation, or never (seen
# with GPUs in Slurm 22.05). Slurm itself requeues it properly when it gives the node up, after its SlurmdTimeout.
await_lost_nodes() {
  local node deadline=$((SECONDS + ${NODE_WAIT_S:-900})) told=
  for node in "${TRAIN_NODES[@]}"; do
    [[ -e $LOG_DIR/exit.$node ]] && continue   # it could still report
    until answers "$node" || [[ $NOTICE == TERM ]] || (( SECONDS > deadline )); do
      [[ -n $told ]] || say "$node does not answer: waiting until it does, or until Slurm gives it up and requeues the job"
      told=1
      sleep 5 & wait $!
    done
  done
}

answers() {
  timeout 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" --quiet true >/dev/null 2>&1 &
  wait $!
}

# Slurm ends the script when it requeues the job.
wait_forever() { sleep 60 & wait; exit "$REQUEUE_CODE"; }
