"""Does the metadata service of the cloud answer, how fast, and what stands in the way. One request for each thing to know."""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from spotguard._time import format_seconds
from spotguard.notices.platforms import Cloud
from spotguard.ops.doctor.asking import Answer, ask
from spotguard.ops.doctor.findings import Finding

__all__ = ["Asked", "examine_metadata"]

_AZURE = "http://169.254.169.254"
_TOKEN, _TTL = "X-aws-ec2-metadata-token", "X-aws-ec2-metadata-token-ttl-seconds"
_NETWORK = "allow 169.254.169.254 in the network policy and the firewall; without it only signals are heard"


class Asked(NamedTuple):
    """What was found out.

    Attributes:
        findings: To say.
        skew_s: How far the service's clock is ahead of ours; None where it has not said.
    """

    findings: list[Finding]
    skew_s: float | None = None


def examine_metadata(
    cloud: Cloud | None, environment: Mapping[str, str] | None = None, *, azure: str = _AZURE
) -> Asked:
    """Ask the service of the cloud we are on.

    Args:
        cloud: Which; None asks nobody.
        environment: Of the process, which may name other addresses.
        azure: Address of Azure's, which no variable names.
    """
    env = os.environ if environment is None else environment
    if cloud == "aws":
        return _aws(env)
    if cloud == "google":
        return _google(env)
    if cloud == "azure":
        return _azure(azure)
    return Asked([])


def _aws(env: Mapping[str, str]) -> Asked:
    base = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "").rstrip("/")
    if not base:
        ipv6 = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        base = "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"
    wanted = "/latest/meta-data/spot/instance-action"
    token = ask(base, "/latest/api/token", {_TTL: "21600"}, method="PUT")
    without = ask(base, wanted)  # IMDSv1: also tells a PUT that hangs from a service that is not there
    if token.status != 200 or not token.body:
        return Asked([_aws_without_token(token, without, base)], without.skew_s)
    header = {_TOKEN: token.body}
    answer = ask(base, wanted, header)
    if not answer.ok:
        return Asked(
            [Finding("metadata", "warning", f"EC2's metadata service gives a token, and then {answer}", _NETWORK)]
        )
    text = f"EC2's metadata service answers (IMDSv2, {format_seconds(token.seconds + answer.seconds)})"
    findings = [Finding("metadata", "ok", text)]
    if answer.status == 200:
        findings.append(Finding("notice", "warning", f"a notice stands: {answer.body}", "this machine is about to go"))
    kind = ask(base, "/latest/meta-data/instance-life-cycle", header)
    if kind.status == 200:
        findings.append(_kind_of_machine(spot=kind.body == "spot", said=kind.body))
    if without.ok:
        fix = "aws ec2 modify-instance-metadata-options --instance-id ... --http-tokens required"
        text = "IMDSv1 is on as well: whoever can make a program here fetch a URL can read the credentials of the role"
        findings.append(Finding("imds", "info", text, fix))
    return Asked(findings, answer.skew_s)


def _aws_without_token(token: Answer, without: Answer, base: str) -> Finding:
    """IMDSv2 does not work; what is in its way. See docs/explanation/notices.md."""
    if token.status == 403 or without.status == 403:
        fix = "aws ec2 modify-instance-metadata-options --instance-id ... --http-endpoint enabled"
        return Finding("metadata", "problem", "EC2's metadata service is switched off: no notice can be heard", fix)
    if token.timed_out and (without.ok or without.status == 401):
        machine = ask(base, "/latest/meta-data/instance-id")
        identity = machine.body if machine.status == 200 else "i-..."
        fix = f"aws ec2 modify-instance-metadata-options --instance-id {identity} --http-put-response-hop-limit 2 --http-endpoint enabled"
        text = (
            "the token that was asked for does not come back, though the service is there: "
            "its hop limit is 1, and a container is one hop more"
        )
        if without.ok:
            return Finding("hop-limit", "warning", f"{text}. Notices are read by IMDSv1 meanwhile", fix)
        return Finding("hop-limit", "problem", f"{text}. IMDSv1 is off too, so no notice can be heard", fix)
    if without.ok:
        return Finding(
            "metadata",
            "ok",
            f"EC2's metadata service answers by IMDSv1 ({format_seconds(without.seconds)}); a token: {token}",
        )
    return Finding("metadata", "problem", f"EC2's metadata service does not answer: {token}", _NETWORK)


def _google(env: Mapping[str, str]) -> Asked:
    names = ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP")
    host = next((env[name] for name in names if env.get(name)), "metadata.google.internal")
    path, header = "/computeMetadata/v1/instance", {"Metadata-Flavor": "Google"}
    answer = ask(host, f"{path}/preempted", header)
    if not answer.ok:
        return Asked([Finding("metadata", "problem", f"Google's metadata service does not answer: {answer}", _NETWORK)])
    if answer.headers.get("metadata-flavor") != "Google":
        text = f"{host} answers, and is not Google's metadata service: 'Metadata-Flavor: Google' is missing"
        return Asked([Finding("metadata", "problem", text, "see who has that name or address")])
    findings = [Finding("metadata", "ok", f"Google's metadata service answers ({format_seconds(answer.seconds)})")]
    if answer.body.upper() == "TRUE":
        findings.append(Finding("notice", "warning", "preempted=TRUE stands", "this machine is about to go"))
    kind = ask(host, f"{path}/scheduling/provisioning-model", header)
    if kind.status != 200:
        kind = ask(host, f"{path}/scheduling/preemptible", header)
    if kind.status == 200:
        findings.append(_kind_of_machine(spot=kind.body.upper() in ("SPOT", "TRUE"), said=kind.body))
    return Asked(findings, answer.skew_s)


def _azure(base: str) -> Asked:
    header = {"Metadata": "true"}
    machine = ask(base, "/metadata/instance/compute?api-version=2021-02-01", header)
    if machine.status != 200:
        return Asked([Finding("metadata", "problem", f"Azure's metadata service does not answer: {machine}", _NETWORK)])
    findings = [Finding("metadata", "ok", f"Azure's metadata service answers ({format_seconds(machine.seconds)})")]
    try:
        about = json.loads(machine.body)
        findings.append(_kind_of_machine(spot=about.get("priority") == "Spot", said=about.get("priority") or "Regular"))
    except (ValueError, AttributeError):
        findings.append(
            Finding("metadata", "warning", "what it says of this machine is not JSON", "see who answers there")
        )
    events = ask(base, "/metadata/scheduledevents?api-version=2020-07-01", header)
    if events.status == 200:
        findings.append(Finding("events", "ok", f"Scheduled Events answer ({format_seconds(events.seconds)})"))
    elif events.timed_out:
        text = "Scheduled Events do not answer yet: the first request of a machine switches them on, which takes up to two minutes"
        findings.append(
            Finding("events", "info", text, "ask again in two minutes; the guard waits for them in the background")
        )
    else:
        findings.append(Finding("events", "warning", f"Scheduled Events do not answer: {events}", "ask again"))
    return Asked(findings, machine.skew_s)


def _kind_of_machine(*, spot: bool, said: str) -> Finding:
    if spot:
        return Finding("machine", "ok", f"this is a spot machine ({said})")
    return Finding("machine", "info", f"this is not a spot machine ({said}): nobody preempts it")
