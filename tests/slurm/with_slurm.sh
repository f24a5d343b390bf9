#!/bin/bash
# Runs a command beside a Slurm of one node on the loopback address, and ends it afterwards.
# usage: with_slurm.sh COMMAND ARGS…   It needs Debian's slurmctld, slurmd and munge, and nobody's rights but the caller's.
set -euo pipefail
export PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd sbatch; do
    if ! command -v $program > /dev/null; then
        echo "$program is missing; on Debian: apt-get install slurmctld slurmd munge" >&2
        exit 2
    fi
done

place=$(mktemp -d)
chmod 755 "$place"
mkdir "$place"/{state,spool}
head -c 1024 /dev/urandom > "$place/munge.key"
chmod 600 "$place/munge.key"
cat > "$place/slurm.conf" << END
ClusterName=tests
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=$(hostname -s) Default=YES MaxTime=INFINITE
PartitionName=short Nodes=$(hostname -s) MaxTime=1
END
export SLURM_CONF=$place/slurm.conf

daemons=()
end() {
    for pid in "${daemons[@]}"; do kill "$pid" 2> /dev/null && wait "$pid" || true; done
    rm -rf "$place"
}
trap end EXIT

munged --foreground --force --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
    --seed-file="$place/munged.seed" --log-file="$place/munged.log" 2> /dev/null &
daemons=($!)
until [ -S "$place/munge.socket" ]; do kill -0 $! && sleep 0.2; done
slurmctld -D > /dev/null 2>&1 &
daemons=($! "${daemons[@]}")
slurmd -D > /dev/null 2>&1 &
daemons=($! "${daemons[@]}")
for _ in $(seq 60); do
    [[ $(sinfo --noheader --partition=main --format=%t 2> /dev/null) == idle ]] && break
    sleep 0.5
done
if ! sinfo --noheader --partition=main --format=%t | grep -q idle; then
    tail -n 20 "$place"/*.log >&2
    exit 2
fi
"$@"
