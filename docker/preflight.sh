#!/usr/bin/env bash
# Can this host build the image (argument: build), would it run one (host), does it run this one (run)? Each failure is one
# line: the cause, and what mends it.
# Needs nothing of the host but what it looks for. Settings come from make.
set -euo pipefail
: "${DOCKER:=docker}" "${TARGET:=cuda}" "${IMAGE:=chunked-prefill:$TARGET}" "${OUT:=artifacts/runs}"
export DOCKER TARGET IMAGE OUT
DRIVER=580 # the first driver with CUDA 13

fail() {
    echo "preflight: $1" >&2
    exit 1
}

docker_answers() {
    command -v "$DOCKER" >/dev/null ||
        fail "$DOCKER is not installed: sudo apt-get install docker.io (or Docker's own packages), or IN=host"
    local said
    said=$("$DOCKER" info 2>&1) && return
    case $said in
    *[Pp]ermission\ denied*) fail "$DOCKER refuses this user: sudo usermod -aG docker \$USER, then log in again" ;;
    *) fail "$DOCKER does not answer: sudo systemctl start docker (it said: $(grep -i -m 1 -E 'cannot|error' <<<"$said"))" ;;
    esac
}

disk() { # GiB needed, folder, what for, how to mend
    local folder=$2 free
    while [[ ! -d $folder ]]; do folder=$(dirname -- "$folder"); done
    free=$(df --output=avail -BG -- "$folder" | tail -n 1 | tr -dc 0-9)
    ((free >= $1)) || fail "$free GiB free in $folder; $1 are needed for $3: $4"
}

gpu_driver() {
    command -v nvidia-smi >/dev/null || fail "no NVIDIA driver (no nvidia-smi): sudo apt-get install nvidia-driver-$DRIVER, or TARGET=cpu"
    local versions version
    versions=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1) ||
        fail "the NVIDIA driver does not answer: sudo modprobe nvidia, or restart (it said: $(head -n 1 <<<"$versions"))"
    version=$(head -n 1 <<<"$versions")
    [[ ${version%%.*} =~ ^[0-9]+$ && ${version%%.*} -ge $DRIVER ]] ||
        fail "NVIDIA driver $version; $DRIVER or newer is needed for CUDA 13: sudo apt-get install nvidia-driver-$DRIVER"
    # Only the host sees the processes of others. One free card may be enough: doctor says so, in the container.
    local taken
    taken=$(nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv,noheader 2>/dev/null) || true
    if (($(awk -F, 'NF > 1 && !seen[$1]++ {busy++} END {print busy + 0}' <<<"$taken") >= $(wc -l <<<"$versions"))); then
        taken=${taken%%$'\n'*} taken=${taken#*, }
        fail "every GPU is in use, the first by process ${taken//, / }: wait for it, or kill ${taken%%,*}"
    fi
}

toolkit() { # before there is an image, by what it leaves on the host
    local found
    for found in nvidia-ctk nvidia-container-cli nvidia-container-runtime-hook; do
        ! command -v "$found" >/dev/null || return 0
    done
    for found in /etc/cdi/nvidia* /var/run/cdi/nvidia*; do
        [[ ! -e $found ]] || return 0
    done
    [[ $("$DOCKER" info --format '{{json .Runtimes}}' 2>/dev/null) == *nvidia* ]] || no_toolkit
}

no_toolkit() {
    fail "$DOCKER knows no NVIDIA toolkit: sudo apt-get install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
}

gpu_in_container() {
    local said flags
    read -ra flags <<<"${GPU_FLAGS:-}"
    if ! said=$("$DOCKER" run --rm "${flags[@]}" --network none --entrypoint nvidia-smi "$IMAGE" -L 2>&1); then
        case $said in
        *"could not select device driver"* | *"nvidia-container"* | *"unresolvable CDI"*) no_toolkit ;;
        *"nvidia-smi"*) fail "the container has no nvidia-smi; GPU_FLAGS is '${GPU_FLAGS:-}': make GPU_FLAGS='--gpus all', or podman's --device nvidia.com/gpu=all" ;;
        *) fail "a container with '${GPU_FLAGS:-}' does not start: $(tail -n 1 <<<"$said")" ;;
        esac
    fi
    grep -q '^GPU ' <<<"$said" || fail "the container sees no GPU although the host does: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, then GPU_FLAGS='--device nvidia.com/gpu=all'"
}

docker_answers
root=$("$DOCKER" info --format '{{.DockerRootDir}}' 2>/dev/null || true)
case ${1:-run} in
build)
    version=$("$DOCKER" version --format '{{.Client.Version}}' 2>/dev/null || true)
    [[ $DOCKER == *podman* || ${version%%.*} -lt 23 ]] || "$DOCKER" buildx version >/dev/null 2>&1 ||
        fail "$DOCKER has no buildx: sudo apt-get install docker-buildx (in Docker's own packages docker-buildx-plugin)"
    # A rebuild takes the layers that are there; changed locks need the whole again.
    if [[ -d $root ]] && ! "$DOCKER" image inspect "$IMAGE" >/dev/null 2>&1; then
        disk "${IMAGE_DISK:-40}" "$root" "the image" "$DOCKER system prune, or IMAGE_DISK= if you know better"
    fi
    ;;
host)
    [[ $TARGET != cuda ]] || { gpu_driver && toolkit; }
    ;;
run)
    [[ $TARGET != cuda ]] || gpu_driver
    disk 2 "$OUT" "the run" "free some, or OUT= a folder on another disk"
    "$DOCKER" image inspect "$IMAGE" >/dev/null 2>&1 || fail "no image $IMAGE: make image TARGET=$TARGET"
    [[ $TARGET != cuda ]] || gpu_in_container
    "$(dirname "$0")/in-image.sh" python -m experiments.machine.doctor --model="${MODEL:-}" -- "${TESTBED:-auto}"
    ;;
*) fail "got '$1'; allowed: build, host or run" ;;
esac
