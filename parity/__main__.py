"""Shows, number by number, that JAX and PyTorch compute the same: `python -m parity [CONFIG]`.

`python -m parity curves` trains a small model on both sides and draws their curves in one picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from jax_simpo.errors import UserError
from jax_simpo.run import signals
from parity import report
from parity.cases import Job
from parity.compare import compare
from parity.processes import PAIRS, built_in_job, run_sides, users_job
from parity.variants import VARIANTS

DESCRIPTION = """\
Runs the JAX trainer and the PyTorch reference on the same pairs from the same weights and compares log-probs, losses,
gradients, optimizer steps and exports. Writes report.json, report.md and report.html; the exit status is 1 if a bound
is broken or a wrong variant is not caught."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m parity", description=DESCRIPTION)
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml",
        help="compare your own checkpoint on your own pairs; without it tiny random models on built-in pairs (real "
        "ones where SIMPO_SHARED names a folder of them); `curves` draws the picture of two runs",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/parity"), help="folder to write to (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="float32, short rows, fewer models on fewer meshes")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how many of CONFIG's pairs to use (%(default)s)")
    parser.add_argument("--inject", choices=list(VARIANTS), help="put a mistake into JAX, to see the check fail")
    parser.add_argument("--report-only", action="store_true", help="compare again what an earlier call has computed")
    return parser.parse_args(arguments)


def make_job(options: argparse.Namespace) -> Job:
    """Makes the job that the options ask for.

    Raises:
        UserError: `--report-only` finds no earlier comparison, or the config cannot be compared.
    """
    work = options.output.resolve()
    variants = () if options.inject else tuple(VARIANTS)
    if options.report_only:
        try:
            return Job.load(work / "job.json")
        except FileNotFoundError:
            raise UserError(f"{work} holds no comparison; call without --report-only first") from None
    if options.config is None:
        return built_in_job(work, variants, options.inject, quick=options.quick)
    return users_job(work, Path(options.config), options.pairs, variants, options.inject, quick=options.quick)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the matrix and returns the exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # Its processes end with this one, see parity.leash.
    signals.keeping(lambda: f"The results so far and the logs of its processes stay in {options.output}")
    with signals.handled(ends_process=True):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        if find_spec("torch") is None and not options.report_only:
            raise UserError("parity needs PyTorch, which is not installed here: pip install 'jax-simpo[torch]'")
        if options.config == "curves":
            from parity.curves import draw

            return draw(options.output)
        job = make_job(options)
        if not options.report_only:
            run_sides(job)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome = compare(job)
    page = report.write_report(job, outcome)
    for comparison in outcome.cells:
        for figure in comparison.broken:
            value = f"{figure.value:.2e}, bound {figure.bound:.1e}"
            print(f"BROKEN  {comparison.cell.name}: {figure.name} {value}  {figure.detail}")
    for name in outcome.passed_variants:
        print(f"NOT CAUGHT  wrong variant: {name}")
    print(report.verdict(outcome))
    print(page)
    return 0 if outcome.holds else 1


if __name__ == "__main__":
    sys.exit(main())
