"""The files that bring clusters up: valid by Ray's own rules, and by what golf-ray takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cli_runner import golf_ray
from hypothesis import given
from hypothesis import strategies as st

import golf_ray as package
from golf_ray.cli.submit import remote_command
from golf_ray.deploy import CLUSTER_FILE, RAYJOB_FILE, Settings, rendered
from golf_ray.errors import UsageError

S3 = "s3://bucket/golf?endpoint_override=minio:9000&scheme=http"
SETTINGS = [Settings(), Settings(storage=S3, num_nodes=1, image="host:5000/golf:1@sha256:ab")]


def cluster(settings: Settings) -> dict[str, Any]:
    return dict(yaml.safe_load(rendered(CLUSTER_FILE, settings)))


def rayjob(settings: Settings) -> dict[str, Any]:
    [document] = yaml.safe_load_all(rendered(RAYJOB_FILE, settings))
    return dict(document)


def lines_of(value: Any) -> Iterator[str]:
    """Every command in a launcher's file."""
    for name, commands in value.items():
        if name.endswith("commands"):
            yield from commands


# Ray's cluster launcher -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_launcher_takes_the_cluster(settings: Settings) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = cluster(settings)
    # Before defaults are filled in, all of it must be known to the schema.
    validate_config({**config, "cluster_synced_files": []})
    validate_config(prepare_config(cluster(settings)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_cluster_is_a_head_without_gpus_and_nodes_of_eight(settings: Settings) -> None:
    config = cluster(settings)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head" and set(types) == {"head", "gpu_8"}
    assert types["head"]["resources"]["GPU"] == 0 and types["gpu_8"]["resources"]["GPU"] == 8
    assert types["gpu_8"]["min_workers"] == config["max_workers"] == settings.num_nodes
    start = {part: config[f"{part}_start_ray_commands"][-1] for part in ("head", "worker")}
    assert "--num-gpus=0" in start["head"] and "--num-gpus=8" in start["worker"]
    assert "--address=$RAY_HEAD_IP:6379" in start["worker"]
    assert any("RAY_AUTH_MODE=token" in option for option in config["docker"]["run_options"])
    for line in lines_of(config):
        shlex.split(line)


# KubeRay ----------------------------------------------------------------------------------------


def pods(job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Groups and the one container of each."""
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        yield group, container


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_rayjob_is_one(settings: Settings) -> None:
    job = rayjob(settings)
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = {
        "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "rayClusterSpec",
    }  # fmt: skip
    assert set(job["spec"]) == known
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    import ray

    assert cluster["rayVersion"] == ray.__version__
    names = [port["name"] for port in next(pods(job))[1]["ports"]]
    assert names == ["gcs-server", "dashboard", "client"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_worker_has_eight_gpus_and_the_head_none(settings: Settings) -> None:
    (head, first), *workers = pods(rayjob(settings))
    assert "nvidia.com/gpu" not in str(first) and head["rayStartParams"]["num-gpus"] == "0"
    assert workers
    for group, container in workers:
        for kind in ("requests", "limits"):
            assert container["resources"][kind]["nvidia.com/gpu"] == 8
        assert group["rayStartParams"]["num-gpus"] == "8"
        assert group["minReplicas"] == group["replicas"] == settings.num_nodes
        assert group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pods_are_consistent(settings: Settings) -> None:
    for group, container in pods(rayjob(settings)):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["envFrom"] == [{"secretRef": {"name": "golf-ray-s3", "optional": True}}]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        if settings.image is not None:
            assert container["image"] == settings.image


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_entrypoint_is_a_golf_ray_command(settings: Settings) -> None:
    program, *argv = shlex.split(rayjob(settings)["spec"]["entrypoint"])
    assert program == "golf-ray" and argv[0] == "sweep"
    # Nothing is added: the address is there already.
    assert remote_command(argv) == argv
    assert argv[argv.index("--address") + 1] == "auto"
    assert argv[argv.index("--storage") + 1] == settings.storage


@pytest.mark.parametrize("name", [CLUSTER_FILE, RAYJOB_FILE])
def test_commands_in_the_comments_are_commands(name: str) -> None:
    """What a reader is told to type parses, too."""
    text = rendered(name, Settings()).replace("\\\n#", "")
    told = [line.split("#", 1)[1].split(" > ")[0].split("  #")[0].strip()
            for line in text.splitlines() if line.startswith("#   golf-ray ")]  # fmt: skip
    assert told
    for line in told:
        program, *argv = shlex.split(line.replace("\\", ""))
        assert program == "golf-ray"
        if "--" in argv:
            remote_command(argv[argv.index("--") + 1 :])


# Settings ---------------------------------------------------------------------------------------

PLAIN = st.text(alphabet="ab0_@%+=:,./?&~-", min_size=1, max_size=30)


@given(PLAIN, PLAIN, st.integers(1, 1000))
def test_whatever_the_values_they_arrive(storage: str, image: str, num_nodes: int) -> None:
    settings = Settings(storage=storage, image=image, num_nodes=num_nodes)
    assert cluster(settings)["docker"]["image"] == image
    job = rayjob(settings)
    assert [container["image"] for _, container in pods(job)] == [image, image]
    assert shlex.split(job["spec"]["entrypoint"])[-1] == storage
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == num_nodes


@pytest.mark.parametrize("storage", ["", "a b", "a\nb", 'a"b', "a'b", "$(x)", "a#b", "a\\b"])
def test_values_that_could_be_something_else_are_refused(storage: str) -> None:
    with pytest.raises(UsageError, match="may not stand in these files"):
        Settings(storage=storage)


def test_the_verb_prints_the_files() -> None:
    done = golf_ray("submit", "--print-rayjob", "--storage", S3, "--nodes", 3)
    assert done.status == 0 and not done.err
    assert f"golf-ray:{package.__version__}" in done.out and yaml.safe_load(done.out)
    done = golf_ray("submit", "--print-cluster-yaml", "--nodes", 3)
    assert done.status == 0 and yaml.safe_load(done.out)["max_workers"] == 3
    assert "bad 'a b'" not in done.out
    both = golf_ray("submit", "--print-cluster-yaml", "--print-rayjob")
    assert both.status == 2 and "two things" in both.error
    assert golf_ray("submit", "--print-rayjob", "--storage", "a b").status == 2
