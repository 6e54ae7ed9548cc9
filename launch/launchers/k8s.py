"""Kubernetes manifests for a run. They are printed, not applied; each pod runs ``launch run --node_rank``.

Three kinds: an indexed Job, whose pods find each other through a headless Service; a PyTorchJob of Kubeflow's training
operator; a TrainJob of Kubeflow Trainer on a torch runtime. The resolved config is in a ConfigMap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.hosts.hostfile import UsageError
from launch.watch.report import PREEMPTED

PORT = 29500
# The variable with a pod's index, and the address of pod 0 (NAME: the run's name). Kubernetes replaces $(VARIABLE) in
# arguments.
_MEETING = {
    "Job": ("JOB_COMPLETION_INDEX", f"NAME-0.NAME:{PORT}"),
    "PyTorchJob": ("RANK", f"NAME-master-0:{PORT}"),
    "TrainJob": ("PET_NODE_RANK", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"),
}
_NAME_WAIT_S = 1800  # a pod's name resolves only after the pod was scheduled
_CONFIG = "/etc/megatron_lite"
_CONTAINERS = {"Job": "ranks", "PyTorchJob": "pytorch", "TrainJob": "node"}  # operators look for these names
_DERIVED = ("mesh", "checkpoint_bytes")  # printed by `megatron_lite config --ranks`, but not part of the config
_FATAL = (2, 3, 4, 6)  # exit codes that a restart would repeat: usage, data, checkpoint, non-finite loss


def manifest(settings: Mapping[str, Any], nodes: int, nproc: int, max_restarts: int) -> list[dict[str, Any]]:
    """The Kubernetes objects for a run of ``settings`` (a resolved config) on ``nodes`` pods of ``nproc`` ranks each.

    Raises UsageError.
    """
    options = settings["launch"]["k8s"]
    if not options["image"]:
        raise UsageError("--launch.k8s.image=IMAGE is missing: an image in which `python -m launch` works")
    if mistakes := list(_mistakes(options)):
        raise UsageError("\n".join(mistakes))
    name = object_name(settings["run"]["name"])
    grace = settings["launch"]["slurm"]["signal_seconds"] or 30
    kind = options["kind"]
    argv = ["python", "-m", "launch", "run", f"{_CONFIG}/config.yaml", f"--nproc={nproc}"]
    if nodes > 1:
        index, first = _MEETING[kind]
        argv += [f"--nodes={nodes}", f"--node_rank=$({index})", f"--rdzv={first.replace('NAME', name)}"]
        argv += [f"--rdzv_wait={_NAME_WAIT_S}"]
    labels = {"app.kubernetes.io/name": "megatron-lite", "app.kubernetes.io/instance": name}
    meta = {"name": name, **({"namespace": options["namespace"]} if options["namespace"] else {}), "labels": labels}
    template = {"metadata": {"labels": labels}, "spec": _pod(name, argv, options, grace)}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**meta, "name": f"{name}-config"},
        "data": {"config.yaml": to_yaml({key: settings[key] for key in settings if key not in _DERIVED})},
    }
    if kind == "PyTorchJob":
        return [config, _pytorch_job(meta, template, nodes, max_restarts)]
    if kind == "TrainJob":
        return [config, _train_job(meta, template["spec"], options["runtime"], nodes, nproc, max_restarts)]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {
            "clusterIP": "None",
            "selector": labels,
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    return [config, service, _job(meta, template, name, nodes, max_restarts)]


def _mistakes(options: Mapping[str, Any]) -> Iterator[str]:
    """Options that the cluster or its scheduler would refuse, one line each."""
    if re.search(r"\s", options["image"]):
        yield f"launch.k8s.image={options['image']!r}: expected the name of an image, without spaces"
    if options["namespace"] and not _LABEL.fullmatch(options["namespace"]):
        yield f"launch.k8s.namespace={options['namespace']!r}: expected up to 63 of a-z, 0-9 and dashes"
    for key in ("secrets", "volumes"):
        for name in options[key]:
            if len(name) > 253 or not _NAME.fullmatch(name):
                yield f"launch.k8s.{key}: {name!r}: expected a name of a-z, 0-9, dashes and dots"
    if options["kind"] == "TrainJob" and options["secrets"]:
        yield "launch.k8s.secrets: a TrainJob cannot take variables from Secrets; the runtime's container can (envFrom)"
    if options["runtime"] is not None and options["kind"] != "TrainJob":
        yield f"launch.k8s.runtime is for kind=TrainJob, not {options['kind']}"
    if options["runtime"] is not None and not _NAME.fullmatch(options["runtime"]):
        yield f"launch.k8s.runtime={options['runtime']!r}: expected a name of a-z, 0-9, dashes and dots"
    paths = [_CONFIG, "/dev/shm"]
    for path in options["volumes"].values():
        if not path.startswith("/") or ":" in path or path in paths:
            yield f"launch.k8s.volumes: {path!r}: expected an absolute path, without a colon, not {' or '.join(paths)}"
        paths.append(path)
    for key, size in {"shm": options["shm"], **{f"resources.{k}": v for k, v in options["resources"].items()}}.items():
        if not _QUANTITY.fullmatch(size):
            yield f"launch.k8s.{key}={size!r}: expected a quantity, as in 500m, 8 or 64Gi"


_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_QUANTITY = re.compile(r"(\d+(\.\d*)?|\.\d+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?", re.A)


def object_name(run: str) -> str:
    """The run's name as a Kubernetes name: up to 40 lower-case letters, digits and dashes, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower())
    name = (name if name[:1].isalpha() else f"run-{name}")[:40].strip("-")
    return name or "run"


def _pod(name: str, argv: list[str], options: Mapping[str, Any], grace: int) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options["shm"]}},
    ]
    mounts = [{"name": "config", "mountPath": _CONFIG}, {"name": "shm", "mountPath": "/dev/shm"}]
    for number, (claim, path) in enumerate(options["volumes"].items()):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    container: dict[str, Any] = {
        "name": _CONTAINERS[options["kind"]],
        "image": options["image"],
        "command": argv[:4],
        "args": argv[4:],
        "volumeMounts": mounts,
    }
    if options["resources"]:
        container["resources"] = {"requests": options["resources"], "limits": options["resources"]}
    if options["secrets"]:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in options["secrets"]]
    return {
        "restartPolicy": "Never" if options["kind"] == "Job" else "OnFailure",
        "terminationGracePeriodSeconds": grace,
        **({"subdomain": name} if options["kind"] == "Job" else {}),
        "containers": [container],
        "volumes": volumes,
    }


def _job(meta: dict[str, Any], template: dict[str, Any], name: str, nodes: int, max_restarts: int) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": nodes * max_restarts,  # each lost rank makes every pod fail once
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "ranks", "operator": "In", "values": list(_FATAL)},
                    },
                    {
                        "action": "Ignore",
                        "onExitCodes": {"containerName": "ranks", "operator": "In", "values": [PREEMPTED]},
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": template,
        },
    }


def _pytorch_job(meta: dict[str, Any], template: dict[str, Any], nodes: int, max_restarts: int) -> dict[str, Any]:
    master: dict[str, Any] = {"replicas": 1, "restartPolicy": "OnFailure", "template": template}
    replicas = {"Master": master}
    if nodes > 1:
        replicas["Worker"] = {**master, "replicas": nodes - 1}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": meta,
        "spec": {"runPolicy": {"backoffLimit": max_restarts}, "pytorchReplicaSpecs": replicas},
    }


def _train_job(
    meta: dict[str, Any], pod: dict[str, Any], runtime: str | None, nodes: int, nproc: int, max_restarts: int
) -> dict[str, Any]:
    """Pod settings are a patch of the runtime's pod template; the launcher in each pod does the restarts."""
    (container,) = pod["containers"]
    trainer = {
        "image": container["image"],
        "command": container["command"],
        "args": [*container["args"], *([f"--max_restarts={max_restarts}"] if max_restarts else [])],
        "numNodes": nodes,
        "numProcPerNode": nproc,
    }
    if "resources" in container:
        trainer["resourcesPerNode"] = container["resources"]
    patch = {
        "terminationGracePeriodSeconds": pod["terminationGracePeriodSeconds"],
        "volumes": pod["volumes"],
        "containers": [{"name": container["name"], "volumeMounts": container["volumeMounts"]}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": meta,
        "spec": {
            "runtimeRef": {"name": runtime or "torch-distributed"},
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "megatron-lite",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
                }
            ],
        },
    }


def documents(objects: Sequence[Mapping[str, Any]]) -> str:
    """The objects as one stream of YAML."""
    return "---\n".join(map(to_yaml, objects))


def to_yaml(tree: Mapping[str, Any]) -> str:
    """``tree`` (dictionaries, lists, strings, numbers, booleans, None) as YAML that reads back as the same tree."""
    return "\n".join(_lines(tree)) + "\n"


def _lines(value: Any) -> Iterator[str]:
    """The lines of a mapping or list, without outer indentation."""
    for key, item in value.items() if isinstance(value, Mapping) else ((None, item) for item in value):
        lead = "-" if key is None else f"{_scalar(key)}:"
        if isinstance(item, Mapping | list | tuple) and item:
            inner = list(_lines(item))
            if key is None:  # the first line stands beside the dash
                yield f"- {inner[0]}"
                yield from (f"  {line}" for line in inner[1:])
            else:
                yield lead
                yield from (f"  {line}" for line in inner)
        elif isinstance(item, str) and _BLOCK.fullmatch(item):
            yield f"{lead} |"
            yield from (f"  {line}" if line else "" for line in item[:-1].split("\n"))
        else:
            yield f"{lead} {_scalar(item)}"


# Strings that need no quotes: no YAML parser reads them as a number, boolean, date or the like.
_BARE = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf)$)[A-Za-z_/][\w./@-]*(?::[\w./@-]+)*", re.I | re.A)
_BLOCK = re.compile(r"(?=[^ \n])(?:[\x20-\x7e]*\n)*[\x20-\x7e]+\n")  # multi-line text, its first line not indented
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, list | tuple):
        return "[]"
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML 1.1 requires a decimal point in floats
    if not isinstance(value, str):
        return json.dumps(value)
    if _BARE.fullmatch(value):
        return value
    return _UNPRINTABLE.sub(lambda found: f"\\U{ord(found[0]):08x}", json.dumps(value, ensure_ascii=False))
