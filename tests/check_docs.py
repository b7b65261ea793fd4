"""`make test-docs`: those of README and docs that need an engine or minutes, pasted as they stand in a copy of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import all_of, paste

JUDGES = re.compile(r"\b(verify|validate|power|bench)\b")  # that a noisy machine misses something is an answer of theirs


@pytest.mark.parametrize("command", all_of("slow"))
def test_command_works_when_pasted(docs_copy: Path, command: str) -> None:
    done = paste(command, docs_copy)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert done.returncode == 0 or (JUDGES.search(command) and "error: " not in said), said
