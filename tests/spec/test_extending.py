"""docs/extending.md, done: a testbed, a model with a figure of its own, a claim."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from analysis.judge import claims
from analysis.judge.verify import verify
from experiments.records.provenance import ROOT
from experiments.run import main
from experiments.spec import spec


def test_a_testbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    testbed = yaml.safe_load((ROOT / "experiments/spec/testbeds/cpu.yaml").read_text())
    testbed |= {"testbed": "laptop", "title": "a laptop of mine", "replicates": 3}
    path = tmp_path / "laptop.yaml"
    path.write_text(yaml.safe_dump(testbed))
    assert main(["fig9a", "--testbed", str(path), "--out", str(tmp_path), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "testbed   laptop (as asked for): a laptop of mine" in printed
    assert "model     mistral-7b: 3 sessions" in printed


def test_a_model_and_a_figure_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Path(shutil.copytree(spec.MODELS, tmp_path / "models"))
    config = json.loads((models / "mistral-7b-w8.json").read_text())
    (models / "mine-w8.json").write_text(
        json.dumps(config | {"_source": "config.json of example/mine", "num_hidden_layers": 3})
    )
    monkeypatch.setattr(spec, "MODELS", models)
    figure = yaml.safe_load((ROOT / "experiments/spec/figures/smoke.yaml").read_text())
    figure["figure"] = "mine"
    figure["panels"][0]["model"] = "mine"
    testbed = yaml.safe_load((ROOT / "experiments/spec/testbeds/cpu.yaml").read_text())
    testbed["models"]["mine"] = "mine-w8"
    for name, data in (("figure", figure), ("testbed", testbed)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    arguments = [str(tmp_path / "figure.yaml"), "--testbed", str(tmp_path / "testbed.yaml"), "--out", str(tmp_path), "--plan"]
    assert main(arguments) == 0
    assert "model     mine: 1 session" in capsys.readouterr().out


def test_a_claim(runs_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Path(shutil.copytree(claims.REFERENCE, tmp_path / "reference"))
    file = reference / "claims.yaml"
    mine = yaml.safe_load(file.read_text())
    own = dict(
        mine["claims"][2], id="M1", statement="At 4k and beyond 512 costs more than 1024.", scope={"platform": ["simulated"]}
    )
    own["statistic"] = {"name": "prefill_overhead", "chunk_size": 512, "against": 1024}
    mine["claims"].append(own)
    file.write_text(yaml.safe_dump(mine))
    monkeypatch.setattr(claims, "REFERENCE", reference)
    found = {entry["id"]: entry for entry in verify(runs_copy)["claims"]}
    assert found["M1"]["verdict"] == "INCONCLUSIVE"  # one replicate
    assert found["M1"]["numbers"]["ratio"] > 0
