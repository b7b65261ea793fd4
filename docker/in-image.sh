#!/usr/bin/env bash
# Run a command in the image, in this folder: the source read-only, artifacts writable, owned by the caller. Settings come from make.
set -euo pipefail
: "${DOCKER:=docker}" "${IMAGE:?}" "${OUT:=artifacts/runs}"
root=$PWD
read -ra flags <<<"${USER_FLAGS:-} ${GPU_FLAGS:-} ${SHM:-} ${ULIMITS:-} ${NETWORK:+--network=$NETWORK} ${RUN_FLAGS:-}"

mount() { # folder or file; "readonly" or nothing; where, if not at its own path. Quoted as in a CSV: a path may hold anything
    local source target
    source=$(realpath -- "$1") target=${3:-$(realpath -s -- "$1")}
    [[ -z ${mounted[$target]:-} ]] || return 0
    mounted[$target]=1
    mounts+=(--mount "type=bind,\"source=${source//\"/\"\"}\",\"target=${target//\"/\"\"}\"${2:+,$2}")
}
mounts=()
declare -A mounted
mkdir -p -- artifacts "$OUT"
mount "$root" readonly
mount artifacts # reports, fetched traces, calibrations of this machine, packages
mount artifacts/reference readonly
mount "$OUT"
model=${MODEL:-}
[[ $model != */*.json ]] || model=$(dirname -- "$model") # with the weights beside it
hub=${HF_HUB_CACHE:-${HF_HOME:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/huggingface}/hub} # as experiments/calibrate/gpu.py looks for it
downloaded=$hub/models--${model//\//--}
for input in "${TRACE:-}" "${BAG:-}" "${TESTBED:-}" "${FIGURE:-}" "${TRIAL:-}" "$model" "${model:+$downloaded}"; do
    [[ ! -e $input ]] || mount "$input" readonly
done

image=$("$DOCKER" image inspect --format '{{.Id}}' "$IMAGE" 2>/dev/null || true)
id=${image#sha256:}
cache=.image/cache-${id:0:12} # what entrypoint.sh keeps there, code compiled for this image, the next command finds
mkdir -p -- "$cache"
mount "$cache" "" /tmp/cache

variables=(--env "ARTIFACT_IMAGE=$image")
[[ ! -d ${model:+$downloaded} ]] || variables+=(--env "HF_HUB_CACHE=$(realpath -s -- "$hub")")
for name in RAY_ADDRESS RAY_AUTH_TOKEN NODE_IP PYTHONPATH; do
    [[ -z ${!name:-} ]] || variables+=(--env "$name") # its value does not show in the process list
done
if [[ ${GPU_FLAGS:-} == *all* && -n ${CUDA_VISIBLE_DEVICES+given} ]]; then # else the container counts what it was given
    variables+=(--env CUDA_VISIBLE_DEVICES)
fi
if commit=$(git rev-parse HEAD 2>/dev/null); then # the container has no git history
    [[ -z $(git status --porcelain) ]] || commit+=-dirty
    variables+=(--env "ARTIFACT_COMMIT=$commit")
fi
exec "$DOCKER" run --rm "${flags[@]}" "${mounts[@]}" --workdir "$root" "${variables[@]}" "$IMAGE" "$@"
