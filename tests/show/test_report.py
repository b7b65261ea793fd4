from __future__ import annotations

import html.parser
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, serving_run

from analysis.judge.load import find_runs
from analysis.show import report
from analysis.show.views import View
from experiments.engine.session import run_session
from experiments.records.errors import SpecError
from experiments.records.provenance import sha256
from experiments.records.store import Run, to_json, write_whole
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
NAMES = {"smoke": "smoke-cpu", "fig9a": "fig9a-cpu", "fig9b": "fig9b-cpu"}


def seal(runs: Path, figure: str, platform: str = "cpu") -> Path:
    """A run of the fake engine with two replicates, laid out like a bag as far as the report reads one."""
    bed = load_testbed("cpu")
    run = Run(runs / NAMES[figure], {"figure": figure})
    if figure == "fig9b":
        for trial in serving_run(replicates=2).trials:
            run.write_trial(trial.facts["session"], trial.facts["trial"], trial.facts, trial.record)
    for session in expand(load_figure(figure), bed, 2) if figure != "fig9b" else []:
        for result in run_session(session, [trial.name for trial in session.trials], FakeEngine):
            run.write_trial(result.session, result.trial, result.facts, result.record)
    bag = run.folder / f"bag-{run.id}-1"
    bag.mkdir()
    run.open.rename(bag / "data")
    plan = {"figure": figure, "testbed": "cpu", "testbed_title": bed.title, "scale": 8, "platform": platform}
    plan |= {"commit": {"commit": None, "modified": None}, "sessions": {}, "not_run": []}
    (bag / "data" / "plan.json").write_text(to_json(plan | {"identity": {"figure": figure}}))
    (bag / "tagmanifest-sha256.txt").write_text(f"{sha256(bag / 'data' / 'plan.json')}  stands for all\n")
    return bag


def claim(**more: Any) -> dict[str, Any]:
    return {
        "id": "C3",
        "figure": "fig9a",
        "statement": "Smaller chunks cost more.",
        "source": "Section 5.4.1",
        "rule": "ordering",
        "margin_reason": "none needed",
        "scope": ["a100", "cpu"],
        "run": "smoke-cpu",
        "title": "smoke on testbed cpu",
        "simulated": False,
        "verdict": "PASS",
        "reason": "the ratio is 1.25 (1.21 to 1.29)",
        "numbers": {"ratio": 1.25, "ratios": [1.2, 1.3], "by_length": [{"prompt_length": 4096, "ratio": 1.24}], "p": None},
        "published": {"verdict": "contradicts", "value": 1.17, "detail": "1.170"},
    } | more


def judged(bag: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": bag.parent.name,
        "title": "smoke on testbed cpu (title)",
        "figure": "smoke",
        "testbed": "cpu",
        "simulated": False,
        "bags": [{"name": bag.name, "tagmanifest_sha256": sha256(bag / "tagmanifest-sha256.txt")}],
        "integrity": [],
        "gates": [{"gate": "requests finished", "ok": True, "detail": "18 of 18"}],
        "aside": [],
        "replicates": 2,
        "noise": 0.031,
        "engine": {"engine": "vllm", "vllm": "0.32.0"},
        "machine": {"type": "cpu x 2", "gpus": []},
        "commit": {"commit": "0123abc", "modified": True},
        "models": ["mistral-7b"],
        "not_run": [],
    } | more


def verdict(runs: list[dict[str, Any]], claims: list[dict[str, Any]], overall: str = "PASS") -> dict[str, Any]:
    made = "2026-11-22T00:00:00+00:00"
    return {"format": 1, "overall": overall, "status": 0, "made": made, "claims": claims, "runs": runs}


class Page(html.parser.HTMLParser):
    """What a page holds: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    seal(folder, "smoke")
    seal(folder, "fig9a")
    return folder


def bag_of(runs: Path, figure: str) -> Path:
    return find_runs(runs)[NAMES[figure]][0]


def make(runs: Path, out: Path, data: Any) -> Page:
    out.mkdir(parents=True, exist_ok=True)
    (out / "verdict.json").write_text(json.dumps(data))
    assert report.main(["--runs", str(runs), "--report", str(out)]) == 0
    return Page((out / "index.html").read_text())


def test_one_self_contained_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [judged(bag_of(runs, "fig9a")), judged(bag_of(runs, "smoke"))]
    page = make(runs, tmp_path / "report", verdict(parts, [claim(), claim(id="C4", verdict="NOT-RUN", run=None, title=None)]))
    said = f"report written to {tmp_path / 'report' / 'index.html'}\n{tmp_path / 'report'}: "
    assert re.fullmatch(re.escape(said) + r"[\d.]+ [kM]B, in [\d.]+ (s|min)\n", capsys.readouterr().out)
    made = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {f"{name}.{suffix}" for name in ("fig9a-cpu", "smoke-cpu") for suffix in ("png", "svg")}
    assert made == {"verdict.json", "index.html", *pictures}
    text = (tmp_path / "report" / "index.html").read_text()
    assert not re.search(r"https?:|//[a-z]", text)
    assert not page.all("script")
    assert not page.all("object")
    sources = [str(attrs[key]) for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in text
    assert "@import" not in text


def test_what_a_reviewer_looks_for(runs: Path, tmp_path: Path) -> None:
    page = make(runs, tmp_path, verdict([judged(bag_of(runs, "fig9a"))], [claim(), claim(id="C4", verdict="NOT-RUN")]))
    for said in ("✓ PASS", "1 NOT-RUN", "The ratio is 1.25 (1.21 to 1.29).", "contradicts this (1.17)", "3.1 %", "modified"):
        assert said in re.sub(r"\s+", " ", page.text)
    for said in ("vLLM 0.32", "float32", "interleaved", "random token ids", "median of 5", "asynchronous", "divided by 8"):
        assert said in page.text
    assert sha256(bag_of(runs, "fig9a") / "tagmanifest-sha256.txt") in page.text
    assert "Finished but not judged by the last make verify: smoke-cpu." in page.text
    questions = ("Does Figure 9 hold?", "Does it still hold on today's engine and GPUs?", "Which chunk size should I take?")
    places = [page.text.rindex(said) for said in (*questions, "Runs and provenance")]
    assert places == sorted(places)


def test_accessible(runs: Path, tmp_path: Path) -> None:
    page = make(runs, tmp_path, verdict([judged(bag_of(runs, "fig9a"))], [claim()]))
    assert page.all("html")[0]["lang"] == "en"
    assert any(attrs.get("name") == "viewport" for attrs in page.all("meta"))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.tags}
    (image,) = page.all("img")
    assert "chunk size 512: " in str(image["alt"])
    assert ", published 1.00 to 1.19" in str(image["alt"])
    assert len(page.all("caption")) == 2  # a table behind the picture for each of its models
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = {str(attrs["aria-labelledby"]) for _, attrs in page.tags if "aria-labelledby" in attrs}
    assert named <= set(ids)
    assert all("tabindex" in attrs for attrs in page.all("div") if attrs.get("class") == "scroll")


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1, as WCAG 2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_contrast_is_at_least_aa_in_light_and_in_dark() -> None:
    style = (Path(report.__file__).parent / "report.html.j2").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in style.split("prefers-color-scheme: dark", 1))
    assert {"ink", "soft", "link", "page", "ground", "warning"} <= set(dark)
    for scheme in (light, light | dark):
        for name, ground in product(("ink", "soft", "link"), ("page", "ground", "warning")):
            assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
    assert (
        min(contrast(light[name], "#ffffff") for name in ("pass", "fail", "unsure", "none")) >= 4.5
    )  # badges are alike in both


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(colour) + 0.05 for colour in (one, other))
    return high / low


def test_hostile_strings_are_only_text(runs: Path, tmp_path: Path) -> None:
    fields = ("id", "statement", "source", "rule", "margin_reason", "title", "run", "verdict", "reason")
    hostile_claim = claim(**dict.fromkeys(fields, HOSTILE), numbers={HOSTILE: [{HOSTILE: HOSTILE}], "a": {"b": HOSTILE}})
    hostile_claim |= {"scope": [HOSTILE], "published": {"verdict": HOSTILE, "value": HOSTILE, "detail": HOSTILE}}
    part = judged(bag_of(runs, "smoke"), title=HOSTILE, machine={"type": HOSTILE, HOSTILE: 1}, engine=[HOSTILE, {"x": HOSTILE}])
    part |= {"gates": [{"gate": HOSTILE, "ok": False, "detail": HOSTILE}], "aside": [HOSTILE], "models": [HOSTILE]}
    part |= {"commit": {"commit": HOSTILE}, "not_run": [HOSTILE], "noise": HOSTILE}
    broken = judged(bag_of(runs, "fig9a"), title=HOSTILE, integrity=[f"changed: {HOSTILE}"])
    page = make(runs, tmp_path, verdict([part, broken], [hostile_claim], HOSTILE) | {"made": HOSTILE})
    assert HOSTILE in page.text
    assert not page.all("script")
    assert len(page.all("img")) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_older_and_newer_verdicts_are_shown_as_far_as_they_go(runs: Path, tmp_path: Path) -> None:
    bag = bag_of(runs, "smoke")
    part = {key: judged(bag)[key] for key in ("name", "bags")} | {"brand_new": 1}
    page = make(runs, tmp_path, verdict([part], [{"id": "C1", "verdict": "PASS", "reason": "", "new": {}}]))
    assert "C1" in page.text
    assert len(page.all("img")) == 1
    assert "No claim was judged. To measure both figures" in make(runs, tmp_path, {"format": 1}).text


def test_a_simulated_run_says_so(tmp_path: Path) -> None:
    bag = seal(tmp_path / "runs", "smoke", "simulated")
    data = verdict([judged(bag, simulated=True)], [claim(simulated=True)])
    page = make(tmp_path / "runs", tmp_path / "report", data)
    assert page.text.count("SIMULATED") == 4  # above the verdicts, at the claim, at the figure, at the run
    assert str(page.all("img")[0]["alt"]).startswith("SIMULATED ")
    assert "simulated: mistral-7b, 2 replicates" in page.text
    measured = make(tmp_path / "runs", tmp_path / "report", verdict([judged(bag)], [claim()]))
    assert "SIMULATED" not in measured.text


def test_todays_engine_stands_beside_the_papers(tmp_path: Path) -> None:
    bag = seal(tmp_path / "runs", "smoke", "simulated")
    beds = {"a100-2024-sim": ("PASS", 1.31), "a100-sim": ("INCONCLUSIVE", 1.02)}
    parts = [judged(bag, name=f"fig9a-{bed}", testbed=bed, simulated=True, unreadable="stands for it") for bed in beds]
    claims = [
        claim(run=f"fig9a-{bed}", simulated=True, verdict=said, numbers={"ratio": ratio, "low": 1.0, "high": 1.5})
        for bed, (said, ratio) in beds.items()
    ]
    for bed in beds:
        (tmp_path / "runs" / f"fig9a-{bed}").symlink_to(bag.parent)
    text = " ".join(make(tmp_path / "runs", tmp_path / "report", verdict(parts, claims)).text.split())
    table = text[text.index("today's engine a100-sim") :]
    assert table.index("the paper's engine a100-2024-sim") < table.index("1.020 (1.000 to 1.500)") < table.index("1.310 (")


def test_what_does_not_apply_is_folded_and_what_would_settle_a_claim_is_a_command(runs: Path) -> None:
    more = "make -k verify report"
    cases = [
        ({"numbers": {"ratio": 1.1, "replicates_needed": 8}}, f"make fig9a TESTBED=cpu REPLICATES=8 && {more}"),
        ({"numbers": {}}, f"make fig9a TESTBED=cpu OUT=artifacts/again && {more} OUT=artifacts/again"),
        ({"numbers": {"ratio": 1.1}, "simulated": True}, f"make fig9a TESTBED=a100 && {more}"),
        ({"numbers": {"ratio": 1.1, "replicates_needed": 9}, "simulated": True}, "No replicate lessens the simulator's error."),
        ({"verdict": "NOT-RUN", "figure": "fig9b", "run": None}, f"make fig9b && {more}"),
    ]
    for changes, command in cases:
        still_open = claim(verdict="INCONCLUSIVE", run="fig9a-cpu") | changes
        part = judged(bag_of(runs, "fig9a"), simulated=changes.get("simulated", False))
        claims = [claim(id="C1", verdict="NOT-APPLICABLE"), claim(), still_open]
        page = Page(report.render(verdict([part], claims), views={}, advice={}, answers=[], unjudged=[]))
        text = " ".join(page.text.split())
        assert command in text
        assert text.index("C3 Smaller") < text.index("1 not applicable") < text.index("C1 Smaller")
        assert "1 ✓ PASS" in text[text.rindex("Does Figure 9 hold?") : text.index("For a reviewer")]


def test_a_simulation_says_its_error_and_folds_what_it_passes(runs: Path) -> None:
    part, view = judged(bag_of(runs, "smoke"), simulated=True), View((), (), error="mistral-7b prefill time 12.6%")
    data = verdict([part], [claim(simulated=True)])
    text = " ".join(Page(report.render(data, views={"smoke-cpu": view}, advice={}, answers=[], unjudged=[])).text.split())
    order = (
        "Does it still hold on today's engine",
        "1 ✓ PASS",
        "smoke-cpu: mistral-7b prefill time 12.6%",
        "1 PASS, each with",
    )
    places = [text.index(words, text.index("For a reviewer")) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("question", "traffic", "row"),
    [
        ({"targets": {"tbt_p99": 0.1}}, {}, "mistral-7b a100 P99 TBT 0.1 s the highest 768 3.34 (2.9 to 3.85) requests/s"),
        (
            {"goodput": 0.95, "targets": {"ttft_p50": 1}, "rate": 2.5},
            {},
            "0.95 of the requests with P50 TTFT 1 s 2.5 requests/s 768 3",
        ),
        ({}, {"arrivals": "closed", "number": 16.0}, "a100 none 16 users 768 3.34 (2.9 to 3.85) s"),
    ],
)
def test_the_advice_that_is_there_is_shown_the_answer_first(
    question: dict[str, Any], traffic: dict[str, Any], row: str, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "recommend-cpu-mistral-7b.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    answer = {"model": "mistral-7b", "calibration": "a100", "value": 3.34, "low": 2.9, "high": 3.85}
    answer |= {"question": {"targets": {}, "rate": None, "goodput": None} | question, "best": {"setting": {"budget": 768}}}
    data = {"format": 2, "answers": [answer | {"traffic": {"arrivals": "poisson", "number": 0.0} | traffic}]}
    (tmp_path / "capacity-a100-sim.json").write_text(json.dumps(data))
    (tmp_path / "capacity-old.json").write_text(json.dumps({"format": 1}))
    page = make(runs, tmp_path, verdict([], []))
    (image,) = page.all("img")
    assert str(image["src"]).startswith("data:image/svg+xml;base64,")
    text = " ".join(page.text.split())
    section = text[text.rindex("Which chunk size should I take?") :]
    assert section.index(row) < section.index("make recommend MODEL=mistral-7b TBT_P99=0.1")


def test_the_serving_view(tmp_path: Path) -> None:
    bag = seal(tmp_path / "runs", "fig9b")
    page = make(tmp_path / "runs", tmp_path / "report", verdict([judged(bag)], [claim()]))
    alts = [str(attrs["alt"]) for attrs in page.all("img")]
    # the figure, the trade-off; for each model the gaps at two QPS and two trials
    assert len(alts) == 2 + 2 * (2 + 2)
    assert all("trace synthetic-sharegpt" in alt and "scale 1:8" in alt for alt in alts)
    assert "mistral-7b, QPS 1 (3.15 requests/s): chunk size 256: P50 TTFT " in alts[0]
    stems = {path.stem for path in (tmp_path / "report").glob("*.svg")}
    trials = {"mistral-7b-seed42-qps3-chunk256", "mistral-7b-seed42-qps3-chunk1024"}
    trials |= {"yi-34b-seed42-qps1-chunk512", "yi-34b-seed42-qps1-chunk2048"}
    gaps = {"mistral-7b-qps1", "mistral-7b-qps3", "yi-34b-qps0.55", "yi-34b-qps1"}
    wanted = {"", "-tradeoff", *(f"-tbt-{name}" for name in gaps), *(f"-trial-{name}" for name in trials)}
    assert stems == {f"fig9b-cpu{name}" for name in wanted}
    text = re.sub(r"\s+", " ", page.text)
    assert "The paper publishes no numbers for Figure 9b" in text
    assert "mistral-7b, 2 replicates" in text
    folded = page.tags.index(("summary", {}), page.tags.index(("img", page.all("img")[1])))  # only the first two stand open
    assert page.tags.index(("img", page.all("img")[2])) > folded
    table = text[text.index("P50 TTFT ms, mean") :]
    assert table.index(" 256 ") < table.index(" 512 ") < table.index(" 1024 ")
    assert len(page.all("caption")) == 2


def test_the_numbers_of_a_claim_are_in_the_order_of_reading(runs: Path, tmp_path: Path) -> None:
    numbers = {
        "low": 1.1,
        "p_fail": 1.0,
        "p_pass": 0.01,
        "ratio": 1.2,
        "replicates": 5,
        "high": 1.3,
        "a_new_one": 7,
        "level": 0.025,
        "replicates_needed": None,
    }
    assert list(report.ordered(numbers)) == ["ratio", "low", "high", "replicates", "p_pass", "p_fail", "level", "a_new_one"]
    page = make(runs, tmp_path, verdict([judged(bag_of(runs, "smoke"))], [claim(numbers=dict(sorted(numbers.items())))]))
    said = page.text[page.text.index("Numbers") :]
    assert "replicates needed" not in said
    assert "adjusted: by Holm" in said
    assert said.index("ratio") < said.index("high") < said.index("replicates") < said.index("p pass") < said.index("a new one")


def test_a_broken_gate_is_told_beside_the_picture(runs: Path, tmp_path: Path) -> None:
    gates = [{"gate": "machine noise", "ok": False, "detail": "0.31 of a step, limit 0.25"}]
    page = make(runs, tmp_path, verdict([judged(bag_of(runs, "smoke"), gates=gates)], [claim(verdict="INCONCLUSIVE")]))
    assert "Nothing is concluded from this run. Broken: machine noise." in page.text
    assert "0 of 1 hold" in page.text
    assert any("open" in attrs for attrs in page.all("details"))


def test_a_broken_bag_has_no_picture(runs: Path, tmp_path: Path) -> None:
    bag = bag_of(runs, "smoke")
    broken = judged(bag, integrity=[f"changed: {bag.name}/data/plan.json", "unlisted: x"])
    page = make(runs, tmp_path, verdict([broken], [claim(verdict="FAIL")], "FAIL"))
    assert "data/plan.json and 1 more" in page.text
    assert not page.all("img")
    assert not list(tmp_path.glob("*.png"))


def test_no_verdict_no_report(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ((None, "run make verify first"), ("{", "cannot be read"), ("[]", "format 'list'"), ('{"format": 9}', "format 9"))
    for text, said in cases:
        if text is not None:
            (tmp_path / "verdict.json").write_text(text)
        assert report.main(["--runs", str(runs), "--report", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1
        assert "make verify" in error
    assert not (tmp_path / "index.html").exists()


def test_a_verdict_of_other_runs_is_refused(runs: Path, tmp_path: Path) -> None:
    bag, found = bag_of(runs, "smoke"), find_runs(runs)
    other = judged(bag, bags=[{"name": bag.name, "tagmanifest_sha256": "0" * 64}])
    with pytest.raises(SpecError, match="is not what was judged; run make verify again"):
        report.draw(other, found, tmp_path)
    with pytest.raises(SpecError, match="is not what was judged"):  # a bag of more replicates, sealed after the verdict
        report.draw(judged(bag, bags=[]), found, tmp_path)
    with pytest.raises(SpecError, match="its bags are gone"):
        report.draw(judged(bag, name="fig9a-a100"), found, tmp_path)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "index.html"
    write_whole(page, "old")
    assert page.stat().st_mode & 0o777 == 0o644

    def fail(self: Path, target: Path) -> Path:
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_whole(page, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
