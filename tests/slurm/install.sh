#!/bin/bash
# Installs what cluster.sh needs, where it is missing and this machine allows it; says so and succeeds otherwise: the
# tests then skip with the reason.
set -uo pipefail
export PATH=$PATH:/usr/sbin:/sbin
missing=
for tool in slurmctld slurmd munged ip tc; do command -v $tool >/dev/null || missing+=" $tool"; done
[[ -z $missing ]] && exit 0
[[ $(id -u) == 0 ]] || { echo "install.sh:$missing missing, and installing needs root: tests/slurm will be skipped"; exit 0; }
command -v apt-get >/dev/null || { echo "install.sh:$missing missing, and there is no apt-get: tests/slurm will be skipped"; exit 0; }
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge iproute2 >/dev/null ||
  echo "install.sh: apt-get could not install slurm-wlm, munge and iproute2: tests/slurm will be skipped"
exit 0
