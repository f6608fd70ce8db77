"""The images, the conda environment, the extras and the wheel give what was tested, and GitHub's jobs check that."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jax_simpo.doctor.findings import find
from tests.doctor.test_findings import H100

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Not pinned: what is built against the torch that is installed, and what only the slow tests of one machine need.
UNPINNED = ("cuda", "fuzz")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
PYTHONS: list[str] = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
CONFIGS = ("configs", "jax_simpo/configs")  # where they lie in the repository, and in a wheel
# Name of an image -> its Python, and what follows.
IMAGES = {
    name: (python, text)
    for python, name, text in re.findall(
        r"^FROM python:(\d+\.\d+)-slim-\w+ AS (\w+)\n(.*?)(?=^FROM|\Z)",
        (ROOT / "Dockerfile").read_text(),
        re.MULTILINE | re.DOTALL,
    )
}


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


def test_the_wheel_has_every_file_of_the_packages_and_the_configs() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="the build backend is not installed")
    inside = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    for folder, place in (("jax_simpo", "jax_simpo"), ("torch_ref", "torch_ref"), ("parity", "parity"), CONFIGS):
        files = (file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix != ".pyc")
        assert {f"{place}/{file.relative_to(ROOT / folder).as_posix()}" for file in files} <= inside
    sources = [file.read_text() for package in ("jax_simpo", "torch_ref") for file in (ROOT / package).rglob("*.py")]
    named = set(re.findall(r'configs_folder\(\) / "([\w.]+)"', "".join(sources)))
    assert "deepspeed_zero3.json" in named and {f"{CONFIGS[1]}/{name}" for name in named} <= inside


def test_the_tested_versions_name_nothing_of_cuda_and_no_libtpu_as_the_dockerfile_says() -> None:
    for python in PYTHONS:
        named = pins(python)
        assert [name for name in named if name.startswith(("nvidia", "jax-cuda", "libtpu"))] == []


@pytest.mark.parametrize("extra", ["gpu", "tpu"])
def test_each_image_installs_its_extra_with_the_tested_versions(extra: str) -> None:
    python, text = IMAGES[extra]
    assert python in PYTHONS
    (installed,) = re.findall(r"^RUN pip install (.*)$", text, re.MULTILINE)
    assert installed == f"-c /opt/jax-simpo/constraints.txt '/opt/jax-simpo[{extra}]'"
    assert "\nCOPY . /opt/jax-simpo\n" in text and '\nENTRYPOINT ["jax-simpo"]\n' in text


def test_the_gpu_image_has_a_jax_of_which_hopper_gpus_are_not_warned_and_the_tpu_image_the_newest() -> None:
    jax = {extra: pins(python)["jax"] for extra, (python, _) in IMAGES.items()}
    facts = replace(H100, python=f"{IMAGES['gpu'][0]}.9", versions={**H100.versions, "jax": jax["gpu"]})
    assert [finding for finding in find(facts) if "pallas" in finding.text] == []
    assert jax["tpu"] == pins(PYTHONS[-1])["jax"] != jax["gpu"]
    page = (ROOT / "docs/launch.md").read_text()
    for extra, (python, _) in IMAGES.items():
        assert re.search(rf"for {extra.upper()}s, of Python {python}, has jax {jax[extra]}\b", " ".join(page.split()))


def test_the_images_of_the_launch_files_are_the_dockerfiles() -> None:
    for launch in ("multi-gpu.sh", "gke-tpu.yaml"):
        text = (ROOT / "configs/launch" / launch).read_text()
        built = re.findall(r"docker build --target (\w+)", text)
        assert built and set(built) <= IMAGES.keys(), launch
        for copied in re.findall(r"/opt/jax-simpo/(\S+)", text):
            assert (ROOT / copied).is_file(), launch


def test_the_conda_environment_has_a_tested_python_and_the_tested_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    python = next(text.partition("=")[2] for text in packages if text.startswith("python="))
    assert python in PYTHONS
    assert pip == {"pip": ["-c constraints.txt", "-e ."]}


def steps(job: str) -> str:
    """Returns what the steps of a job of the workflow run."""
    return "\n".join(step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step)


def test_the_job_of_the_pages_has_what_their_commands_need_and_may_skip_none() -> None:
    (run,) = (step for step in WORKFLOW["jobs"]["docs"]["steps"] if "tests/test_docs.py" in step.get("run", ""))
    assert run["env"] == {"SKIPS_FAIL": "1"} and '-m "slow or not slow"' in run["run"]
    assert "https://download.pytorch.org/whl/cpu" in run["run"] and "$pip torch\n" in run["run"]
    assert set(re.findall(r"\.\[(.*)\]", run["run"])[0].split(",")) >= {"test", "tensorboard"}


def test_a_skip_fails_where_none_is_allowed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = request.config.hook.pytest_runtest_makereport.get_hookimpls()
    (hook,) = (own.function for own in hooks if getattr(own.plugin, "__file__", "") == str(ROOT / "tests/conftest.py"))

    def outcome(setting: str, **marks: str) -> str:
        monkeypatch.setenv("SKIPS_FAIL", setting)
        made = pytest.TestReport("a test", ("a file", 1, "a test"), {}, "skipped", "no torch", "setup", **marks)
        generator = hook()
        next(generator)
        with pytest.raises(StopIteration) as end:
            generator.send(made)
        return end.value.value.outcome

    assert (outcome("1"), outcome("0"), outcome("1", wasxfail="known")) == ("failed", "skipped", "skipped")


def test_github_runs_what_contributing_says_that_it_runs() -> None:
    runs = "\n".join(steps(job) for job in WORKFLOW["jobs"])
    assert "make test-newest\n" in f"{runs}\n" and "make test " in runs


def test_every_extra_is_resolved_with_every_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WORKFLOW["jobs"]["extras"]["strategy"]["matrix"]["python"] == PYTHONS
    monkeypatch.chdir(ROOT)
    (names,) = re.findall(r"extras=\$\(python -c '(.*?)'\)", steps("extras"), re.DOTALL)
    exec(names)  # what the job's loop goes over
    assert capsys.readouterr().out.split() == list(EXTRAS)
    assert '--dry-run -c constraints.txt ".[$extra]"' in steps("extras")
    assert "--dry-run --no-build-isolation '.[cuda]'" in steps("extras")
