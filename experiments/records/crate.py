"""The run described as a Process Run Crate (RO-Crate): what was run, with which software, from what, when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from experiments.records.store import to_json

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
LICENSE = "https://spdx.org/licenses/Apache-2.0"


def describe_run(plan: Mapping[str, Any], files: Sequence[str], times: Sequence[str], engine: Mapping[str, Any]) -> str:
    """ro-crate-metadata.json as text. files: payload paths that the run left. times: ISO stamps of its trials."""
    crate = ROCrate(version="1.1")

    def add(identifier: str, kind: object, **properties: object) -> ContextEntity:
        return crate.add(ContextEntity(crate, identifier, {"@type": kind, **properties}))

    crate.name = f"{plan['figure']} on testbed {plan['testbed']}"
    crate.description = f"{plan['title']}: raw records of every trial. {plan['testbed_title']}."
    crate.license = add(LICENSE, "CreativeWork", name="Apache License 2.0")
    crate.root_dataset["conformsTo"] = add(PROFILE, ["CreativeWork", "Profile"], name="Process Run Crate", version="0.5")
    version = str(engine.get("calibration") or engine.get(engine["engine"]))
    software = {"name": engine["engine"], "softwareVersion": version, "url": "https://docs.vllm.ai/"}
    run = add("#run", "CreateAction", name=f"Run of {plan['figure']}", startTime=min(times), endTime=max(times))
    run["description"] = f"commit {plan['commit']['commit']}, tree {'modified' if plan['commit']['modified'] else 'clean'}"
    run["actionStatus"] = "http://schema.org/CompletedActionStatus"
    run["instrument"] = add("#engine", "SoftwareApplication", **software)
    run["agent"] = add("#operator", "Person", name="anonymous (double-blind review)")
    for role, names in (("object", ("figure.yaml", "testbed.yaml")), ("result", files)):
        run[role] = [crate.add_file(dest_path=name, properties={"name": name}) for name in names]
    crate.root_dataset["mentions"] = [run]
    return to_json(crate.metadata.generate())
