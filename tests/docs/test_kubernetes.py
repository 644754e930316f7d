"""The manifests fit Kubernetes' own schemas (the package kubernetes-validate carries them) and, for KubeRay, its types.

KubeRay's CRD is in no package, so the fields of ``ray.io/v1`` around the pods are checked against a list typed in here from
``rayjob_types.go`` and ``raycluster_types.go``: names, types and what is required, not the operator's own rules.
"""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from engines.target import target
from pipeline.executors.nodes import accelerator

ROOT = Path(__file__).parents[2]
VERSION = "1.33"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "docker" / name).read_text(encoding="utf-8")))


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    """A Kubernetes type: an unknown field is a mistake, as `kubectl apply --validate=strict` has it."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TEXT, WHOLE, SWITCH, OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
GROUP = {"rayStartParams": TEXTS, "template": OBJECT}
CLUSTER = fields(
    ["headGroupSpec"],
    headGroupSpec=fields(
        ["rayStartParams", "template"], **GROUP, serviceType=TEXT, headService=OBJECT, enableIngress=SWITCH
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
            **GROUP,
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            numOfHosts=WHOLE,
            scaleStrategy=OBJECT,
        ),
    },
    rayVersion=TEXT,
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=OBJECT,
    headServiceAnnotations=TEXTS,
    suspend=SWITCH,
)
RAY_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=OBJECT,
    spec=fields(
        [],
        entrypoint=TEXT,
        rayClusterSpec=CLUSTER,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        shutdownAfterJobFinishes=SWITCH,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        submitterPodTemplate=OBJECT,
        submitterConfig=OBJECT,
        metadata=TEXTS,
        clusterSelector=TEXTS,
        managedBy=TEXT,
        runtimeEnvYAML=TEXT,
        jobId=TEXT,
        entrypointResources=TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        suspend=SWITCH,
    ),
)


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def check_ray_job(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAY_JOB)
    for group in groups(job):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_the_server_s_objects_fit_kubernetes() -> None:
    for document in documents("kubernetes.yaml"):
        assert kubernetes_validate.validate(document, VERSION, strict=True) == VERSION


def test_the_ray_job_fits_kuberay_and_its_pods_kubernetes() -> None:
    job, claim = documents("kuberay.yaml")
    check_ray_job(job)
    kubernetes_validate.validate(claim, VERSION, strict=True)


BROKEN = {
    "a field that KubeRay lacks": lambda job: job["spec"].update(entryPoint="x"),
    "a count that is text": lambda job: groups(job)[1].update(replicas="1"),
    "a start parameter that is a number": lambda job: groups(job)[0]["rayStartParams"].update({"num-cpus": 0}),
    "no template": lambda job: groups(job)[1].pop("template"),
    "a field that a container lacks": lambda job: groups(job)[0]["template"]["spec"]["containers"][0].update(gpu=1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ray_job_is_refused(name: str) -> None:
    job = copy.deepcopy(documents("kuberay.yaml")[0])
    BROKEN[name](job)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_ray_job(job)


def test_the_ray_job_s_parts_belong_together() -> None:
    job, claim = documents("kuberay.yaml")
    head, *workers = groups(job)
    # One image everywhere: other software on a node is refused. Its Ray is the one that the operator is told of.
    (image,) = {group["template"]["spec"]["containers"][0]["image"] for group in (head, *workers)}
    recipe = (ROOT / "docker/build.Dockerfile").read_text(encoding="utf-8")
    assert f"-t {image} " in recipe
    assert re.findall(r"ARG RAY=(\S+)", recipe) == [job["spec"]["rayClusterSpec"]["rayVersion"]]
    # Only the head has the build directory, and it does none of the work.
    claims = [
        [
            v["persistentVolumeClaim"]["claimName"]
            for v in g["template"]["spec"]["volumes"]
            if "persistentVolumeClaim" in v
        ]
        for g in (head, *workers)
    ]
    assert claims == [[claim["metadata"]["name"]], *([] for _ in workers)]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in workers:
        spec = group["template"]["spec"]
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert accelerator(target(group["groupName"])) in spec["nodeSelector"]["nvidia.com/gpu.product"]
    for group in (head, *workers):
        spec = group["template"]["spec"]
        assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} == {
            v["name"] for v in spec["volumes"]
        }


def test_the_ray_job_s_command_is_ours() -> None:
    from typer.main import get_command

    from pipeline.cli import app

    python, dash_m, module, name, *rest = shlex.split(documents("kuberay.yaml")[0]["spec"]["entrypoint"])
    assert (python, dash_m, module, name) == ("python", "-m", "pipeline", "build")
    command: Any = get_command(app)
    context = command.commands["build"].make_context("build", rest)  # refuses a flag that is not there
    assert context.params["require_built"] is True
    assert context.meta["pipeline.overrides"] == {"executor": "ray"}
