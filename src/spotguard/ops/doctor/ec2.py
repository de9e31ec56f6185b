"""EC2: does its metadata service answer, at which address and with a token or without, and what does it say of this machine."""

import json
from collections.abc import Mapping

from spotguard._time import format_seconds
from spotguard.ops.doctor.asking import Answer, Asked, ask
from spotguard.ops.doctor.findings import NETWORK, Finding, kind_of_machine, standing

__all__ = ["ADDRESSES", "examine_ec2"]

ADDRESSES = {"": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}
"""Of the service, by ``AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE``."""

_MODE = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
_TOKEN, _TTL = "X-aws-ec2-metadata-token", "X-aws-ec2-metadata-token-ttl-seconds"
_DATA = "/latest/meta-data/"
_CLI = "aws ec2 modify-instance-metadata-options --instance-id"


def examine_ec2(env: Mapping[str, str], addresses: Mapping[str, str] = ADDRESSES) -> Asked:
    """Ask what the source asks, and what else there is to know.

    Args:
        env: May name another address.
        addresses: By mode.
    """
    mode = "ipv6" if env.get(_MODE, "").lower() == "ipv6" else ""
    given = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "").rstrip("/")
    base = given or addresses[mode]
    token = _ask_for_token(base)
    without = ask(
        base, f"{_DATA}spot/instance-action"
    )  # IMDSv1: also tells a PUT that hangs from a service that is not there
    if token.status != 200 or not token.body:
        other = addresses["" if mode else "ipv6"]
        if not given and not token.status and not without.status and _ask_for_token(other).status:
            fix = f"unset {_MODE}" if mode else f"set {_MODE}=ipv6"
            text = f"EC2's metadata service does not answer at {base}, where it is asked, but at {other}"
            return Asked([Finding("metadata", "problem", text, fix)])
        return Asked([_without_token(token, without, base)], without.skew_s)
    header = {_TOKEN: token.body}
    answer = ask(base, f"{_DATA}spot/instance-action", header)
    if not answer.ok:
        text = f"EC2's metadata service gives a token, and then {answer}"
        return Asked([Finding("metadata", "warning", text, NETWORK)])
    text = f"EC2's metadata service answers (IMDSv2, {format_seconds(token.seconds + answer.seconds)})"
    findings = [Finding("metadata", "ok", text)]
    findings += [standing("EC2", answer.body)] if answer.status == 200 else []
    findings += _machine(base, header)
    if without.ok:
        text = "IMDSv1 is on as well: whoever can make a program here fetch a URL can read the credentials of the role"
        findings.append(Finding("imds", "info", text, f"{_CLI} i-... --http-tokens required"))
    return Asked(findings, answer.skew_s)


def _ask_for_token(base: str) -> Answer:
    return ask(base, "/latest/api/token", {_TTL: "21600"}, method="PUT")


def _machine(base: str, header: Mapping[str, str]) -> list[Finding]:
    """What kind of machine it is, and what else is announced for it."""
    findings = []
    names = ("instance-life-cycle", "events/recommendations/rebalance", "autoscaling/target-lifecycle-state")
    kind, rebalance, group = (_value(base, name, header) for name in names)
    if kind:
        findings.append(kind_of_machine(spot=kind == "spot", said=kind))
    if rebalance:
        findings.append(standing("EC2", f"rebalance recommendation {rebalance}"))
    if group == "Terminated":
        findings.append(standing("EC2", "Auto Scaling terminates this instance"))
    elif group:
        text = f"this instance is in an Auto Scaling group ({group}), whose notices are heard too"
        findings.append(Finding("group", "ok", text))
    events = _events(_value(base, "events/maintenance/scheduled", header))
    return findings + [standing("EC2", f"{event.get('Code')} not before {event.get('NotBefore')}") for event in events]


def _value(base: str, name: str, header: Mapping[str, str]) -> str:
    answer = ask(base, _DATA + name, header)
    return answer.body if answer.status == 200 else ""


def _events(text: str) -> list[dict[str, object]]:
    try:
        events = json.loads(text)
    except ValueError:
        return []
    found = events if isinstance(events, list) else []
    return [event for event in found if isinstance(event, dict) and event.get("State") == "active"]


def _without_token(token: Answer, without: Answer, base: str) -> Finding:
    """IMDSv2 does not work; what is in its way. See docs/explanation/notices.md."""
    if token.status == 403 or without.status == 403:
        text = "EC2's metadata service is switched off: no notice can be heard"
        return Finding("metadata", "problem", text, f"{_CLI} i-... --http-endpoint enabled")
    if token.timed_out and (without.ok or without.status == 401):
        machine = _value(base, "instance-id", {}) or "i-..."
        fix = f"{_CLI} {machine} --http-put-response-hop-limit 2 --http-endpoint enabled"
        text = (
            "the token that was asked for does not come back, though the service is there: "
            "its hop limit is 1, and a container is one hop more"
        )
        if without.ok:
            return Finding("hop-limit", "warning", f"{text}. Notices are read by IMDSv1 meanwhile", fix)
        return Finding("hop-limit", "problem", f"{text}. IMDSv1 is off too, so no notice can be heard", fix)
    if without.ok:
        text = f"EC2's metadata service answers by IMDSv1 ({format_seconds(without.seconds)}); a token: {token}"
        return Finding("metadata", "ok", text)
    return Finding("metadata", "problem", f"EC2's metadata service does not answer: {token}", NETWORK)
