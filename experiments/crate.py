"""The run described as a Process Run Crate (RO-Crate): what was run, with which software, from what, when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from experiments.store import to_json

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
LICENSE = "https://spdx.org/licenses/Apache-2.0"


def describe_run(plan: Mapping[str, Any], files: Sequence[str], times: Sequence[str], engine: Mapping[str, Any]) -> str:
    """ro-crate-metadata.json as text.

    plan: figure, testbed, title, commit. files: payload paths that the run left. times: ISO stamps of its trials.
    engine: its facts.
    """
    crate = ROCrate(version="1.1")
    crate.name = f"{plan['figure']} on testbed {plan['testbed']}"
    crate.description = f"{plan['title']}: raw records of every trial. {plan['testbed_title']}."
    crate.license = crate.add(ContextEntity(crate, LICENSE, {"@type": "CreativeWork", "name": "Apache License 2.0"}))
    profile = crate.add(
        ContextEntity(crate, PROFILE, {"@type": ["CreativeWork", "Profile"], "name": "Process Run Crate", "version": "0.5"})
    )
    crate.root_dataset["conformsTo"] = profile
    properties = {
        "@type": "SoftwareApplication",
        "name": engine["engine"],
        "softwareVersion": str(engine.get("calibration") or engine.get(engine["engine"])),
    }
    properties["url"] = "https://docs.vllm.ai/"
    tool = crate.add(ContextEntity(crate, "#engine", properties))
    author = crate.add(ContextEntity(crate, "#operator", {"@type": "Person", "name": "anonymous (double-blind review)"}))
    inputs = [crate.add_file(dest_path=name, properties={"name": name}) for name in ("figure.yaml", "testbed.yaml")]
    results = [crate.add_file(dest_path=name, properties={"name": name}) for name in files]
    action = {
        "@type": "CreateAction",
        "name": f"Run of {plan['figure']}",
        "description": f"commit {plan['commit']['commit']}, tree {'modified' if plan['commit']['modified'] else 'clean'}",
        "startTime": min(times),
        "endTime": max(times),
        "actionStatus": "http://schema.org/CompletedActionStatus",
    }
    run = crate.add(ContextEntity(crate, "#run", action))
    run["instrument"], run["agent"], run["object"], run["result"] = tool, author, inputs, results
    crate.root_dataset["mentions"] = [run]
    return to_json(crate.metadata.generate())
