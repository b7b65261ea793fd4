"""The Ray of a run: for this user on this machine alone, wherever temporary files go; and why there is none, in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from experiments.cluster import cluster, local_ray
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.run import main

MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.12.4
This process on node 127.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""
STARTED = """
import json, os, psutil
from experiments.cluster import cluster, local_ray
with local_ray.ray_cluster() as ray:
    folder = ray._private.worker._global_node.get_temp_dir_path()
    token = local_ray.OWN["RAY_AUTH_TOKEN"].encode()
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    files = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    seen = {
        "listens": sorted({c.laddr.ip for p in mine for c in p.net_connections() if c.status == psutil.CONN_LISTEN}),
        "processes": len(mine),
        "in_files": [path for path in files if os.path.isfile(path) and token in open(path, "rb").read()],
        "in_commands": [p.pid for p in mine if token.decode() in " ".join(p.cmdline())],
        "mode": oct(os.stat(os.path.dirname(folder)).st_mode & 0o777),
        "auth": ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()),
    }
print(json.dumps(seen | {"left": os.environ.get("RAY_AUTH_TOKEN")}))
"""


@pytest.mark.engine
def test_a_runs_own_ray_is_its_users_alone(tmp_path: Path) -> None:
    """With a home that cannot be written, and a folder for temporary files whose path is too long for Ray's sockets."""
    folder = tmp_path / "a-folder-for-temporary-files-such-as-a-cluster-gives-to-a-job"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"TMPDIR": str(folder), "HOME": "/proc/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["processes"] >= 4  # server, raylet, agents, driver
    assert {ip.removeprefix("::ffff:") for ip in seen["listens"]} == {"127.0.0.1"}
    assert (seen["auth"], seen["mode"]) == ("token", "0o700")
    assert seen["in_files"] == seen["in_commands"] == []
    assert seen["left"] is None


def test_every_process_has_a_token_of_its_own() -> None:
    say = [sys.executable, "-c", "from experiments.cluster import local_ray; print(local_ray.OWN['RAY_AUTH_TOKEN'])"]
    one, two = (subprocess.run(say, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2))
    assert re.fullmatch("[0-9a-f]{64}", one)
    assert one != two


@pytest.mark.parametrize("length", [5, 20, 21, 27, 90])
def test_rays_folder_is_short_whatever_tmpdir_is(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = f"/{'t' * (length - 1)}"
    real = os.access
    monkeypatch.setattr(tempfile, "tempdir", wanted)
    monkeypatch.setattr(os, "access", lambda path, mode: path == wanted or real(path, mode))
    place = local_ray.short_place()
    assert place == (wanted if length <= local_ray.LONGEST else "/tmp")
    sockets = "/chunked-ray-12345678/r/session_2026-11-28_10-05-42_169646_4194304/sockets/plasma_store"
    assert len(place + sockets) <= 107  # Linux's limit


def test_without_a_short_place_tmpdir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/a/long/folder/of/a/cluster")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SpecError, match=r"^TMPDIR: got /a/long/folder/of/a/cluster; allowed: a folder that can be written"):
        local_ray.short_place()


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        (None, Exception("It timed out\nat startup."), "Ray did not start on this machine: It timed out at startup."),
        (None, PermissionError(13, "Permission denied", "/home/me/.ray"), "Permission denied: '/home/me/.ray'"),
        (None, ValueError("AF_UNIX path length"), "Ray did not start on this machine: AF_UNIX path length"),
        ("here:1", RuntimeError(MISMATCH), "Version mismatch: The cluster was started with: Ray: 2.60.0 Python: 3.12.4"),
        ("here:1", ConnectionRefusedError("refused"), "RAY_ADDRESS: got 'here:1'; no Ray cluster answers there, or it wants"),
    ],
)  # fmt: skip
def test_why_there_is_no_ray(
    address: str | None,
    error: Exception,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The address is blamed only where one was given."""
    ray = pytest.importorskip("ray")
    given: dict[str, str | None] = {}

    def init(**_: Any) -> None:
        given.update({name: os.environ.get(name) for name in local_ray.OWN})
        os.write(2, b"[W] gcs_client.cc:210: Failed\n")  # as Ray's C++ does
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(local_ray, "_node_here", lambda _address: True)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert main(["smoke", "--testbed", "cpu", "--out", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert ("RAY_ADDRESS" in said) == bool(address)
    assert (given["RAY_AUTH_TOKEN"] == local_ray.OWN["RAY_AUTH_TOKEN"]) == (not address)


def test_an_images_own_ray_is_on_loopback_with_a_token_of_its_own(tmp_path: Path) -> None:
    """The entrypoint with commands that only write down what they were given."""
    noted = "$RAY_AUTH_MODE $RAY_AUTH_TOKEN $RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    python = f'if [[ $1 == -c ]]; then echo 6399; elif [[ $* == *smoke ]]; then echo "run {noted} $RAY_ADDRESS" >>"$LOG"; fi'
    for name, does in {"ray": f'echo "$1 {noted} $*" >>"$LOG"', "python": python}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    tokens = []
    for number in range(2):
        log = tmp_path / f"log-{number}"
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
        command = ["docker/entrypoint.sh", "python", "-m", "experiments.run", "smoke"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        rows = [line.split(maxsplit=4) for line in log.read_text().splitlines()]
        assert [row[0] for row in rows] == ["start", "health-check", "run", "stop"]
        assert {(row[1], row[3]) for row in rows} == {("token", "0")}
        (token,) = {row[2] for row in rows}
        assert re.fullmatch("[0-9a-f]{64}", token)
        assert not any(token in row[4] for row in rows)  # the process list shows arguments to everyone
        tokens.append(token)
    assert tokens[0] != tokens[1]


def test_a_session_that_ray_killed_for_want_of_memory_says_who_has_it() -> None:
    """Ray's message ends in advice on its own settings."""
    said = """Memory on the node was 22.37GB used / 23.54GB limit (0.950298)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
6180\t20.34\tawk { for (;;) }
6225\t0.78\tray::IDLE
Refer to the documentation on how to address the out of memory issue"""
    told = "out of memory: 22.37GB of this machine's 23.54GB in use, 20.34GB of it by awk { for (;;) }; end what else runs"
    assert cluster._reason(RuntimeError(said)) == told
    assert cluster._reason(RuntimeError("a\nb\n")) == "RuntimeError: b"
