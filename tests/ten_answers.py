"""Part of `make pictures`: docs/ten-answers.md, ten questions to `make recommend` with what it prints; SIMULATED; a minute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written

PAGE = ROOT / "docs" / "ten-answers.md"
QUESTIONS = {
    "Llama-3.1-8B on an A100": "MODEL=meta-llama/Llama-3.1-8B-Instruct GPU=a100_sxm TBT_P99=0.1",
    "Llama-3.1-8B on an H100": "MODEL=meta-llama/Llama-3.1-8B-Instruct GPU=h100_sxm TBT_P99=0.05",
    "Llama-3.1-70B on 4 H100": "MODEL=meta-llama/Llama-3.1-70B-Instruct GPU=h100_sxm TP=4 TBT_P99=0.1",
    "Llama-3.1-70B on 8 H100": "MODEL=meta-llama/Llama-3.1-70B-Instruct GPU=h100_sxm TP=8 TBT_P99=0.1",
    "Qwen3-32B on 2 H200": "MODEL=Qwen/Qwen3-32B GPU=h200_sxm TP=2 TBT_P99=0.1",
    "Qwen3-8B on an L40S": "MODEL=Qwen/Qwen3-8B GPU=l40s TBT_P99=0.15",
    "Qwen3-30B-A3B, a mixture of experts, on an H100": "MODEL=Qwen/Qwen3-30B-A3B GPU=h100_sxm TBT_P99=0.15",
    "Mixtral-8x7B on 2 H100": "MODEL=mistralai/Mixtral-8x7B-Instruct-v0.1 GPU=h100_sxm TP=2 TBT_P99=0.15",
    "A config.json, here Mistral-7B's, on an A100": "MODEL=experiments/spec/models/mistral-7b.json GPU=a100_sxm TBT_P99=0.1",
    "Yi-34B on 2 B200": "MODEL=yi-34b GPU=b200_sxm TP=2 TBT_P99=0.1",
}
HEAD = """# Ten answers of `make recommend`

Written by `make pictures`; do not edit. All SIMULATED from published kernel tables, on the synthetic trace with Poisson
arrivals: none of these GPUs was at hand. What the columns mean and how far to trust them: [recommend.md](recommend.md).
Times are of one call each on one core; where a model is asked of a GPU for the first time, with the fit of its
calibration.

| | chunk size, most requests | requests/s (95 % interval) | vLLM's default carries | took |
| --- | --- | --- | --- | --- |
"""


def ask(question: str) -> tuple[str, dict[str, object], float]:
    """What the command prints, the JSON that it leaves, and the seconds it took. Raises SpecError where it has no answer."""
    start = time.monotonic()
    done = subprocess.run(["make", "recommend", *question.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SpecError(f"make recommend {question}: {done.stderr.strip()}")
    printed = "\n".join(line.rstrip() for line in done.stdout.replace(f"{ROOT}/", "").splitlines())
    path = re.search(r"artifacts/report/\S+\.json(?=[,:])", printed)
    if not path:
        raise SpecError(f"make recommend {question}: names no JSON file")
    return printed, json.loads((ROOT / path[0]).read_text()), time.monotonic() - start


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 if one of them has no answer."""
    parse(arguments("tests.ten_answers", __doc__), argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # and so for make: what the page says was one core
    table, pages = HEAD, ""
    for number, (title, question) in enumerate(QUESTIONS.items(), 1):
        printed, found, seconds = ask(question)
        best, default = found["best"], found["default"]
        chosen = f"{best['setting']['budget']}, {best['setting']['max_batch']}"  # type: ignore[index]
        other = f"{default['rate']:.3g} with {default['setting']['budget']}, {default['setting']['max_batch']}"  # type: ignore[index]
        carries = f"{best['rate']:.3g} ({found['low']:.3g} to {found['high']:.3g})"  # type: ignore[index]
        heading = f"{number}. {title}"
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        table += f"| [{heading}](#{anchor}) | {chosen} | {carries} | {other} | {seconds:.0f} s |\n"
        pages += f"\n## {heading}\n\n```sh\nmake recommend {question}\n```\n\n```text\n{printed}\n```\n"
        console.print(f"{heading}: {chosen} tokens and requests, {carries} requests/s, in {seconds:.0f} s")
    write_whole(PAGE, table + pages)
    console.print(written(PAGE))
    result(files=[PAGE])
    return 0


if __name__ == "__main__":
    sys.exit(main())
