#!/bin/sh
# Install the locks named, in this order: wheels only, each with its hash, nothing left in a cache.
# LEAVE_OUT: an extended regular expression of package names, for tests of the image alone; what is left out is in a label.
set -eu
cd /opt/build
for lock in "$@"; do
    if [ -n "${LEAVE_OUT:-}" ]; then
        awk -v left_out="^(${LEAVE_OUT})==" '/^[a-z]/ {skip = $0 ~ left_out} !skip' "$lock" >kept && mv kept "$lock"
    fi
    install() {
        /opt/venv/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --no-compile \
            --require-hashes --only-binary :all: "$@" -r "$lock"
    }
    case $lock in
    torch-cpu.lock) install 2>/dev/null || install --index-url "$TORCH_INDEX" ;; # the CPU build is on an index of its own
    *) install ;;
    esac
done
# As pip would, but on every core; some packages hold files that are for no Python.
/opt/venv/bin/python -m compileall -q -j 0 -x '/tests?/' /opt/venv/lib >/dev/null 2>&1 || true
