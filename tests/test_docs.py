"""README and docs: every command is known and run by somebody, quick ones here; links lead somewhere; one version."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from commands import BLOCK, PAGES, QUICK, SLOW, all_of, commands, kind, listed, paste, place
from test_makefile import GENERAL, KNOWN, READS, TARGETS

from experiments.records.provenance import ROOT

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_a_block_says_whether_it_holds_commands(page: Path) -> None:
    text = page.read_text()
    fences = re.findall(r"^```(.*)$", text, re.M)
    assert set(fences[::2]) <= {"sh", "text"}
    assert set(fences[1::2]) <= {""}
    assert not re.findall(r"^(?: {4}|\t)[^ ].*", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)


def test_every_command_is_in_a_class_and_every_class_is_of_commands() -> None:
    found = [(page.name, command) for page in PAGES for command in commands(page)]
    assert not [one for one in found if not kind(one[1])], "docs/testing.md says which classes there are"
    patterns = [*QUICK, *SLOW, *listed()]
    assert not [pattern for pattern in patterns if not any(place(command, [pattern]) == 0 for _, command in found)]
    assert not set(QUICK) & set(SLOW)


@each_page
def test_targets_and_variables_of_commands_are_there(page: Path) -> None:
    for command in commands(page):
        for part in re.split(r"&&|[|;]", command):
            program, *words = shlex.split(part)
            if program == "make" and kind(command) in ("quick", "slow", "listed") and not command.endswith("*"):
                given = {re.sub(r"_P\d\d$", "_P99", word.partition("=")[0]) for word in words if "=" in word}
                targets = [word for word in words if "=" not in word and not word.startswith("-")]
                assert set(targets) <= set(TARGETS), command
                assert given <= set(KNOWN), command
                assert given <= GENERAL.union(*(READS[target] for target in targets)), f"{command}: nothing reads it"


@pytest.mark.parametrize("command", all_of("quick"))
def test_quick_commands_work_when_pasted(docs_copy: Path, command: str) -> None:
    done = paste(command, docs_copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end with."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:docs|docker|tests|experiments|analysis|artifacts/reference)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_one_version_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest, date = re.findall(r"^## (\S+), (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    assert (version, version) == (cited["version"], newest)
    assert str(cited["date-released"]) == date
