#!/bin/sh
# The base's own Python, a C compiler with headers (torch and Triton compile at run time), an init; a user without rights.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
    ca-certificates g++ gcc libc6-dev libnuma1 procps python3 python3-dev python3-venv tini >/dev/null
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log
python3 -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("error: Python %d.%d in the base; 3.11 or 3.12 is needed" % v)'
useradd --uid 10001 --gid 0 --home-dir /tmp/home --no-create-home --shell /bin/bash artifact
python3 -m venv /opt/venv
