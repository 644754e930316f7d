"""The images' recipes name files, extras and versions that exist. Whether they build takes a Docker engine."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines()]
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def test_there_are_two_images() -> None:
    assert [path.name for path in FILES] == ["build.Dockerfile", "cpu.Dockerfile"]


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
