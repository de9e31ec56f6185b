"""Does the metadata service of the cloud answer, how fast, and what stands in the way. One request for each thing to know."""

import json
import os
from collections.abc import Mapping
from typing import Any

from spotguard._time import format_seconds
from spotguard.notices.platforms import Cloud
from spotguard.ops.doctor.asking import Answer, Asked, ask
from spotguard.ops.doctor.ec2 import ADDRESSES, examine_ec2
from spotguard.ops.doctor.findings import NETWORK, Finding, kind_of_machine, standing

__all__ = ["examine_metadata"]

_AZURE = "http://169.254.169.254"


def examine_metadata(
    cloud: Cloud | None, environment: Mapping[str, str] | None = None, *, ec2: Mapping[str, str] = ADDRESSES
) -> Asked:
    """Ask the service of the cloud we are on.

    Args:
        cloud: Which; None asks nobody.
        environment: Of the process, which may name other addresses.
        ec2: Addresses of EC2's, where it does not: by IPv4, and by ``ipv6``.
    """
    env = os.environ if environment is None else environment
    if cloud == "aws":
        return examine_ec2(env, ec2)
    if cloud == "google":
        return _google(env)
    if cloud == "azure":
        return _azure(env.get("SPOTGUARD_AZURE_ENDPOINT") or _AZURE)
    return Asked([])


def _google(env: Mapping[str, str]) -> Asked:
    names = ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP")
    host = next((env[name] for name in names if env.get(name)), "metadata.google.internal")
    path, header = "/computeMetadata/v1/instance", {"Metadata-Flavor": "Google"}
    answer = ask(host, f"{path}/preempted", header)
    if not answer.ok:
        return Asked([Finding("metadata", "problem", f"Google's metadata service does not answer: {answer}", NETWORK)])
    if answer.headers.get("metadata-flavor") != "Google":
        text = f"{host} answers, and is not Google's metadata service: 'Metadata-Flavor: Google' is missing"
        return Asked([Finding("metadata", "problem", text, "see who has that name or address")])
    findings = [Finding("metadata", "ok", f"Google's metadata service answers ({format_seconds(answer.seconds)})")]
    if answer.body.upper() == "TRUE":
        findings.append(standing("Google", "preempted=TRUE"))
    event = ask(host, f"{path}/maintenance-event", header)
    if event.status == 200 and event.body.upper() not in ("NONE", ""):
        findings.append(standing("Google", f"maintenance-event={event.body}"))
    kind = ask(host, f"{path}/scheduling/provisioning-model", header)
    if kind.status != 200:
        kind = ask(host, f"{path}/scheduling/preemptible", header)
    if kind.status == 200:
        findings.append(kind_of_machine(spot=kind.body.upper() in ("SPOT", "TRUE"), said=kind.body))
    return Asked(findings, answer.skew_s)


def _azure(base: str) -> Asked:
    header = {"Metadata": "true"}
    machine = ask(base, "/metadata/instance/compute?api-version=2021-02-01", header)
    if machine.status != 200:
        return Asked([Finding("metadata", "problem", f"Azure's metadata service does not answer: {machine}", NETWORK)])
    findings = [Finding("metadata", "ok", f"Azure's metadata service answers ({format_seconds(machine.seconds)})")]
    about = _object(machine.body)
    if about:
        findings.append(kind_of_machine(spot=about.get("priority") == "Spot", said=about.get("priority") or "Regular"))
    else:
        text = "what it says of this machine is not JSON"
        findings.append(Finding("metadata", "warning", text, "see who answers there"))
    events = ask(base, "/metadata/scheduledevents?api-version=2020-07-01", header)
    return Asked([*findings, *_azure_events(events, str(about.get("name")))], machine.skew_s)


def _azure_events(answer: Answer, name: str) -> list[Finding]:
    if answer.timed_out:
        text = "Scheduled Events do not answer yet: the first request of a machine switches them on, which takes up to two minutes"
        fix = "ask again in two minutes; the guard waits for them in the background"
        return [Finding("events", "info", text, fix)]
    if answer.status != 200:
        return [Finding("events", "warning", f"Scheduled Events do not answer: {answer}", "ask again")]
    findings = [Finding("events", "ok", f"Scheduled Events answer ({format_seconds(answer.seconds)})")]
    events = _object(answer.body).get("Events")
    for event in events if isinstance(events, list) else []:
        resources = event.get("Resources") if isinstance(event, dict) else None
        if isinstance(resources, list) and name.casefold() in [str(one).casefold() for one in resources]:
            begin = f" not before {event['NotBefore']}" if event.get("NotBefore") else ""
            findings.append(standing("Azure", f"{event.get('EventType')}{begin}"))
    return findings


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
