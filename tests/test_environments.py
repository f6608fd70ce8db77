"""The Dockerfile, the conda environment and the extras give the versions that the tests have run with."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Not pinned: what is built against the torch that is installed, and what only the slow tests of one machine need.
UNPINNED = ("cuda", "fuzz")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
PYTHONS: list[str] = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pins(python: str) -> dict[str, str]:
    """Returns the version of each package that constraints.txt names for a Python."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    environment = {"python_version": python}
    found: dict[str, str] = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert canonicalize_name(requirement.name) not in found, f"{requirement.name} is pinned twice"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def asked_for(python: str) -> Iterator[Requirement]:
    """Yields what the project and its extras ask for with a Python on Linux."""
    texts = [*PROJECT["dependencies"], *(text for name in EXTRAS if name not in UNPINNED for text in EXTRAS[name])]
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if marker is None or marker.evaluate({"python_version": python, "sys_platform": "linux"}):
            yield requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_tested_version_within_its_range(python: str) -> None:
    tested = pins(python)
    for requirement in asked_for(python):
        if requirement.name == PROJECT["name"]:
            continue
        assert canonicalize_name(requirement.name) in tested, f"{requirement.name} is not in constraints.txt"
        version = tested[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} does not allow {version}"


def test_the_images_install_extras_with_the_tested_versions() -> None:
    installs = re.findall(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert {re.search(r"\[(\w+)\]", line)[1] for line in installs} == {"gpu", "tpu"}  # type: ignore[index]
    assert all(line.startswith("-c /opt/jax-simpo/constraints.txt '/opt/jax-simpo[") for line in installs)
    assert re.findall(r"^FROM python:(\d+\.\d+)-slim", DOCKERFILE, re.MULTILINE)[0] in PYTHONS


def test_the_image_of_the_tpu_launch_file_is_the_dockerfiles() -> None:
    stages = re.findall(r"^FROM base AS (\w+)$", DOCKERFILE, re.MULTILINE)
    for launch in ("multi-gpu.sh", "gke-tpu.yaml"):
        built = re.findall(r"docker build --target (\w+)", (ROOT / "configs/launch" / launch).read_text())
        assert built and set(built) <= set(stages), launch


def test_the_conda_environment_has_a_tested_python_and_the_tested_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    python = next(text.partition("=")[2] for text in packages if text.startswith("python="))
    assert python in PYTHONS
    assert pip == {"pip": ["-c constraints.txt", "-e ."]}
