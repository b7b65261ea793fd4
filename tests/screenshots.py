"""Part of `make pictures`: pictures and table of docs/ from the last runs, and screenshots of the report, by headless Chromium.

The page is also watched: no line on its console, no request but for the file itself. Installs Debian's chromium by apt where it
is missing (needs root then).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written

REPORT, DOCS = ROOT / "artifacts" / "report", ROOT / "docs"
PICTURES = {  # in docs/: what it is called in the report's folder, and which command leaves it there
    "fig9a-cpu": ("fig9a-cpu", "make fig9a report"),
    "fig9b-cpu": ("fig9b-cpu", "make fig9b report"),
    "fig9a-a100-sim": ("fig9a-a100-sim", "make fig9a report TESTBED=a100-sim"),
    "fig9b-a100-sim": ("fig9b-a100-sim", "make fig9b report TESTBED=a100-sim"),
    "capacity-a100-sim": ("capacity-a100-sim", "make capacity"),
    "capacity-h100": ("capacity-h100-sxm-Qwen-Qwen3-8B", "make capacity MODEL=Qwen/Qwen3-8B GPU=h100_sxm"),
}
SCREENS = {"report": (1100, 1500), "report-phone": (412, 1100)}  # CSS pixels
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # whatever is asked for, nothing leaves the machine
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check"]


FOLLOWS, PRECEDES = "<!-- make pictures writes what follows -->\n", "<!-- make pictures wrote what precedes -->"
OWN = re.compile(r"https?://[\w.-]+\.(google|googleapis|gvt1)\.com/")  # what Chromium asks for by itself, whatever the page


def chromium() -> str:
    """Its path, installed if need be."""
    if not shutil.which("chromium"):
        for command in (
            ["update", "-qq"],
            ["install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
        ):
            subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL)
    return str(shutil.which("chromium"))


def screenshot(page: Path, target: Path, size: tuple[int, int]) -> list[str]:
    """Take it, and return what a reader must not meet: messages on the console, requests for anything but the page."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as folder:
        log = Path(folder) / "net.json"
        command = [chromium(), *QUIET, f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}"]
        command += ["--enable-logging=stderr", f"--log-net-log={log}", f"--screenshot={target}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        asked = set(re.findall(r'"url":\s*"((?:https?|wss?|ftp)://[^"]+)"', log.read_text()))
    return [*found, *sorted(f"request: {url}" for url in asked if not OWN.match(url))]


def overflow(page: Path, width: int) -> list[str]:
    """Whether the page is wider than a phone's screen, as its own layout says."""
    script = "<script>document.title = document.documentElement.scrollWidth</script>"
    with tempfile.TemporaryDirectory(prefix="chromium-") as folder:
        probe = Path(folder) / "probe.html"
        text = page.read_text().replace("default-src 'none'", "default-src 'unsafe-inline'")
        probe.write_text(text.replace("</body>", f"{script}</body>"))
        command = [chromium(), *QUIET, f"--user-data-dir={folder}/profile", f"--window-size={width},1000", "--dump-dom"]
        dom = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    wide = int(re.search(r"<title>(\d+)</title>", dom)[1])  # type: ignore[index]
    return [f"the page is {wide} pixels wide on a screen of {max(width, 500)}"] if wide > max(width, 500) else []


def choices() -> str:
    """The table of docs/today.md: for each of the paper's targets the best chunk size and the paper's, by the two machines."""
    rows: dict[str, list[str]] = {}
    for machine in ("a100-2024-sim", "a100-sim"):
        for answer in json.loads((REPORT / f"capacity-{machine}.json").read_text())["answers"]:
            best, target = answer["best"], answer["question"]["targets"]["tbt_p99"]
            cell = f"{best['setting']['budget']}: {best['rate']:.3g} requests/s"
            theirs = re.match(r"the paper chose otherwise: (\d+) carries ([\d.]+) requests/s \((.*?)\)", answer["paper"])
            cell += f"; the paper's {theirs[1]}: {theirs[2]} ({theirs[3]})" if theirs else ", the paper's choice too"
            rows.setdefault(f"| {answer['model']}, {answer['target']}, {target:g} s", []).append(cell)
    head = "| target of P99 TBT | on the paper's engine | on a recent vLLM |\n| --- | --- | --- |\n"
    return head + "".join(f"{name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 if the page asks for something, says something or is too wide; 2 without a report."""
    parse(arguments("tests.screenshots", __doc__), argv)
    page = REPORT / "index.html"
    sources = {name: (REPORT / f"{source}.png", told) for name, (source, told) in PICTURES.items()}
    sources["report"] = (page, "make verify report")
    sources["choices"] = (REPORT / "capacity-a100-2024-sim.json", "make capacity TESTBED=a100-2024-sim")
    for source, told in sources.values():
        if not source.is_file():
            raise SpecError(f"{source}: no such file; {told} makes it")
    for name in PICTURES:
        write_whole(DOCS / f"{name}.png", sources[name][0].read_bytes())
    before, after = (DOCS / "today.md").read_text().split(FOLLOWS)[0], (DOCS / "today.md").read_text().split(PRECEDES)[1]
    write_whole(DOCS / "today.md", f"{before}{FOLLOWS}\n{choices()}\n{PRECEDES}{after}")
    found: list[str] = []
    for name, size in SCREENS.items():
        write_whole(DOCS / f"{name}.png", lambda part, size=size: found.extend(screenshot(page, part, size)))
    found += overflow(page, SCREENS["report-phone"][0])
    files = [DOCS / "today.md", *(DOCS / f"{name}.png" for name in (*PICTURES, *SCREENS))]
    console.print("\n".join(found) or "the report page writes nothing to the browser's console and asks for nothing")
    console.print(written(*files))
    result(files=files, problems=found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
