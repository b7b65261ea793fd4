#!/usr/bin/env bash
# Run a command in the image. A measuring run gets a Ray head with all GPUs, started here and stopped here, unless RAY_ADDRESS
# names a cluster to join. The command's exit status and the signals sent to the container pass through.
set -euo pipefail

# The user may be any uid, without an entry in /etc/passwd and without a home.
cache=/tmp/cache # a folder of the host's, if in-image.sh runs this
mkdir -p "$cache" 2>/dev/null || true
[[ -w $cache ]] || cache=$(mktemp -d)
export USER=artifact HOME=/tmp/home XDG_CACHE_HOME=$cache
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton CUDA_CACHE_PATH=$cache/cuda
export VLLM_CACHE_ROOT=$cache/vllm MPLCONFIGDIR=$cache/matplotlib
export PYTHONDONTWRITEBYTECODE=1 # the source is mounted read-only
export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
mkdir -p "$HOME"

measures() { # a run of a figure, the last word, on a testbed that is not simulated
    local before='' word testbed=auto
    [[ " $* " == *" -m experiments.run "* && " $* " != *" --plan "* && ${!#} =~ ^(smoke|fig9[ab]|.*\.yaml)$ ]] || return 1
    for word; do
        [[ $before != --testbed ]] || testbed=$word
        [[ $word != --testbed=* ]] || testbed=${word#*=}
        before=$word
    done
    [[ $testbed == *.yaml ]] || testbed=experiments/spec/testbeds/$testbed.yaml
    ! grep -qs "^platform: *[\"']*simulated" -- "$testbed"
}

ray_started=
if [[ -z ${RAY_ADDRESS:-} ]] && measures "$@"; then
    # Its own, as in experiments/cluster/local_ray.py: loopback only, and a token that is nowhere but in this environment.
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    log=$(mktemp)
    if ! ray start --head --node-ip-address=127.0.0.1 --port="$port" --include-dashboard=false --disable-usage-stats \
        --object-store-memory=268435456 --resources="$(python -m experiments.machine.gpus)" >"$log" 2>&1; then
        echo "error: Ray did not start in the container: $(grep -v '^ *$' "$log" | tail -n 1)" >&2
        exit 1
    fi
    ray_started=1
    for attempt in {1..30}; do
        ray health-check --address "127.0.0.1:$port" >/dev/null 2>&1 && break
        ((attempt < 30)) || {
            echo "error: Ray in the container does not answer on port $port" >&2
            exit 1
        }
        sleep 1
    done
    export RAY_ADDRESS=127.0.0.1:$port
fi

set -m # the command in a process group of its own, which the signals go to
"$@" &
child=$!
trap 'kill -INT -- "-$child" 2>/dev/null' INT
trap 'kill -TERM -- "-$child" 2>/dev/null' TERM HUP
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
    status=0
    wait "$child" || status=$?
done
[[ -z $ray_started ]] || ray stop --force >/dev/null 2>&1 || true
exit "$status"
