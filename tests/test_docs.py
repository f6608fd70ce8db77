"""The site's pages: every link leads somewhere, commands and messages exist, figures are those of their sources."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml

from jax_simpo.cli import app
from jax_simpo.config import TrainConfig, help, read_overrides
from jax_simpo.errors import ConfigError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
# Run from the first command to the last, in a folder where all but the tutorial find its config as my-run.yaml.
RUN = {"tutorial.md", "choosing-settings.md"}
# The commands of all other pages are only parsed; a page with commands that is in neither list fails.
NOT_RUN = {
    "doctor.md": "measures the machine for minutes; tests/doctor runs it with small shapes",
    "from-simpo-repository.md": "models of 8 billion parameters",
    "hardware.md": "compilers of other hardware; tests/plan compiles for a CPU",
    "launch.md": "several hosts, containers and schedulers",
    "lora.md": "a model of the hub; tests/training/test_lora_run.py runs the same commands",
    "objectives.md": "a model of the hub; tests/training/test_own_objective.py trains with an objective of a file",
    "other-trainers.md": "files of other trainers; tests/config/test_convert.py converts them",
    "plan.md": "compilers of other hardware; tests/plan compiles for a CPU",
    "real-model.md": "half an hour of training; tests/hf/test_gguf.py trains from a small file",
    "real-runs.md": "hours of training",
    "report.md": "a page that is served until Ctrl-C; tests/run/test_live.py serves one",
    "tracking.md": "accounts of services; tests/tracking and tests/hub have stand-ins",
    "your-own-pairs.md": "pairs and a model of the reader's",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```(?:bash|console)\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[list[str]]:
    """Yields the words of each `jax-simpo` command of a page."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if "jax-simpo " in line else []
            if "jax-simpo" in words and not {"pip", "docker", "mpirun"} & set(words):
                yield words[words.index("jax-simpo") + 1 :]


def site_hooks() -> Any:
    spec = spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation() -> None:
    def leaves(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for below in part.values() if isinstance(part, dict) else part:
                yield from leaves(below)

    assert sorted(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_on_github_and_on_the_site(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    on_site = site_hooks().on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=page)))
    for link in re.findall(r"\]\(((?!https?:|#|mailto:)[^)\s#]+)", on_site):
        assert (DOCS / page).parent.joinpath(link).is_file(), f"docs/{page}: {link}"


def test_a_link_out_of_the_pages_leads_to_the_repository_or_is_an_error() -> None:
    hooks, page = site_hooks(), SimpleNamespace(file=SimpleNamespace(src_uri="benchmarks/plans.md"))
    text = hooks.on_page_markdown("[a](../../configs/plan) [b](../plan.md#x) [c](https://x.y)", page)
    assert text == f"[a]({hooks.SOURCE}configs/plan) [b](../plan.md#x) [c](https://x.y)"
    with pytest.raises(FileNotFoundError, match=r"benchmarks/plans\.md: the link to \.\./\.\./nowhere"):
        hooks.on_page_markdown("[a](../../nowhere)", page)


def test_every_page_with_commands_is_run_or_says_why_not() -> None:
    assert {page for page in PAGES if list(commands(page))} == RUN | NOT_RUN.keys()


@pytest.mark.parametrize("page", sorted(RUN | NOT_RUN.keys()))
def test_every_command_has_options_and_keys_that_exist(page: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, *words in commands(page):
        assert name in known or name == "--version", f"docs/{page}: jax-simpo {name}"
        if name not in known:
            continue
        own = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        overrides = [word for word in words if word.startswith("--") and word.partition("=")[0] not in own]
        overrides = [word for word in overrides if word != "--allow_code"]
        try:
            values, _ = read_overrides(overrides)
        except ConfigError as error:
            pytest.fail(f"docs/{page}: {error}")
        assert values.keys() <= help.keys_of(TrainConfig).keys(), f"docs/{page}: jax-simpo {name} {words}"
        assert not overrides or known[name].context_settings, f"docs/{page}: {name} takes no {overrides}"


def test_every_message_of_the_troubleshooting_page_is_one_of_ours() -> None:
    sources = [file.read_text("utf-8") for room in ("jax_simpo", "torch_ref") for file in (ROOT / room).rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # texts that are written over several lines
    tables = (DOCS / "troubleshooting.md").read_text("utf-8").split("| it says |")[1:]
    quoted = [
        line.split("`")[1] for table in tables for line in re.findall(r"^\| `.*", table.partition("\n#")[0], re.M)
    ]
    assert len(quoted) > 10
    assert [text for text in quoted if text not in joined] == []


def test_the_published_settings_are_those_of_the_configs() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \|[^|]*\| (\S+) \| (\S+) \| (\S+) \|", (DOCS / "choosing-settings.md").read_text(), re.M
    )
    assert len(rows) == 6
    for name, *values in rows:
        config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        keys = ("beta", "gamma_beta_ratio", "learning_rate")
        assert [float(value) for value in values] == [float(config[key]) for key in keys], name


def test_the_memory_of_hardware_is_that_of_the_plans() -> None:
    plans = (DOCS / "benchmarks/plans.md").read_text()
    rows = re.findall(
        r"^\| (Llama|Gemma|Mistral)[^|]*\| \d+ . (\w+)[^|]*\|(( [\d.]+ \|){6})",
        (DOCS / "hardware.md").read_text(),
        re.M,
    )
    assert len(rows) == 8
    for family, chip, figures, _ in rows:
        row = rf"\| {family}[^|]*\| {chip.lower()}:[^|]*\|[^|]*\|[^|]*\|{re.escape(figures)}"
        assert re.search(row, plans), (family, chip, figures)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RUN))
def test_every_command_of_the_page_runs(page: str, tmp_path: Path) -> None:
    """The blocks run in one shell after the other, as a reader types them; only the installation is left out."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("jax-simpo", "-m jax_simpo "), ("python", "")):
        file = programs / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        file.chmod(0o755)
    paths = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(tmp_path / "c"),
    }
    work = tmp_path / "work"
    work.mkdir()
    made = [block for block in blocks("tutorial.md") if "<<'END'" in block] if page != "tutorial.md" else []
    ours = ["sed 's/num_train_epochs: .*/max_steps: 2/' cafe.yaml > my-run.yaml"] if made else []
    for block in [*made, *ours, *blocks(page)]:
        if block.startswith("pip install"):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=work,
            env={**os.environ, **paths},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert list(work.glob("outputs/*/report.html"))
