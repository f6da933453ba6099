"""What KubeRay's objects may hold (ray.io/v1 as of KubeRay 1.6), and what ours must: each fault is one line.

No KubeRay runs here: its fields are checked against this written list, taken from its API reference; pod templates,
services and all of Kubernetes' own by kubernetes-validate.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

KUBERNETES = "1.31"
"""The oldest release of Kubernetes that the manifests are checked for."""

# type: a Python type; {...}: an object with these fields; [x]: a list of x; "x": one of this file's or Kubernetes' kinds;
# a set: one of its words. A name that ends in ! must be there.
RAY_CLUSTER: dict[str, Any] = {
    "suspend": bool,
    "managedBy": {"ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"},
    "authOptions": {"mode": {"disabled", "token"}, "secretName": str, "enableK8sTokenAuth": bool},
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "idleTimeoutSeconds": int,
        "image": str,
        "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
        "resources": dict,
        "securityContext": dict,
        "env": list,
        "envFrom": list,
        "volumeMounts": list,
    },
    "headServiceAnnotations": dict,
    "enableInTreeAutoscaling": bool,
    "gcsFaultToleranceOptions": {
        "redisAddress!": str,
        "redisUsername": dict,
        "redisPassword": dict,
        "externalStorageNamespace": str,
    },
    "rayVersion": str,
    "headGroupSpec!": {
        "template!": "PodTemplate",
        "rayStartParams!": "strings",
        "headService": "Service",
        "enableIngress": bool,
        "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
    },
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "idleTimeoutSeconds": int,
            "numOfHosts": int,
            "rayStartParams!": "strings",
            "template!": "PodTemplate",
            "scaleStrategy": {"workersToDelete": list},
            "suspend": bool,
        }
    ],
}
RAY_JOB: dict[str, Any] = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "jobId": str,
    "metadata": "strings",
    "clusterSelector": "strings",
    "rayClusterSpec": RAY_CLUSTER,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "submitterPodTemplate": "PodTemplate",
    "submitterConfig": {"backoffLimit": int},
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "entrypointResources": str,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "ttlSecondsAfterFinished": int,
    "shutdownAfterJobFinishes": bool,
    "deletionStrategy": dict,
    "suspend": bool,
    "managedBy": str,
}
RAY_SERVICE: dict[str, Any] = {
    "serveConfigV2!": str,
    "rayClusterConfig!": RAY_CLUSTER,
    "serveService": "Service",
    "upgradeStrategy": {"type": {"NewCluster", "None", "NewClusterWithIncrementalUpgrade"}},
    "excludeHeadPodFromServeSvc": bool,
}
SPECS = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB, "RayService": RAY_SERVICE}

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY_ID|CREDENTIAL")


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def unknown(value: Any, fields: Any, where: str) -> Iterator[str]:
    """What a list of fields does not allow."""
    if isinstance(fields, str):
        yield from _native(value, fields, where)
    elif isinstance(fields, set):
        if value not in fields:
            yield f"{where} is {value!r}: one of {sorted(fields)}"
    elif isinstance(fields, type):
        if not isinstance(value, (int, float) if fields is float else fields) or (fields is int and value is True):
            yield f"{where} is {value!r}: {fields.__name__} wanted"
    elif isinstance(fields, list):
        for index, item in enumerate(value):
            yield from unknown(item, fields[0], f"{where}[{index}]")
    else:
        yield from _object(value, fields, where)


def _object(value: Any, fields: dict[str, Any], where: str) -> Iterator[str]:
    known = {name.removesuffix("!"): inner for name, inner in fields.items()}
    if not isinstance(value, dict):
        yield f"{where} is {value!r}: an object wanted"
        return
    yield from (f"{where}.{name[:-1]} is missing" for name in fields if name.endswith("!") and name[:-1] not in value)
    for name, inner in value.items():
        if name not in known:
            yield f"{where}.{name} is no field of KubeRay's"
        else:
            yield from unknown(inner, known[name], f"{where}.{name}")


def _native(value: Any, kind: str, where: str) -> Iterator[str]:
    """Kubernetes' own objects, and maps of strings."""
    if kind == "strings":
        yield from (
            f"{where}.{name} is {text!r}: a string wanted" for name, text in value.items() if not isinstance(text, str)
        )
        return
    inside = {"template": value} if kind == "PodTemplate" else value
    yield from native({"apiVersion": "v1", "kind": kind, **inside}, where)


def native(document: dict[str, Any], where: str) -> Iterator[str]:
    """What Kubernetes' schema, in strict mode, does not allow."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}: {'.'.join(str(part) for part in error.path)}: {error.message}"


def _cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    found: dict[str, Any] = {"RayCluster": spec}.get(document["kind"]) or spec.get("rayClusterConfig") or {}
    return found


def templates(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of an object, with its name."""
    cluster = _cluster(document)
    if head := cluster.get("headGroupSpec"):
        yield "head", head["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]
    if submitter := document["spec"].get("submitterPodTemplate"):
        yield "submitter", submitter


def _pod_faults(name: str, template: dict[str, Any], image: str) -> Iterator[str]:
    pod = template["spec"]
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{name}: may run as root"
    for container in pod["containers"]:
        if container["image"] != image:
            yield f"{name}: image {container['image']}, and not {image} as everywhere"
        if container.get("securityContext", {}).get("allowPrivilegeEscalation", True):
            yield f"{name}: may raise its privileges"
        if not {"requests", "limits"} <= set(container.get("resources", {})):
            yield f"{name}: no requests and limits"
        for variable in container.get("env", []):
            if _SECRET.search(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"{name}: {variable['name']} is not taken from a secret"


def _cluster_faults(cluster: dict[str, Any]) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token" or not cluster["authOptions"].get("secretName"):
        yield "no token authentication by a secret"
    for group in cluster["workerGroupSpecs"]:
        name, text = group["groupName"], group["rayStartParams"].get("resources", '"{}"')
        try:
            offered = json.loads(json.loads(text))  # KubeRay hands it to a shell, which takes the outer quotes
        except (ValueError, TypeError):
            offered = text
        if offered != {name: 1}:
            yield f"{name}: offers {offered!r} and not {{{name!r}: 1}}"
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{name}: replicas {group['replicas']} outside minReplicas and maxReplicas"
    if missing := {"edge", "cloud"} - {group["groupName"] for group in cluster["workerGroupSpecs"]}:
        yield f"no node group {', '.join(sorted(missing))}"


def faults(document: dict[str, Any], image: str) -> Iterator[str]:
    """What is wrong with one object of ours."""
    kind = document["kind"]
    if kind not in SPECS:
        yield from native(document, kind)
        if kind == "Secret":
            yield "a secret stands in a file"
        for name in document.get("data", {}):
            if _SECRET.search(name):
                yield f"{kind}: {name} belongs in a secret"
        return
    if document["apiVersion"] != "ray.io/v1":
        yield f"apiVersion is {document['apiVersion']!r}: ray.io/v1"
    wrong = list(unknown(document["spec"], SPECS[kind], "spec"))
    yield from wrong
    if wrong:
        return
    if cluster := _cluster(document):
        yield from _cluster_faults(cluster)
    for name, template in templates(document):
        yield from _pod_faults(name, template, image)
