"""Manifests: what Kubernetes' own schema takes, and what a pod then does."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightkube.models import batch_v1, core_v1

from launch.launchers import k8s
from tests.kit.jobs import PYTHON, run_job
from tests.kit.tiny import tiny_config, tiny_data

MODELS = {"ConfigMap": core_v1.ConfigMap, "Service": core_v1.Service, "Job": batch_v1.Job}


MAPS = {"labels", "selector", "data", "requests", "limits"}  # of free keys, whose values the models leave open
CHOICES = {  # likewise; from the API reference
    "restartPolicy": {"Never", "OnFailure", "Always"},
    "completionMode": {"Indexed", "NonIndexed"},
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "operator": {"In", "NotIn"},
    "status": {"True", "False", "Unknown"},
    "medium": {"", "Memory", "HugePages"},
    "clusterIP": {"", "None"},
}


def check(value: dict[str, Any], model: Any) -> None:
    """``value`` is what the schema says of ``model``: no field missing or unknown, every type and choice right."""
    assert model.from_dict(value).to_dict() == value
    for path, found in walk(value):
        if path[-1] in CHOICES:
            assert found in CHOICES[str(path[-1])], path
        if len(path) > 1 and path[-2] in MAPS:
            assert isinstance(found, str), path


def walk(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Everything in a tree, with the keys and numbers that lead to it."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key), value
        yield from walk(value, (*path, key))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("k8s")
    options = {"image": "example/lite:1", "volumes": {"runs": "/runs"}, "resources": {"cpu": "2"}, "secrets": ["token"]}
    return tiny_config(folder, tiny_data(folder), run__name="My_Run.1", parallel__tp=2, launch__k8s=options)


def printed(config: Path, *words: str) -> list[dict[str, Any]]:
    argv = [PYTHON, "-m", "launch", "k8s", str(config), "--nodes=2", "--nproc=2", *words]
    return list(yaml.safe_load_all(run_job(argv, timeout=60).expect(exit_code=0).stdout))


def test_a_job_and_its_service_fit_the_schema_and_each_other(config: Path) -> None:
    objects = printed(config, "--optim.lr=1e-5", "--launch.k8s.namespace=lab")
    assert [found["kind"] for found in objects] == ["ConfigMap", "Service", "Job"]
    for found in objects:
        check(found, MODELS[found["kind"]])
        assert found["metadata"]["namespace"] == "lab"
    settings, service, job = objects
    assert yaml.safe_load(settings["data"]["config.yaml"])["optim"]["lr"] == 1e-5
    pod = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "my-run-1"
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "launch", "run"]
    assert container["args"] == [
        *("/etc/megatron_lite/config.yaml", "--nproc=2", "--nodes=2"),
        *("--node_rank=$(JOB_COMPLETION_INDEX)", "--rdzv=my-run-1-0.my-run-1:29500"),
        "--rdzv_wait=1800",
    ]
    fatal, saved, drained = job["spec"]["podFailurePolicy"]["rules"]
    assert (fatal["action"], fatal["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4, 6])
    assert (saved["action"], saved["onExitCodes"]["values"], drained["action"]) == ("Ignore", [75], "Ignore")
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}


def spoilt(tree: Any, path: tuple[str | int, ...], change: Callable[[Any, Any], object]) -> Any:
    """A copy in which ``change`` was done to what holds the end of ``path``."""
    copied = inner = copy.deepcopy(tree)
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return copied


def rename(holder: Any, key: Any) -> None:
    holder[f"{key}s"] = holder.pop(key)


def retype(holder: Any, key: Any) -> None:
    holder[key] = 5 if isinstance(holder[key], str) else "5"


def test_the_schema_refuses_each_field_under_another_name_or_type(config: Path) -> None:
    count = 0
    for found in printed(config):
        for path, _ in walk(found):
            named = isinstance(path[-1], str) and not MAPS.intersection(path)
            for change in [retype, rename] if named else [retype]:
                with pytest.raises((AssertionError, ValueError)):
                    check(spoilt(found, path, change), MODELS[found["kind"]])
                count += 1
    assert count > 150
    *_, job = printed(config)
    for path in (("spec", "template"), ("spec", "podFailurePolicy", "rules", 0, "action")):
        with pytest.raises((AssertionError, ValueError)):
            check(spoilt(job, path, lambda holder, key: holder.pop(key)), batch_v1.Job)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("image=a b", "image='a b': expected the name of an image, without spaces"),
        ("namespace=My_Lab", "namespace='My_Lab': expected up to 63 of a-z, 0-9 and dashes"),
        ("secrets=[a, B]", "secrets: 'B': expected a name of a-z, 0-9, dashes and dots"),
        ("volumes={a..b: /x}", "volumes: 'a..b': expected a name of a-z, 0-9, dashes and dots"),
        (
            "volumes={a: /dev/shm}",
            "volumes: '/dev/shm': expected an absolute path, without a colon, not /etc/megatron_lite or /dev/shm",
        ),
        ("shm=8GB", "shm='8GB': expected a quantity, as in 500m, 8 or 64Gi"),
        (
            "kind=TrainJob",
            "secrets: a TrainJob cannot take variables from Secrets; the runtime's container can (envFrom)",
        ),
        ("runtime=torch-2", "runtime is for kind=TrainJob, not Job"),
        ("resources={cpu: two}", "resources.cpu='two': expected a quantity, as in 500m, 8 or 64Gi"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_here(config: Path, option: str, line: str) -> None:
    argv = [PYTHON, "-m", "launch", "k8s", str(config), "--nproc=2", f"--launch.k8s.{option}"]
    result = run_job(argv, timeout=60).expect(exit_code=2, stdout="^$")
    assert result.stderr == f"error: launch.k8s.{line}\n"


def test_the_words_of_a_pod_are_a_run_of_that_config(config: Path, tmp_path: Path) -> None:
    settings, _, job = printed(config)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (tmp_path / "config.yaml").write_text(settings["data"]["config.yaml"])
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"][1:]]
    argv = [PYTHON, "-m", "launch", "run", str(tmp_path / "config.yaml"), *words, "--dry_run"]
    shown = run_job(argv, timeout=60).expect(exit_code=0).stdout
    assert "--nnodes=2 --node-rank=1 --master-addr=my-run-1-0.my-run-1 --master-port=29500" in shown


def test_a_pytorch_job_has_a_master_and_workers_whose_pods_fit_the_schema(config: Path) -> None:
    _, job = printed(config, "--launch.k8s.kind=PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 1}
    for replica in replicas.values():
        check(replica["template"], core_v1.PodTemplateSpec)
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["args"][-3:-1] == ["--node_rank=$(RANK)", "--rdzv=my-run-1-master-0:29500"]


def test_a_train_job_patches_a_runtime_for_torch(config: Path) -> None:
    settings, job = printed(config, "--launch.k8s.kind=TrainJob", "--launch.k8s.secrets=[]", "--max_restarts=2")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(job["spec"]) == {"runtimeRef", "trainer", "runtimePatches"}
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert job["spec"]["trainer"] == {
        "image": "example/lite:1",
        "command": ["python", "-m", "launch", "run"],
        "args": [
            *("/etc/megatron_lite/config.yaml", "--nproc=2", "--nodes=2", "--node_rank=$(PET_NODE_RANK)"),
            *("--rdzv=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)", "--rdzv_wait=1800", "--max_restarts=2"),
        ],
        "numNodes": 2,
        "numProcPerNode": 2,
        "resourcesPerNode": {"requests": {"cpu": "2"}, "limits": {"cpu": "2"}},
    }
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    for volume in pod["volumes"]:
        check(volume, core_v1.Volume)
    for mount in container["volumeMounts"]:
        check(mount, core_v1.VolumeMount)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert settings["metadata"]["name"] == pod["volumes"][0]["configMap"]["name"]


def test_a_manifest_needs_an_image(config: Path) -> None:
    argv = [PYTHON, "-m", "launch", "k8s", str(config), "--nproc=2", "--launch.k8s.image=null"]
    run_job(argv, timeout=60).expect(exit_code=2, stderr="^error: --launch.k8s.image=IMAGE is missing")


@given(st.text())
def test_any_run_has_a_name_that_kubernetes_takes(run: str) -> None:
    name = k8s.object_name(run)
    assert len(name) <= 40
    assert name.isascii()
    assert name.replace("-", "").isalnum()
    assert name == name.lower()
    assert name[0].isalpha()
    assert name[-1] != "-"


WORDS = ["yes", "No", "null", "~", "1e5", "0x1", "1_000", "2026-11-25", "12:30:45", "=", "<<", "- a", "a: b", " a\n"]
TEXT = (
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.text("yn01:.-# \n\t'\"\\{}[]&*!|>%@`~=eEx_,?")
    | st.sampled_from(WORDS)
)
TREES = st.recursive(
    TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, TREES, min_size=1, max_size=3))
def test_what_is_written_reads_back(tree: dict[str, Any]) -> None:
    assert yaml.safe_load(k8s.to_yaml(tree)) == tree
