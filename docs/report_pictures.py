"""Photographs the pages of `jax-simpo report --watch` while a run trains, for report.md.

It needs a browser and an imaging library: `pip install PyQt6-WebEngine Pillow`. They may be in another environment than
jax-simpo, which is then started as `--program` says. Without a screen, set QT_QPA_PLATFORM=offscreen.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PyQt6.QtCore import QEventLoop, QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEngineSettings
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

DOCS = Path(__file__).parent
RATES = ("1e-3", "1e-2")  # the last is still training in the pictures
STEPS = 120  # of 256, which are done before the first picture
COLOURS = 96
# Points at a place in the first panel, a share of its width from the left: all panels then show the values there.
POINT = """{
  const picture = document.querySelector("#charts svg"), box = picture.getBoundingClientRect();
  const place = { clientX: box.left + SHARE * box.width, clientY: box.top + box.height / 2 };
  picture.dispatchEvent(new PointerEvent("pointermove", { ...place, bubbles: true }));
}"""


def main() -> None:
    """Trains two models of the quickstart one after the other, and photographs the second while it trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=shlex.split, default=[sys.executable, "-m", "jax_simpo"])
    parser.add_argument("--photograph", nargs=5, metavar=("URL", "NAME", "WIDTH", "HEIGHT", "POINT"), help="one alone")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder; one that was ended there goes on")
    arguments = parser.parse_args()
    if arguments.photograph is not None:
        address, name, width, height, point = arguments.photograph
        photograph(address, name, int(width), int(height), float(point))
        return
    program: list[str] = arguments.program
    with tempfile.TemporaryDirectory() as folder:
        *done, last = [(arguments.runs or Path(folder)) / f"rate-{rate}" for rate in RATES]
        for output in done:
            if not (output / "report.html").is_file():
                subprocess.run(train(program, output), check=True, env=environment())
        with subprocess.Popen(train(program, last), env=environment()) as training:
            wait_for_steps(last, training)
            with watched(program, last) as address:
                browse(address, "report-light", 1100, 985, 0.6)
                browse(address, "report-dark", 1100, 985, 0.6, "--blink-settings=preferredColorScheme=0")
                browse(address, "report-phone", 390, 1180, 0.6)
            with watched(program, *done, last) as address:
                browse(address, "report-runs", 1100, 1085, 0.4)
            if training.poll() is not None:
                sys.exit("the run has ended before the last picture: take a smaller STEPS")
            training.terminate()


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def train(program: list[str], output: Path) -> list[str]:
    rate = output.name.partition("-")[2]
    keys = {"output_dir": output, "run_name": output.name, "learning_rate": rate, "generate_during_eval": "true"}
    return [*program, "train", "builtin:quickstart", *(f"--{key}={value}" for key, value in keys.items())]


def steps_of(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_text("utf-8").count('"step":') if metrics.is_file() else 0


def wait_for_steps(output: Path, training: subprocess.Popen[bytes]) -> None:
    """Waits for enough steps, of which a run that goes on must have taken some now."""
    wanted = max(STEPS, steps_of(output) + 2)
    while steps_of(output) < wanted:
        if training.poll() is not None:
            sys.exit("the run has ended before its first picture")
        time.sleep(0.5)


@contextmanager
def watched(program: list[str], *outputs: Path) -> Iterator[str]:
    """Serves the page of some runs; yields its address."""
    command = [*program, "report", "--watch", *map(str, outputs)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as server:
        assert server.stderr is not None
        found = re.search(r"http://\S+/", server.stderr.readline())
        assert found is not None
        try:
            yield found[0]
        finally:
            server.terminate()


def browse(address: str, name: str, width: int, height: int, point: float, flags: str = "") -> None:
    """Photographs a page in a process of its own: a browser takes its flags when it starts."""
    command = [sys.executable, __file__, "--photograph", address, name, str(width), str(height), str(point)]
    subprocess.run(command, check=True, env={**os.environ, "QTWEBENGINE_CHROMIUM_FLAGS": flags})


def photograph(address: str, name: str, width: int, height: int, point: float) -> None:
    """Writes a picture of a page beside the pages of the documentation.

    Args:
        address: of the page.
        name: of the picture.
        width: of the window, in pixels.
        height: of the window, in pixels.
        point: where the pointer is, as a share of the width of a panel.
    """
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(width, height)
    settings = view.settings()
    assert settings is not None
    settings.setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.show()
    view.load(QUrl(address))
    while not run(view, "document.querySelectorAll('#charts svg path').length > 10"):
        wait(0.5)
    wait(3)  # the page has asked for news, and has drawn them
    run(view, POINT.replace("SHARE", str(point)))
    wait(1)
    file = DOCS / f"{name}.png"
    view.grab().save(str(file))
    Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    view.close()
    application.quit()


def run(view: QWebEngineView, script: str) -> object:
    """Runs JavaScript in the page; returns what it evaluates to."""
    page, loop, found = view.page(), QEventLoop(), []
    assert page is not None
    page.runJavaScript(script, lambda value: (found.append(value), loop.quit()))
    loop.exec()
    return found[0]


def wait(seconds: float) -> None:
    """Lets the browser work."""
    loop = QEventLoop()
    QTimer.singleShot(round(1000 * seconds), loop.quit)
    loop.exec()


if __name__ == "__main__":
    main()
