"""`make recommend`: the chunk size for a model, a machine, latency targets and a load; see docs/recommend.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from analysis.advise import tell
from analysis.advise.advice import Advice, Confirmed, settled, steady
from analysis.advise.capacity import DELAY_LIMIT_S, Setting
from analysis.advise.case import Case, case_for, evidence, requests_asked, under
from analysis.advise.on_engine import is_own, own
from analysis.advise.on_gpu import add_options, case_asked, check_options, say, show_gpus
from analysis.advise.on_server import as_is, on_server, read_benches
from analysis.advise.question import VARIABLES, Question, asked
from experiments.cluster.trials import TRIAL_SECONDS, Load, load_sessions, serve_loads
from experiments.machine.doctor import choose_testbed, problems
from experiments.records.errors import SpecError
from experiments.records.metrics import served_of
from experiments.records.provenance import gpus
from experiments.records.store import to_json, write_whole
from experiments.records.terminal import arguments, command, console, paragraph, parse, result, written
from experiments.simulator.calibration import load_calibration
from experiments.simulator.estimate import calibration_here
from experiments.spec.expand import Session, expand
from experiments.spec.spec import Testbed, load_figure, slug
from experiments.spec.traces import Trace
from experiments.spec.workload import MAX_REQUESTS

CONFIRM_AT = 0.9  # of the simulated capacity: at the capacity itself a coin would decide


def session_of(testbed: Testbed, model: str) -> Session:
    """Figure 9b's of the model on the testbed. Raises SpecError for a model that is not there."""
    sessions = {session.model: session for session in expand(load_figure("fig9b"), testbed, 1)}
    if model not in sessions:
        allowed = f"allowed on testbed {testbed.testbed}: {', '.join(sorted(sessions))}; others with GPU=, see GPU=help"
        raise SpecError(f"MODEL: got {model!r}; {allowed}")
    return sessions[model]


def case_of(testbed: Testbed, model: str, trace: Trace, make: bool = False) -> Case:
    """What is asked, from Figure 9b's settings of the model on the testbed.

    Simulated with this machine's calibration where there is one, else with the testbed's; `make` one where there is neither.
    Raises SpecError for a model that is not there, or has no calibration.
    """
    settings = (session := session_of(testbed, model)).engine
    here = calibration_here(testbed.testbed, settings)
    if here is None and settings.calibration is None and make:
        from experiments.calibrate.here import calibrate, settings_of  # not before: what fits takes long to import

        here = calibrate(*settings_of(testbed)[settings.model], testbed.testbed)
    name = str(here) if here else settings.calibration
    if name is None:
        raise SpecError(f"{model}: no calibration for testbed {testbed.testbed}; make calibrate makes one, on its machine")
    return case_for(session, load_calibration(name), trace, load_figure("fig9b").max_model_len)


def confirm(case: Case, advice: Advice, testbed: Testbed) -> list[Confirmed]:
    """Serve the best and its neighbours on the real engine for a short while, a little below their simulated capacities."""
    question, share = advice.question, 1.0 if advice.question.load else CONFIRM_AT
    options = [option for option in (advice.best, *advice.neighbours) if option.rate]
    loads = [Load(option.setting.budget, option.setting.max_batch, share * option.rate) for option in options]
    seconds = testbed.serving.trial_seconds if testbed.serving else TRIAL_SECONDS
    found = []
    most = MAX_REQUESTS if case.session.traffic.again else len(case.trace.prompt)
    sessions = load_sessions(case.session, loads, seconds, case.max_total, testbed.switch_chunk_size, most)
    for load, record in serve_loads(sessions, case.trace):
        setting, seen, count = Setting(load.budget, load.max_batch), question.latency(served_of(record)), len(record.requests)
        predicted = question.latency(replace(case, requests=count, warm_up=0).served(setting, load.rate, case.session.seed))
        found.append(Confirmed(setting, load.rate, count, seen, predicted, seen.within(question.limits)[0] <= 0))
    return found


def case_there(options: argparse.Namespace, question: Question) -> tuple[None, Case, list[str]]:
    """The same as case_here of a GPU that is not here: no testbed has it. Raises SpecError."""
    case = case_asked(options)
    question.check(case.trace, 1)
    return None, case, ["no GPU here is asked"]


def case_here(options: argparse.Namespace, question: Question, server: bool) -> tuple[Testbed, Case, list[str]]:
    """What is asked of a testbed, said: of one with an engine any model; with what keeps the answer from being measured there.

    `server`: of one that runs already, whose tokens are what they are; nothing is calibrated for it. Raises SpecError.
    """
    testbed, reason = choose_testbed(options.testbed, options.out, options.model)
    simulated = testbed.platform == "simulated"
    if simulated:
        check_options(options, options.testbed)
        session_of(testbed, options.model)
    paragraph(f"testbed {testbed.testbed} ({reason}): {testbed.title}")
    missing = ["a simulated testbed has no engine"] if simulated else problems(testbed, options.out, gpus())
    mine = own(options, testbed, missing) if not simulated and is_own(options, testbed) else None
    scale, longest = 1 if server else testbed.scale, mine.max_len if mine else load_figure("fig9b").max_model_len
    trace = requests_asked(options.trace, longest * scale // testbed.scale, scale)
    question.check(trace, scale)
    make = not missing and not server
    case = mine.case(trace, make) if mine else case_of(testbed, options.model, trace, make)
    return testbed, case, missing + ["no prefix is cached on the engine here, HIT is simulated only"] * bool(question.hit)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input or targets that cannot be kept."""
    parser = arguments("analysis.advise.recommend", __doc__, "testbed", "trace", "out", "report")
    add_options(parser, "as Figure 9b names it,")
    parser.add_argument("--bench", default="", help="results of vllm bench serve on a server that runs, separated by commas")
    parser.add_argument("--served", default="", help="its CHUNK/BATCH, where they do not say it")
    parser.add_argument("question", nargs="*", metavar="NAME=value", help=", ".join(VARIABLES))
    options = parse(parser, argv)
    if options.gpu == "help":
        result(gpus=show_gpus())
        return 0
    check_options(options, parser.get_default("testbed"), engine=True)
    question = asked(options.question)
    benches = read_benches(options.bench, options.served)
    options.trace = options.trace or options.bench.rpartition(",")[2].strip()  # by default the requests of the last
    testbed, case, missing = case_there(options, question) if options.gpu else case_here(options, question, bool(benches))
    server = None
    if benches:
        missing = ["the server itself is not asked here"]
        case, server = on_server(as_is(case), benches)
    question = replace(question, delay_s=DELAY_LIMIT_S / case.session.scale)
    case, search, advice = steady(under(case, question), question)
    known = tell.facts(case, advice)
    tell.show_headline(case, advice)
    tell.show_options({"": (case, advice)})
    paragraph(f"evidence: {evidence(case)}")
    tell.show_command(case, advice, known["ttft_by_prompt"])
    if benches:
        tell.show_bench(case, advice, "restart the server so, then run this")
    elif options.gpu:
        say(case, advice, question, [options.model, *options.question])
    measured = confirm(case, advice, testbed) if testbed and not missing else []
    final = settled(advice, measured)
    if missing:
        paragraph(f"not measured: {missing[0]}")
    else:
        tell.show_confirmed(advice, measured)
    if final != advice.best.setting:
        console.print(f"paste: {tell.serve_arguments(case, final)}")
    path = options.report / f"recommend-{case.session.testbed}-{slug(case.model)}"
    answer = {"format": 2, "testbed": case.session.testbed, **known, "vllm_serve": tell.serve_arguments(case, final)}
    answer |= {"server": server} if server else {}
    answer |= {"recommended": asdict(final), "measured": [tell.finite(asdict(entry)) for entry in measured]}
    where = testbed.title if testbed else f"{options.tp or 1} {options.gpu}"
    files = [Path(f"{path}.json"), *tell.draw(case, search, advice, where, path)]
    write_whole(files[0], to_json(answer))
    console.print(written(*files))
    result(**answer, files=files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
