"""The images' recipes name files, extras and versions that exist. Whether they build takes a Docker engine."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = [ROOT / f"docker/{name}.Dockerfile" for name in ("build", "cpu")]
"""The images that hold the pipeline."""


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines()]
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def test_there_is_one_image_more_for_serving() -> None:
    assert {*(ROOT / "docker").glob("*.Dockerfile")} - {*FILES} == {ROOT / "docker/serve.Dockerfile"}


def test_the_server_s_image_has_the_release_of_the_builder_s_and_the_ports_that_others_name() -> None:
    text, built = ((ROOT / f"docker/{name}.Dockerfile").read_text(encoding="utf-8") for name in ("serve", "build"))
    releases = [re.search(r"ARG \w+_RELEASE=(\S+)", t) for t in (text, built)]
    assert releases[0] is not None
    assert releases[1] is not None
    assert releases[0][1] == releases[1][1]
    (ports,) = re.findall(r"EXPOSE ([\d ]+)", text)
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]
    assert [p.split(":")[1] for p in compose["triton"]["ports"]] == ports.split()
    assert (ROOT / compose["triton"]["build"]["dockerfile"]).is_file()
    for volume in compose["prometheus"]["volumes"]:
        assert (ROOT / "docker" / volume.split(":")[0]).is_file()
    (scraped,) = yaml.safe_load((ROOT / "docker/prometheus.yaml").read_text(encoding="utf-8"))["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == [f"triton:{ports.split()[2]}"]


def test_the_kubernetes_objects_belong_together() -> None:
    deployment, service, claim = yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text(encoding="utf-8"))
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {p["targetPort"] for p in service["spec"]["ports"]} == set(ports)
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert all(container[f"{kind}Probe"]["httpGet"]["port"] in ports for kind in ("startup", "readiness", "liveness"))
    assert any("--model-repository=/models" in a for a in container["args"])
    assert any(m["mountPath"] == "/models" for m in container["volumeMounts"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_is_copied_exists_and_is_not_ignored(path: Path) -> None:
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    ]
    copied = [word for kind, rest in instructions(path) if kind == "COPY" for word in rest.split()[:-1]]
    assert {"pipeline", "calibrators", "engines", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in kept), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_extras_and_the_command_are_the_package_s(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = " ".join(rest for kind, rest in instructions(path) if kind == "RUN")
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    found = dict(instructions(path))
    assert found["ENTRYPOINT"] == '["python", "-m", "pipeline"]'  # the README's command
    assert found["USER"] == "10001"


def test_the_cpu_image_has_the_torch_that_make_installs() -> None:
    wanted = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    given = next(rest for _, rest in instructions(ROOT / "docker/cpu.Dockerfile") if rest.startswith("TORCH="))
    assert wanted is not None
    assert given == f"TORCH={wanted[1]}"


def test_versions_are_pinned_by_argument_and_no_registry_is_built_in() -> None:
    (base,) = [rest for kind, rest in instructions(ROOT / "docker/build.Dockerfile") if kind == "FROM"]
    assert base == "${REGISTRY}/nvidia/tensorrt:${TENSORRT_RELEASE}"
