#!/bin/bash
# A small Slurm cluster on this machine: every node a network namespace with its own host name and its own link.
#
#   tests/slurm/cluster.sh up DIR [NODES]     start it (default 3 nodes: two for a job, one spare); again: no change
#   tests/slurm/cluster.sh down DIR           end what `up` started in DIR, and nothing else
#   tests/slurm/cluster.sh env DIR            print what a shell needs to use it:  eval "$(tests/slurm/cluster.sh env DIR)"
#   tests/slurm/cluster.sh link DIR N up|down the link of node N
#
# Needs root, iproute2 and Debian's slurm-wlm and munge (22.05 was used). Nothing outside DIR is written: configuration,
# munge key and socket, spool and logs lie in it, and the nodes' /etc/hosts is a bind mount that only they see.
# DIR/small is a file system of 48 MB, for running out of space on.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
verb=${1:?up, down, env or link} dir=$(realpath -m "${2:?directory}")
tag=mopd net=10.213.77
conf=$dir/etc/slurm.conf munge=$dir/munge.socket

alive() {  # whether the daemon of this pid file runs: not a zombie, nor another process of that number
  local pid status
  pid=$(cat "$1" 2>/dev/null) && status=$(cat "/proc/$pid/status" 2>/dev/null) &&
    [[ $status == Name:[[:space:]]@(slurm|mung)* && $status != *State:[[:space:]]Z* ]]
}

owner() { cat /sys/class/net/$tag-br/ifalias 2>/dev/null || true; }  # directory of the cluster whose nodes are up

end() {  # ends the daemon whose pid file this is, and waits for it
  alive "$1" || { rm -f "$1"; return 0; }
  local pid; pid=$(cat "$1")
  kill "$pid" 2>/dev/null || true
  for _ in {1..50}; do alive "$1" || break; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true
  rm -f "$1"
}

case $verb in
env)
  echo "export SLURM_CONF=$conf PATH=\$PATH:/usr/sbin:/sbin"
  exit ;;
link)
  ip link set "$tag-v$3" "$4"
  # a node that Slurm gave up is asked for again once in a minute or two; this way it reports at once
  if [[ $4 == up ]] && alive "$dir/slurmd.n$3.pid"; then kill -HUP "$(cat "$dir/slurmd.n$3.pid")"; fi
  exit ;;
down)
  if alive "$dir/slurmctld.pid"; then
    SLURM_CONF=$conf timeout 20 scancel --user="$(id -un)" --full --signal=KILL 2>/dev/null || true
    SLURM_CONF=$conf timeout 20 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in {1..30}; do [[ -z $(SLURM_CONF=$conf timeout 5 squeue -h 2>/dev/null) ]] && break; sleep 0.5; done
  fi
  for f in "$dir"/slurmd.*.pid "$dir/slurmctld.pid"; do end "$f"; done
  if [[ $(owner) == "$dir" ]]; then
    for space in $(ip netns list | awk -v tag="$tag-n" 'index($1, tag) == 1 {print $1}'); do
      for pid in $(ip netns pids "$space"); do kill -9 "$pid" 2>/dev/null || true; done  # what a lost job left behind
      ip link del "${space/-n/-v}" 2>/dev/null || true
      ip netns del "$space"
    done
    ip link del $tag-br
  fi
  end "$dir/munged.pid"
  mountpoint -q "$dir/small" && umount -l "$dir/small"
  exit 0 ;;
up) ;;
*) echo "unknown command $verb" >&2; exit 2 ;;
esac

nodes=${3:-3}
if alive "$dir/slurmctld.pid"; then SLURM_CONF=$conf sinfo; exit 0; fi
for tool in slurmctld slurmd sbatch munged ip unshare; do
  command -v $tool >/dev/null || { echo "cluster.sh: $tool is missing (apt-get install slurm-wlm munge iproute2)" >&2; exit 3; }
done
[[ $(id -u) == 0 ]] || { echo "cluster.sh: needs root for network namespaces" >&2; exit 3; }
probe() {  # what a node needs: a link, a host name and mounts of its own
  ip link add $tag-probe type bridge && ip link del $tag-probe && ip netns add $tag-probe &&
    ip netns exec $tag-probe unshare -u -m bash -c 'hostname probe && mount -t cgroup2 none /sys/fs/cgroup'
}
why=$(probe 2>&1) && can=yes || can=no
ip netns del $tag-probe 2>/dev/null || true
[[ $can == yes ]] || { echo "cluster.sh: this machine allows no network namespaces with mounts: $why" >&2; exit 3; }
other=$(owner)
if [[ -n $other ]] && alive "$other/slurmctld.pid"; then
  echo "cluster.sh: another cluster is up; take it down first: $0 down $other" >&2; exit 4
fi
[[ -z $other ]] || "$0" down "$other"  # what is left of one that was killed

trap 'code=$?; [[ $code == 0 ]] || { "$0" down "$dir"; echo "cluster.sh: up failed; logs in $dir" >&2; }' EXIT
mkdir -p "$dir"/{etc,state,small}
rm -rf "$dir"/{state,spool.*,*.log}
mkdir -p "$dir/state"
chmod 755 "$dir"
mount -t tmpfs -o size=48m tmpfs "$dir/small"
ip link add $tag-br type bridge
ip link set $tag-br alias "$dir"
ip addr add $net.1/24 dev $tag-br
ip link set $tag-br up
printf '127.0.0.1 localhost\n%s.1 %s\n' $net "$(hostname)" >"$dir/etc/hosts"
for ((i = 1; i <= nodes; i++)); do
  mkdir -p "$dir/spool.n$i"
  ip netns add $tag-n$i
  ip link add $tag-v$i type veth peer name e0 netns $tag-n$i
  ip link set $tag-v$i master $tag-br up
  ip -n $tag-n$i addr add $net.1$i/24 dev e0
  ip -n $tag-n$i link set e0 up
  ip -n $tag-n$i link set lo up
  echo "$net.1$i n$i" >>"$dir/etc/hosts"
done
# Short times, so that a scenario takes less than a minute: a node is given up some 20 s after its link went, a requeued
# job starts after 5 s (credentials must have expired), what SIGTERM does not end is killed after 15 s (Slurm's default: 30).
cat >"$conf" <<C
ClusterName=$tag
SlurmctldHost=$(hostname)($net.1)
SlurmctldPort=27817
SlurmdPort=27818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdTimeout=12
TCPTimeout=5
MessageTimeout=10
KillWait=15
OverTimeLimit=0
ReturnToService=2
MpiDefault=none
JobRequeue=1
GresTypes=gpu
NodeName=n[1-$nodes] NodeAddr=$net.1[1-$nodes] CPUs=$(nproc) Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
C
printf 'CgroupPlugin=cgroup/v1\nConstrainCores=no\n' >"$dir/etc/cgroup.conf"
# GPUs in name alone, so that job scripts run unchanged: Slurm counts the files
mkdir -p "$dir/gpus"; touch "$dir"/gpus/gpu{0..7}
echo "NodeName=n[1-$nodes] Name=gpu File=$dir/gpus/gpu[0-7]" >"$dir/etc/gres.conf"
export SLURM_CONF=$conf
[[ -s $dir/munge.key ]] || (umask 077; dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none)
# --force: munged dislikes a socket below a directory that others may write to, as /tmp is
munged --force --key-file="$dir/munge.key" --socket="$munge" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
slurmctld -c -f "$conf"
for ((i = 1; i <= nodes; i++)); do
  # slurmd insists that /sys/fs/cgroup is a mount point: it gets one in a mount namespace of its own
  ip netns exec $tag-n$i unshare -u -m bash -c \
    "hostname n$i; mount --bind $dir/etc/hosts /etc/hosts; mount -t cgroup2 none /sys/fs/cgroup; exec slurmd -N n$i -c -f $conf"
done
for _ in {1..60}; do
  [[ $(sinfo -h -t idle -o %D 2>/dev/null) == "$nodes" ]] && { sinfo; exit 0; }
  sleep 0.5
done
sinfo >&2
exit 1
