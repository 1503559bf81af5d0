#!/bin/bash
# make test-slurm: installs Slurm where need be, starts the cluster, runs the scenarios and ends the cluster, also where
# they were interrupted. Where this machine lacks the rights or the packages it says so in one line and succeeds.
#
#   tests/slurm/run.sh PYTHON [PYTEST OPTIONS]
set -uo pipefail
here=$(dirname "$(realpath "$0")")
python=$1; shift
export SLURM_TEST_CLUSTER=${SLURM_TEST_CLUSTER:-/tmp/megatron_opd_slurm}

not_run() { echo "test-slurm: not run: $1"; exit 0; }
tools="slurmctld slurmd munged ip tc"
reason=$("$here/../apt_install.sh" "$tools" slurm-wlm munge iproute2) || not_run "$reason"
"$here/cluster.sh" down "$SLURM_TEST_CLUSTER"  # of an earlier run that was killed
reason=$("$here/cluster.sh" up "$SLURM_TEST_CLUSTER" 2>&1)
case $? in
0) ;;
3) not_run "$reason" ;;
*) echo "$reason" >&2; exit 1 ;;
esac
trap '"$here/cluster.sh" down "$SLURM_TEST_CLUSTER"' EXIT
timeout --kill-after=30 "${SLURM_TEST_TOTAL_S:-1800}" \
  "$python" -m pytest "$here" -m slurm -v --durations=0 --durations-min=1 "$@"
