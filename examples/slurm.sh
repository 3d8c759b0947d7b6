#!/usr/bin/env bash
# A run on the nodes of a Slurm allocation:
#
#   sbatch --nodes=2 examples/slurm.sh my-run.yaml output_dir=/shared/runs/my-run
#
# Ray is started on every node and ends with the job. The run's driver is on the first node. Some minutes
# before the time is up, or at a preemption, Slurm sends SIGTERM: the run saves, and the job is queued again
# and goes on from there. It can be stopped for good with `touch /shared/runs/my-run/STOP`: it saves, and the
# job ends. Checked with two made-up nodes on one machine (tests/examples/test_slurm.py); not run on a real
# cluster.
#
# What to adapt: the numbers below, and how Raylign's environment is entered (RAYLIGN_ENV). Config, data and
# output_dir lie on storage that all nodes see. Each role asks for its own share (docs/cluster.md).

#SBATCH --job-name=raylign
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=raylign-%j.log

set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch [OPTIONS] $0 CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
if [ -n "${RAYLIGN_ENV:-}" ]; then # a virtual environment on shared storage
  # shellcheck disable=SC1091
  source "$RAYLIGN_ENV/bin/activate"
fi

STOPPED=75 # exit code of a run that was stopped and has saved
START_S=300 # seconds for all nodes to join
GRACE_S=540 # seconds of those before the time is up (--signal) that a step may take; then it is given up

# --- A signal is for the driver; one that comes earlier is remembered -------------------------------------
asked=""
driver=""
# shellcheck disable=SC2329
on_term() {
  asked=yes
  if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi
}
trap on_term TERM

wait_for() { # the exit code of a child, however often a signal interrupts the wait
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  if [ "$code" -gt 128 ]; then # perhaps the signal's: bash keeps the child's own
    code=0
    wait "$1" || code=$?
  fi
  return "$code"
}

# --- Names, ports and a token of this job's own: others may use the same nodes -----------------------------
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((10000 + SLURM_JOB_ID % 900 * 10)) # below those that Raylign and Linux choose by themselves
files=${RAYLIGN_RAY_FILES:-/tmp/ray-$SLURM_JOB_ID} # on each node; short, as sockets lie below it
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE RAY_AUTH_TOKEN # in the environment, which srun hands on: in no command line and no log
export RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch by itself

# All other ports are free ones that Ray finds; 0 as the workers' means the same.
node=(ray start --block --num-cpus="$SRUN_CPUS_PER_TASK" --disable-usage-stats
  --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)

# --- Ray on all nodes, ended with this script --------------------------------------------------------------
steps=()
end_ray() {
  local step
  for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
  for step in "${steps[@]}"; do wait_for "$step" || true; done
  steps=()
  srun --nodes="${#nodes[@]}" --ntasks-per-node=1 rm -rf "$files" || true
}
trap end_ray EXIT

# A node's own name may lead to loopback, which the other nodes can't reach.
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | tr ' ' '\n' |
  awk '/^[0-9.]+$/ && !/^127\./ {print; exit}')
ip=${RAYLIGN_HEAD_IP:-$ip} # where the first address is not that of the nodes' network
address=${ip:-127.0.0.1}:$port
srun --nodes=1 --ntasks=1 --nodelist="$head" "${node[@]}" --head --node-ip-address="${address%:*}" \
  --port="$port" --ray-client-server-port=$((port + 1)) --include-dashboard=false --temp-dir="$files" &
steps+=($!)
deadline=$((SECONDS + START_S))
until (exec 3<>"/dev/tcp/${address%:*}/$port") 2>/dev/null; do
  if [ "$SECONDS" -gt "$deadline" ]; then
    echo "Ray's head did not come up at $address within $START_S s" >&2
    exit 1
  fi
  sleep 1
done

if [ "${#nodes[@]}" -gt 1 ]; then
  others=$(IFS=,; echo "${nodes[*]:1}")
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --nodelist="$others" \
    "${node[@]}" --address="$address" &
  steps+=($!)
fi

python - "$address" "${#nodes[@]}" "$START_S" <<'PY'
import sys
import time

import ray

address, nodes, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + seconds
while (there := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > deadline:
        sys.exit(f"{there} of {nodes} nodes have joined Ray within {seconds:.0f} s")
    time.sleep(1)
PY

# --- The run -----------------------------------------------------------------------------------------------
code=$STOPPED
if [ -z "$asked" ]; then
  raylign run "$1" limits.grace="$GRACE_S" "${@:2}" ray.address="$address" &
  driver=$!
  if [ -n "$asked" ]; then kill -TERM "$driver"; fi # it came in between
  code=0
  wait_for "$driver" || code=$?
  driver=""
fi
echo "raylign run ended with exit code $code"
if [ "$code" -eq "$STOPPED" ] && [ -n "$asked" ]; then
  end_ray
  trap - EXIT
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
