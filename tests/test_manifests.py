"""KubeRay's manifests: every field known, pods valid in Kubernetes' strict schema; planted mistakes are found."""

import copy
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import kuberay
import pytest
import yaml
from conftest import ENVIRONMENT, ROOT
from ray.serve.schema import ServeDeploySchema

from serve_apps.graph import AppArgs
from serve_apps.placement import options

FOLDER = ROOT / "jobs" / "kuberay"
FILES = ("settings.yaml", "cluster.yaml", "job.yaml", "service.yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"meanet:{PROJECT['version']}"


def one(name: str) -> dict[str, Any]:
    (document,) = kuberay.documents(FOLDER / name)
    return document


def test_the_folder_has_these_files() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_no_fault_is_found(name: str) -> None:
    found = [fault for document in kuberay.documents(FOLDER / name) for fault in kuberay.faults(document, IMAGE)]
    assert found == []


@pytest.mark.parametrize(("name", "count"), [("cluster.yaml", 3), ("service.yaml", 3), ("job.yaml", 1)])
def test_every_pod_was_seen(name: str, count: int) -> None:
    assert len(dict(kuberay.templates(one(name)))) == count


def plant(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value changed; None takes it away."""
    changed = copy.deepcopy(document)
    *way, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    node: Any = changed
    for part in way:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return changed


HEAD = "spec/headGroupSpec"
EDGE = "spec/workerGroupSpecs/0"
POD = f"{EDGE}/template/spec"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("apiVersion", "ray.io/v1alpha1", "ray.io/v1"),
        ("spec/rayversion", "2.60.0", "spec.rayversion is no field of KubeRay's"),
        ("spec/headGroupSpec/rayStartParams", None, "rayStartParams is missing"),
        ("spec/workerGroupSpecs/1/replica", 2, "workerGroupSpecs[1].replica is no field"),
        ("spec/autoscalerOptions/upscalingMode", "Fast", "one of ['Aggressive'"),
        (f"{EDGE}/minReplicas", "1", "int wanted"),
        (f"{EDGE}/minReplicas", 3, "edge: replicas 1 outside"),
        (f"{EDGE}/groupName", "egde", "no node group edge"),
        (f"{HEAD}/rayStartParams/num-cpus", 0, "a string wanted"),
        (f"{EDGE}/rayStartParams/resources", '{"edge": 1}', "edge: offers"),
        (f"{EDGE}/rayStartParams/resources", '"{\\"cloud\\": 1}"', "edge: offers {'cloud': 1}"),
        (f"{POD}/containers/0/imagePulPolicy", "Always", "imagePulPolicy"),
        (f"{POD}/containers/0/resources/limits/memory", ["6Gi"], "memory"),
        (f"{POD}/containers/0/ports", [{"containerPort": "8000"}], "8000"),
        (f"{POD}/containers/0/image", "meanet:latest", "and not meanet:"),
        (f"{POD}/containers/0/env/1", {"name": "AWS_SECRET_ACCESS_KEY", "value": "s3cr3t"}, "not taken from a secret"),
        (f"{POD}/securityContext/runAsNonRoot", None, "edge: may run as root"),
        (f"{POD}/containers/0/securityContext", None, "may raise its privileges"),
        ("spec/authOptions/mode", "disabled", "no token authentication"),
        ("spec/authOptions/secretName", None, "no token authentication"),
    ],
)
def test_a_planted_mistake_is_found(path: str, value: Any, says: str) -> None:
    found = list(kuberay.faults(plant(one("cluster.yaml"), path, value), IMAGE))
    assert any(says in fault for fault in found), found


def test_a_secret_in_a_file_is_found() -> None:
    settings = kuberay.documents(FOLDER / "settings.yaml")[0]
    assert list(kuberay.faults(plant(settings, "data/AWS_SECRET_ACCESS_KEY", "s3cr3t"), IMAGE))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": "v"}}
    assert "a secret stands in a file" in list(kuberay.faults(secret, IMAGE))


def test_the_image_has_the_ray_that_the_manifests_name() -> None:
    clusters = [one("cluster.yaml")["spec"], one("service.yaml")["spec"]["rayClusterConfig"]]
    assert {cluster["rayVersion"] for cluster in clusters} == {metadata.version("ray")}


def test_the_job_selects_the_cluster() -> None:
    assert one("job.yaml")["spec"]["clusterSelector"] == {"ray.io/cluster": one("cluster.yaml")["metadata"]["name"]}


def test_the_secrets_have_one_name_and_are_documented() -> None:
    text = "".join((FOLDER / name).read_text() for name in FILES)
    used = set(re.findall(r"secretKeyRef: \{name: ([\w-]+), key: ([\w-]+)", text))
    guide = (ROOT / "docs" / "deployment.md").read_text()
    for secret, key in used | {("meanet-ray-token", "auth_token")}:
        assert re.search(rf"secret generic {secret}\b[^#]*--from-\w+(-\w+)?={key}=", guide), (secret, key)


def test_the_service_deploys_what_the_yaml_of_serve_apps_does() -> None:
    """The same application with the same arguments, valid for Ray Serve, and each deployment on its own nodes."""
    theirs = yaml.safe_load((ROOT / "serve_apps" / "meanet.yaml").read_text())
    ours = yaml.safe_load(one("service.yaml")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(ours)
    (app,), (usual,) = ours["applications"], theirs["applications"]
    assert (app["name"], app["import_path"]) == (usual["name"], usual["import_path"])
    assert set(app["args"]) == set(usual["args"])
    assert AppArgs(**app["args"]).version == "champion"
    address = kuberay.documents(FOLDER / "settings.yaml")[0]["data"]["MLFLOW_TRACKING_URI"]
    assert app["args"]["tracking_uri"] == address
    assert app["args"]["pin"] == "always"
    assert "deployments" not in app, "its options would stand in place of the code's"
    for name in ("edge", "cloud"):
        assert list(options(1, name, "always", {}, 1.0)["ray_actor_options"]["resources"]) == [name]


def commands() -> list[list[str]]:
    shell = shlex.split(one("job.yaml")["spec"]["entrypoint"])
    assert shell[:2] == ["sh", "-euc"]
    return [shlex.split(command) for command in shell[2].split("&&")]


def test_the_job_takes_a_model_through_its_life() -> None:
    assert [words[:3] for words in commands()] == [
        ["python", "-m", f"jobs.{name}"] for name in ("train", "evaluate", "tune", "register", "promote")
    ]


@pytest.mark.parametrize("words", commands(), ids=lambda words: str(words[2]))
def test_the_job_gives_flags_that_there_are(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *words[1:], "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in (word for word in words if word.startswith("--")):
        assert flag in done.stdout


def folders_that_all_nodes_write() -> list[str]:
    """Given to the job's commands: a study's folder, and a training's whose checkpoints go nowhere else."""
    found = []
    for words in commands():
        given = dict(itertools.pairwise(words))
        if words[2] == "jobs.tune" or (words[2] == "jobs.train" and "--storage" not in given):
            found.append(given["--output"])
    return found


def unshared(folder: str, cluster: dict[str, Any], settings: list[dict[str, Any]]) -> str | None:
    """Why the pods of a cluster do not see a folder as one and the same, if so."""
    claims = set()
    for name, template in kuberay.templates(cluster):
        (container,) = template["spec"]["containers"]
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        above = [one for one in container["volumeMounts"] if Path(folder).is_relative_to(one["mountPath"])]
        if not above:
            return f"{name} does not mount {folder}"
        mount = max(above, key=lambda one: len(one["mountPath"]))
        claim = volumes[mount["name"]].get("persistentVolumeClaim", {}).get("claimName")
        claims.add((claim, mount["mountPath"], mount.get("subPath")))
    if len(claims) != 1 or None in {claim for claim, *_ in claims}:
        return f"{folder} comes from {claims}"
    ((claim, *_),) = claims
    known = {one["metadata"]["name"]: one["spec"] for one in settings if one["kind"] == "PersistentVolumeClaim"}
    return None if "ReadWriteMany" in known[claim]["accessModes"] else f"{claim} is for one node"


def test_what_all_nodes_write_is_one_folder_for_all_of_them() -> None:
    """As `meanet.nodes.check_storage` will ask."""
    folders = folders_that_all_nodes_write()
    assert folders, "the study's at least"
    cluster, settings = one("cluster.yaml"), kuberay.documents(FOLDER / "settings.yaml")
    assert [unshared(folder, cluster, settings) for folder in folders] == [None] * len(folders)


@pytest.mark.parametrize(
    ("file", "path", "value", "says"),
    [
        ("settings.yaml", "spec/accessModes", ["ReadWriteOnce"], "meanet-outputs is for one node"),
        ("cluster.yaml", f"{POD}/containers/0/volumeMounts", [], "edge does not mount /app/outputs/x"),
        ("cluster.yaml", f"{POD}/volumes/1/persistentVolumeClaim", {"claimName": "other"}, "comes from"),
        ("cluster.yaml", f"{POD}/volumes/1", {"name": "outputs", "emptyDir": {}}, "comes from"),
    ],
)
def test_a_folder_that_nodes_do_not_share_is_found(file: str, path: str, value: Any, says: str) -> None:
    cluster, (others, claim) = one("cluster.yaml"), kuberay.documents(FOLDER / "settings.yaml")
    if file == "settings.yaml":
        claim = plant(claim, path, value)
    else:
        cluster = plant(cluster, path, value)
    assert says in (unshared("/app/outputs/x", cluster, [others, claim]) or "")
