"""The answer in words, for machines, as a command to paste and as a picture."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.advise.advice import TIE, Advice, Confirmed, Option, settled
from analysis.advise.capacity import TARGETS, WORDS, Latency, Search, Setting, curve
from analysis.advise.case import FIRST, Case
from analysis.show.plots import save
from analysis.show.plots_advice import capacity_figure
from experiments.engine.arguments import command_line, serving_arguments, serving_environment
from experiments.records import terminal
from experiments.records.metrics import NAMES
from experiments.records.terminal import console, paragraph
from experiments.spec.spec import model_path, read_yaml

TARGETS_SHOWN = 60  # P99 TBT targets of a capacity curve, spread evenly over their logarithm
MOST_SHOWN = 5  # latencies in the table of options: so many leave room for the rest in 80 columns


def serve_arguments(case: Case, setting: Setting) -> str:
    """What to paste into a shell: `vllm serve` with everything that the answer rests on, as our own engine is started."""
    ours = not case.settings.model.endswith(".json") and read_yaml(model_path(case.settings.model))["_source"]
    source = re.search(r"config\.json of (\S+)", str(ours))
    settings = case.settings_of(setting)
    if case.running:
        chosen = serving_arguments(settings)
        words = command_line({name: chosen[name] for name in ("max_num_batched_tokens", "max_num_seqs")})
        return f"{' '.join(words)}, all else as the server has it"
    variables = [f"{name}={value}" for name, value in serving_environment(settings).items()]
    options = serving_arguments(settings) | {"enable_prefix_caching": bool(case.hit)}
    if case.calibration.gpu:  # attention as vLLM takes it there: ours is not on every GPU
        options.pop("attention_backend")
    name = source[1] if source else "MODEL" if ours else case.model
    words = ["vllm", "serve", name, *command_line(options)]
    return " ".join([*variables, shlex.join(words)])


def show_bench(case: Case, advice: Advice, where: str) -> None:
    """Print `vllm bench serve` of the mean request, at 90 % of the capacity, or the load given; where: what to do first."""
    prompt, output = (round(float(lengths.mean())) for lengths in (case.trace.prompt, case.trace.output))
    traffic, question = case.session.traffic, advice.question
    rate = question.rate or 0.9 * advice.best.rate
    load = f"--max-concurrency {question.users}" if question.users else f"--request-rate {rate:.3g}"
    load += f" --burstiness {traffic.number**-2:.3g}" if traffic.arrivals == "gamma" else ""
    alike = np.ptp(case.trace.prompt) == np.ptp(case.trace.output) == 0
    paragraph(f"verify: {where}{'' if alike else ' (its lengths have the same means, not the same spread)'}:")
    console.print(
        f"vllm bench serve --model {case.model} --dataset-name random --ignore-eos --random-input-len {prompt} "
        f"--random-output-len {output} {load} --num-prompts {max(1024, 4 * question.users)} "
        "--percentile-metrics ttft,tpot,itl --metric-percentiles 50,99"
    )


def show_headline(case: Case, advice: Advice) -> None:
    """Print the answer in words."""
    best, question = advice.best, advice.question
    what = f"{case.model}: chunk size {best.setting.budget}, at most {best.setting.max_batch} requests in a step"
    many = f"95 % interval {advice.low:.3g} to {advice.high:.3g}"
    if not question.load:
        words = f"{advice.value:.3g} requests/s ({many}) with {question}; {WORDS[best.bound_by]} forbids more"
    else:
        words = f"{WORDS[question.goal]} {advice.value:.3g} s ({many}) with {question} {question.load}"
    console.print()
    paragraph(f"{what}: {words}", style="bold")
    if (waiting := question.users - best.setting.max_batch) > 0:
        paragraph(f"{question.users} users are more than the requests in a step: {waiting} queue at any time, which is in TTFT")


def show_options(answers: Mapping[str, tuple[Case, Advice]]) -> None:
    """Print the options beside the best of each answer as one table, of which it is the part with that name."""
    questions = [advice.question for _, advice in answers.values()]
    asked = dict.fromkeys(name for each in questions for name in (each.goal, *each.targets, *reversed(NAMES)))
    names = sorted([name for name in asked if name in TARGETS][:MOST_SHOWN], key=[*TARGETS].index)
    ((case, advice), *_) = answers.values()
    goal, load = advice.question.goal, advice.question.load
    rows = {part: option_rows(*answer, names) for part, answer in answers.items()}
    columns = ["chunk", "batch", "QPS", "to\nbest", "bound by", *(WORDS[name].replace(" ", "\n") for name in names)]
    if not any(row[4] for part in rows.values() for row in part):
        columns, rows = columns[:4] + columns[5:], {part: [row[:4] + row[5:] for row in own] for part, own in rows.items()}
    console.print()
    terminal.table(columns, rows)
    keys = f"QPS: capacity, mean over seeds; latencies (ms) about there, seed {case.seeds[0]}"
    if load:
        keys = f"to best: in {WORDS[goal]}; QPS and latencies (ms): means over {len(case.seeds)} seeds"
    tie = f"within {TIE:.0%} of the best the smallest chunk is advised, as its TBT is lower"
    paragraph(f"SIMULATED; batch: most requests in a step; {keys}; {tie}")


def option_rows(case: Case, advice: Advice, names: Sequence[str]) -> list[list[str]]:
    """A row for the best, each neighbour and what is known as the default, with the latencies of these names."""
    best, default, goal, rows = advice.best, advice.default, advice.question.goal, list[list[str]]()
    known = {option.setting: option for option in (default, best, *advice.neighbours) if option}
    for option in sorted(known.values(), key=lambda option: option.setting):
        own = default and option.setting == default.setting
        size = str(option.setting.budget) + ((", now" if case.running else ", vLLM's") if own else "")
        kept = f"{option.rate:.3g}" if option.rate else "no"
        cost = option.latency[goal] / best.latency[goal] if advice.question.load else option.rate / best.rate
        bound = "" if option.bound_by == "nothing" else WORDS[option.bound_by].removeprefix("median scheduling ")
        latencies = [f"{1e3 * option.latency[name]:.0f}" for name in names]
        rows.append([size, str(option.setting.max_batch), kept, f"{cost - 1:+.0%}", bound, *latencies])
    return rows


def show_command(case: Case, advice: Advice, classes: Sequence[Mapping[str, float]]) -> None:
    """Print TTFT by length of prompt (classes: of ttft_by_prompt), and the command to paste."""
    if len(classes) > 1:
        parts = (
            f"to {row['to']:,.0f} tokens ({row['share']:.0%}) P50 {row['p50']:.3g}, P99 {row['p99']:.3g}" for row in classes
        )
        paragraph(f"TTFT there by length of prompt, s: {'; '.join(parts)}")
    console.print(f"paste: {serve_arguments(case, advice.best.setting)}")


def ttft_by_prompt(case: Case, option: Option) -> list[dict[str, float]]:
    """By prompts of up to 64, 256, 1,024 tokens and so on: the share of requests and their TTFT (s), at the option's rate by
    the first seed; classes of 1 % and more. Short requests behind long prompts show in no percentile of all."""
    seen = case.served(option.setting, option.rate, case.seeds[0]).requests
    tokens = seen["prompt_tokens"] * case.session.scale
    table = pd.DataFrame({"to": 4 ** np.maximum(3, np.ceil(np.log2(tokens) / 2)).astype(int), "ttft": seen["ttft"]})
    found = table.groupby("to")["ttft"].agg(share="size", p50="median", p99=lambda own: own.quantile(0.99)).reset_index()
    found["share"] /= len(table)
    return [dict(zip(map(str, found), map(float, row), strict=True)) for row in found[found["share"] >= 0.01].to_numpy()]


def show_confirmed(advice: Advice, found: Sequence[Confirmed]) -> None:
    """Print what was measured, and which setting it speaks for."""
    for entry in found:
        one, two = entry.measured, entry.simulated
        both = ((words, 1e3 * one[name], 1e3 * two[name]) for name, words in NAMES.items())
        pairs = ", ".join(f"{name} {measured:.1f} ms (simulated {simulated:.1f})" for name, measured, simulated in both)
        kept = "kept" if entry.kept else f"NOT kept, for {WORDS[one.within(advice.question.limits)[1]]}"
        load = f"chunk size {entry.setting.budget} at {entry.rate:.3g} requests/s"
        paragraph(f"measured here, {entry.requests} requests: {load}: {pairs}: {kept}")
    final = settled(advice, found)
    if not any(entry.kept for entry in found):
        words = "no; none kept the targets on the engine, so take less load or looser targets"
    elif final == advice.best.setting:
        words = f"chunk size {final.budget} kept the targets on the engine"
    else:
        words = f"no; take chunk size {final.budget}, which kept them at the highest load of those measured"
    paragraph(f"confirmed: {words}")


def finite(value: Any) -> Any:
    """For JSON, which has no infinity: null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if value == math.inf else value


def facts(case: Case, advice: Advice) -> dict[str, Any]:
    """The answer for machines: everything that was printed and what it rests on."""
    return {
        "model": case.model,
        "settings": asdict(case.settings),
        "simulated": True,
        "calibration": case.calibration.calibration,
        "calibration_error": asdict(case.calibration.error),
        "trace": {"name": case.trace.name, "kind": case.trace.kind, "sha256": case.trace.sha256},
        "requests": case.requests,
        "seeds": case.seeds,
        "warm_up": case.warm_up,
        "traffic": asdict(case.session.traffic),
        "scale": case.session.scale,
        "ttft_by_prompt": ttft_by_prompt(case, advice.best),
        "vllm_serve": serve_arguments(case, advice.best.setting),
        **finite(asdict(advice)),
    }


def marks(case: Case, advice: Advice) -> dict[str, Any]:
    """The answer in the capacity figure: a point of its curve where the load is looked for, with a P99 TBT target."""
    target = math.nan if advice.question.load else advice.question.limits.get("tbt_p99", math.nan)
    row = {"model": case.model, "target": target, "capacity": advice.best.rate}
    return row | {"low": advice.low, "high": advice.high, "label": str(advice.best.setting.budget)}


def curves(case: Case, search: Search, best: Sequence[Setting], limits: Latency, targets: Sequence[float]) -> pd.DataFrame:
    """Capacity near P99 TBT `targets` (s), from a quarter of the least to twice the most, one curve per chunk size of the sweep

    and of `best`; means over the seeds on which settings are compared: model, chunk_size, target, capacity (requests/s).
    """
    tables, near = [], 1.0
    around = sorted({*np.geomspace(min(targets) / 4, 2 * max(targets), TARGETS_SHOWN).tolist(), *targets})
    for size, setting in sorted({setting.budget: setting for setting in (*case.settings_to_try(), *best)}.items()):
        seen = [curve(search, setting, limits, seed, around, near) for seed in case.seeds[:FIRST]]
        found = np.exp(np.log(seen).mean(axis=0)).tolist()
        near = max((rate for rate in found if rate > 0), default=near)
        values = {"model": case.model, "chunk_size": size, "target": around, "capacity": found}
        tables.append(pd.DataFrame(values))
    return pd.concat(tables, ignore_index=True)


def draw(case: Case, search: Search, advice: Advice, where: str, path: Path) -> list[Path]:
    """The capacity figure of one model with the answer in it; none of a closed loop, or without time between tokens: one of
    another question that lies there goes."""
    question = advice.question
    if question.users or not advice.best.latency["tbt_p99"]:
        for suffix in ("png", "svg"):
            Path(f"{path}.{suffix}").unlink(missing_ok=True)
        return []
    target = question.limits.get("tbt_p99", advice.best.latency["tbt_p99"])
    table = curves(case, search, [advice.best.setting], question.limits, [target])
    what = f"capacity on {where}; {question}; trace {case.trace.name}"
    lines = {case.model: {"target": target}} if "tbt_p99" in question.limits else {}
    title = f"SIMULATED ({case.calibration.calibration}): {what}"
    points = pd.DataFrame([marks(case, advice)])
    return save(capacity_figure(table, title, lines, points, case.settings.max_model_len), path)[:1]
