"""Where we are running, told without the network: what stops a process there, and how long it leaves us.

A job can sit in several layers at once: a pod on a spot VM, started by torchrun. Each can stop it with a grace of its own, and the
shortest one counts. Nothing here is promised by anybody: notices are best effort, and the periodic checkpoint is the guarantee.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from spotguard.notices.aws import AwsSource
from spotguard.notices.azure import AzureSource
from spotguard.notices.base import NoticeSource
from spotguard.notices.google import GoogleSource

__all__ = ["STOPPED", "Cloud", "Layer", "Platform", "auto_sources", "detect_platform", "reserve_of"]

Cloud = Literal["aws", "google", "azure"]
STOPPED = 143
"""Exit status after a stop: 128 + SIGTERM, as a shell reports it. No scheduler takes it for success."""

_DMI = Path("/sys/class/dmi/id")
_SAGEMAKER = Path("/opt/ml/input/config")  # SageMaker mounts it, whatever the image does with the environment
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"  # cloud-init, ChassisAssetTag.AZURE_CLOUD


@dataclasses.dataclass(frozen=True)
class Layer:
    """One of those that can stop the process.

    Attributes:
        name: In short, as in ``--platform``.
        title: As people say.
        grace_s: Seconds from its signal, or from its notice where it sends none, to the end; None where nobody knows.
        lengthen: How to get more.
        signals: Names of what it may send beside SIGTERM.
        sends: Whether it sends a signal, with that grace. A machine that does not is shut down when its notice has run out; SIGTERM comes
            then, and what is left after it nobody says.
        exit_code: Exit status after a stop that its scheduler understands.
    """

    name: str
    title: str
    grace_s: float | None
    lengthen: str
    signals: tuple[str, ...] = ()
    sends: bool = True
    exit_code: int = STOPPED


@dataclasses.dataclass(frozen=True)
class Platform:
    """Where the process runs.

    Attributes:
        cloud: Whose metadata service can be asked; None where there is none, or it is switched off.
        layers: Who can stop the process, the machine first.
        exit_code: Exit status after a stop: `STOPPED`; 0 where the platform itself restarts what it has interrupted, and takes anything
            else for a failure.

    Example:
        >>> pod = detect_platform({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, dmi=Path("/nowhere"))
        >>> pod.tightest.title, pod.grace_s
        ('Kubernetes', 30.0)
    """

    cloud: Cloud | None = None
    layers: tuple[Layer, ...] = ()
    exit_code: int = STOPPED

    @property
    def tightest(self) -> Layer | None:
        """The layer with the shortest grace that is known."""
        known = [layer for layer in self.layers if layer.grace_s is not None]
        return min(known, key=lambda layer: layer.grace_s or 0.0, default=None)

    @property
    def grace_s(self) -> float | None:
        """The shortest grace, in seconds."""
        return self.tightest.grace_s if self.tightest is not None else None

    @property
    def signal_s(self) -> float | None:
        """The shortest grace that is known from a signal on, in seconds: not the lead of a notice that is heard in another way."""
        known = [layer.grace_s for layer in self.layers if layer.sends and layer.grace_s is not None]
        return min(known, default=None)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of signals to hear beside SIGTERM and SIGINT."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.signals))

    @property
    def title(self) -> str:
        """The layers, as people say."""
        return ", ".join(layer.title for layer in self.layers) or "no platform that is known"


def reserve_of(left_s: float) -> float:
    """Seconds to keep back of a grace of `left_s` seconds: 10 of EC2's 120, 5 of Google's 30, less of less.

    Example:
        >>> [reserve_of(left) for left in (3600, 120, 30, 15, 2)]
        [10.0, 10.0, 5.0, 2.5, 0.3333333333333333]
    """
    return min(10.0, max(0.0, left_s) / 6)


def detect_platform(
    environment: Mapping[str, str] | None = None, *, dmi: Path = _DMI, sagemaker: Path = _SAGEMAKER
) -> Platform:
    """Tell the platform from the environment and what the firmware says of the machine; asks no network.

    Args:
        environment: Of the process; by default that of this one.
        dmi: Where the kernel shows the firmware's strings.
        sagemaker: The folder that is there in a SageMaker training job.
    """
    env = os.environ if environment is None else environment
    cloud = _cloud(env, Path(env.get("SPOTGUARD_DMI") or dmi))  # a rehearsal has another machine in mind
    layers = [_MACHINES[cloud]] if cloud is not None else []
    marked = {layer.name for mark, layer in _LAYERS if any(env.get(name) for name in mark.split("|"))}
    if sagemaker.is_dir():
        marked.add("sagemaker")
    found = [layer for _, layer in _LAYERS if layer.name in marked]
    layers += [_in_pod(layer, cloud) if layer.name == "kubernetes" else layer for layer in found]
    if env.get("TORCHELASTIC_RUN_ID"):
        layers.append(_torchrun(env))
    exit_code = min([layer.exit_code for layer in layers], default=STOPPED)
    return Platform(cloud if not _is_off(cloud, env) else None, tuple(layers), exit_code)


def auto_sources(platform: Platform, environment: Mapping[str, str] | None = None) -> tuple[NoticeSource, ...]:
    """The sources that fit; none on any rank of a node but the first, for the services throttle by machine.

    A process that is the only one of its world is the first, whatever number is left over in its environment.
    """
    env = os.environ if environment is None else environment
    alone = "1" in (env.get("WORLD_SIZE"), env.get("LOCAL_WORLD_SIZE"))
    if not alone and env.get("LOCAL_RANK", "0") not in ("", "0"):
        return ()
    if platform.cloud == "aws":
        return (AwsSource(),)
    if platform.cloud == "google":
        return (GoogleSource(),)
    if platform.cloud == "azure":
        return (AzureSource(),)
    return ()


def _cloud(env: Mapping[str, str], dmi: Path) -> Cloud | None:
    if env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return "aws"
    if env.get("GCE_METADATA_HOST") or env.get("GCE_METADATA_ROOT"):
        return "google"
    if env.get("SPOTGUARD_AZURE_ENDPOINT"):
        return "azure"
    if _read(dmi / "product_name").startswith("Google"):
        return "google"
    if _read(dmi / "chassis_asset_tag") == _AZURE_TAG:
        return "azure"
    if _read(dmi / "sys_vendor") == "Amazon EC2" or "amazon" in _read(dmi / "product_version").lower():
        return "aws"
    return None


def _is_off(cloud: Cloud | None, env: Mapping[str, str]) -> bool:
    name = {"aws": "AWS_EC2_METADATA_DISABLED", "google": "NO_GCE_CHECK"}.get(cloud or "", "")
    return env.get(name, "").lower() == "true"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _in_pod(layer: Layer, cloud: Cloud | None) -> Layer:
    """Kubernetes on a machine that is going to be taken away: its grace is cut short by what the machine has left."""
    if cloud == "google":  # GKE, spot VMs: the last 15 s of the 30 are for the pods of the system
        text = "GKE leaves pods on spot VMs 15 s; terminationGracePeriodSeconds above that helps elsewhere only"
        return dataclasses.replace(layer, grace_s=15.0, lengthen=text)
    if cloud == "aws":
        text = f"{layer.lengthen}; on spot, below EC2's two minutes by what the drain takes to begin: 90 s, say"
        return dataclasses.replace(layer, lengthen=text)
    return layer


def _torchrun(env: Mapping[str, str]) -> Layer:
    try:
        grace = float(env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", ""))
    except ValueError:
        grace = 30.0
    return Layer("torchrun", "torchrun", grace, "start it with --shutdown-timeout=SECONDS (torch 2.12 or later)")


_MACHINES = {
    "aws": Layer("aws", "EC2", 120.0, "EC2's two minutes cannot be lengthened", sends=False),
    "google": Layer(
        "gcp",
        "Compute Engine",
        30.0,
        "create the VM with --preemption-notice-duration=120s, and name the source: "
        "notices=[GoogleSource(notice_duration=120)]; after SIGTERM it is 30 s all the same",
    ),
    "azure": Layer("azure", "Azure", 30.0, "Azure's 30 seconds cannot be lengthened", sends=False),
}

# The environment variables by which each is known, and its defaults; sources of the figures are in docs/explanation/notices.md.
_LAYERS = (
    (
        "ECS_CONTAINER_METADATA_URI_V4|ECS_CONTAINER_METADATA_URI",
        Layer("ecs", "ECS", 30.0, "set stopTimeout in the container definition, up to 120 s"),
    ),
    (
        "AWS_BATCH_JOB_ID",
        Layer(
            "batch",
            "AWS Batch",
            30.0,
            "Batch's 30 s cannot be lengthened; EC2's notice, which is polled, comes earlier",
        ),
    ),
    (
        "TRAINING_JOB_NAME",
        Layer("sagemaker", "SageMaker", 120.0, "SageMaker's 120 s cannot be lengthened", exit_code=0),
    ),
    (
        "KUBERNETES_SERVICE_HOST",
        Layer("kubernetes", "Kubernetes", 30.0, "set terminationGracePeriodSeconds in the pod, and grace= to the same"),
    ),
    (
        "SLURM_JOB_ID",
        Layer(
            "slurm",
            "SLURM",
            30.0,
            "raise GraceTime of the partition, or ask for a signal earlier with --signal=USR1@SECONDS, and set grace=",
            ("SIGUSR1", "SIGUSR2"),
        ),
    ),
    ("RUNPOD_POD_ID", Layer("runpod", "RunPod", 5.0, "RunPod's 5 s cannot be lengthened")),
    ("VAST_CONTAINERLABEL", Layer("vast", "Vast.ai", 10.0, "Vast.ai promises no notice at all")),
    (
        "INVOCATION_ID",
        Layer("systemd", "systemd", 90.0, "set TimeoutStopSec= in the unit; the machine's power-off cuts it short"),
    ),
)
