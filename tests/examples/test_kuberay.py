"""examples/kuberay.yaml and examples/Dockerfile: fields that KubeRay knows, and what the project says itself.

Neither a cluster nor Docker is at hand. The whole manifest was compared with the schema of KubeRay 1.7.0's
CRD once; `KNOWN` has the names of that schema that a run's manifest may have use for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.cli.app import app
from pipeline.jobs.shipment import Shipment

KNOWN = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        *("activeDeadlineSeconds", "backoffLimit", "entrypoint", "rayClusterSpec", "runtimeEnvYAML"),
        *("shutdownAfterJobFinishes", "submissionMode", "suspend", "ttlSecondsAfterFinished"),
    },
    "spec.rayClusterSpec": {"authOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs"},
    "spec.rayClusterSpec.authOptions": {"enableK8sTokenAuth", "mode", "secretName"},
    "spec.rayClusterSpec.headGroupSpec": {"rayStartParams", "serviceType", "template"},
    "spec.rayClusterSpec.workerGroupSpecs": {
        *("groupName", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas", "template"),
    },
}
NEEDED = {
    "spec.rayClusterSpec.headGroupSpec": {"template"},
    "spec.rayClusterSpec.workerGroupSpecs": {"groupName", "maxReplicas", "minReplicas", "template"},
}
POD = {"containers", "securityContext", "terminationGracePeriodSeconds", "volumes"}
CONTAINER = {"env", "image", "name", "resources", "volumeMounts"}


@pytest.fixture(scope="module")
def manifest(repository: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((repository / "examples" / "kuberay.yaml").read_text())
    return read


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    """Its instructions, each on a line."""
    text = (repository / "examples" / "Dockerfile").read_text()
    return re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))


def objects(manifest: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """Those at a path, also in lists on the way."""
    found: list[Any] = [manifest]
    for key in filter(None, path.split(".")):
        found = [inner for outer in found for inner in _several(outer[key])]
    yield from found


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def locked_ray(repository: Path, name: str) -> str:
    (version,) = re.findall(
        r"^ray(?:\[\w+\])?==(\S+)$", (repository / "requirements" / name).read_text(), re.M
    )
    return str(version)


@pytest.mark.parametrize("path", KNOWN)
def test_the_manifest_has_fields_of_a_ray_job_only(manifest: dict[str, Any], path: str) -> None:
    for found in objects(manifest, path):
        assert set(found) - KNOWN[path] == set()
        assert NEEDED.get(path, set()) - set(found) == set()


def test_it_is_a_ray_job_that_takes_its_cluster_away(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["spec"]["shutdownAfterJobFinishes"] is True
    assert manifest["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_pods_share_an_image_a_volume_and_memory(manifest: dict[str, Any]) -> None:
    head, *workers = pods(manifest)
    assert workers
    images = {pod["containers"][0]["image"] for pod in (head, *workers)}
    assert images == {"REGISTRY/raylign:0.1.0"}
    for pod in (head, *workers):
        assert set(pod) <= POD
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == "raylign"
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert all("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in workers)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]


def test_secrets_are_named_and_not_written_down(manifest: dict[str, Any]) -> None:
    for pod in pods(manifest):
        by_name = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
        for name in ("HF_TOKEN", "WANDB_API_KEY"):
            assert "value" not in by_name[name]
            assert by_name[name]["valueFrom"]["secretKeyRef"]["key"] == name


def test_its_ray_is_the_locked_one(manifest: dict[str, Any], repository: Path) -> None:
    versions = {locked_ray(repository, name) for name in ("cpu.txt", "gpu.txt")}
    assert {manifest["spec"]["rayClusterSpec"]["rayVersion"]} == versions


def test_its_command_is_that_of_a_submitted_job_and_parses(manifest: dict[str, Any]) -> None:
    enter, _, command = manifest["spec"]["entrypoint"].partition(" && exec ")
    assert enter == "cd /shared/my-run"
    *python, verb, config, output, address = shlex.split(command)
    submitted = Shipment([verb], None, {}, {}).entrypoint()  # type: ignore[arg-type]
    # A job's python is looked for first; in the image it is the one of the name.
    assert python[0] == "python"
    assert submitted.endswith(f'exec "$p" {shlex.join([*python[1:], verb])}')
    values = typer.main.get_command(app).commands[verb].make_context(verb, [config, output, address]).params
    assert values["overrides"] == ["output_dir=/shared/my-run/runs/my-run", "ray.address=auto"]


def test_the_image_is_installed_as_the_page_on_clusters_says(dockerfile: str, repository: Path) -> None:
    installs = re.findall(r"pip install --no-cache-dir ([^&\n]*[^&\s])", dockerfile)
    page = (repository / "docs" / "cluster.md").read_text()
    said = [line.replace("-e .", ".") for line in re.findall(r"^pip install (.*)$", page, re.MULTILINE)]
    assert installs == said


def test_the_image_is_made_of_files_that_exist_and_of_all_that_is_installed(
    dockerfile: str, repository: Path
) -> None:
    copied = {
        name for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]
    }
    assert [name for name in copied if not (repository / name).exists()] == []
    project = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "raylign.py"}
    assert copied == {*project, "actors", "pipeline", "assets", "configs", "requirements/gpu.txt"}
    assert re.search(r"^FROM python:3\.11-", dockerfile, re.MULTILINE)
