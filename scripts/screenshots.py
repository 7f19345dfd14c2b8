"""Pictures of what a reviewer sees: MLflow's pages of a config's runs and their `overview.html`, in headless Chromium.

    .venv/bin/python -m scripts.screenshots CONFIG FOLDER [--set KEY=VALUE]...

Starts `cdm ui` on a free port of loopback and drives a real browser through its debugging port, so that nothing but
Debian's `chromium` is needed. Every page is waited for until it shows what it should; ValueError names what is missing.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from PIL import Image
from websockets.sync.client import connect

from cdm.config import Config, load_config, storage_path
from cdm.config_methods import label
from cdm.journal import ARTIFACTS, run_facts, run_folders
from cdm.tracking import tracking_uri

SECONDS = 180.0  # at most, on a busy machine
WIDTH, HEIGHT = 1280, 800
OVERVIEW_WIDTH, OVERVIEW_HEIGHT = 1000, 3000
COLOURS = 256  # of a picture: less than half of the bytes
WORKFLOW = "workflowType=machine_learning"  # MLflow's pages for training, not for agents
NO_ASSISTANT = """try {
  localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
  localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
} catch (error) {}"""
EXPAND = "[col-id*='Run Name'] button"  # what unfolds the runs below a run
DRAWN = "[...document.images].some(image => image.naturalWidth > 800)"
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Any, missing: str) -> Any:
    """What a function returns once it is true. Raises ValueError naming what is missing."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := what():
            return found
        threading.Event().wait(0.1)
    raise ValueError(f"{missing}: not there within {SECONDS:g} s")


class Page:
    """One tab of a browser, spoken to in its debugging protocol (chromedevtools.github.io/devtools-protocol)."""

    def __init__(self, address: str) -> None:
        self._socket, self._last = connect(address, max_size=None), 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(SECONDS))
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise ValueError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, address: str, *texts: str) -> None:
        """Goes to an address and waits until all of the texts are on the page."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        until(lambda: self.value("document.readyState === 'complete'"), address)
        for text in texts:
            self.waits_for(text)

    def waits_for(self, text: str) -> None:
        shown = f"document.body && document.body.innerText.includes({json.dumps(text)})"
        until(lambda: self.value(shown), f"{self.value('location.href')}: {text!r}")

    def click(self, selector: str) -> None:
        """Every element of a CSS selector; waits for the first."""
        found = f"document.querySelectorAll({json.dumps(selector)})"
        until(lambda: self.value(f"{found}.length"), selector)
        self.value(f"[...{found}].forEach(element => element.click())")

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def settle(self) -> None:
        """Waits until two pictures in a row are the same: charts are drawn after their titles."""
        seen = [""]
        until(lambda: self._again(seen), "the end of drawing")

    def _again(self, seen: list[str]) -> bool:
        seen.append(self.call("Page.captureScreenshot", format="jpeg", quality=20)["data"])
        return seen[-1] == seen[-2]

    def picture(self, file: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png")
        drawn = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
        few = drawn.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(file, optimize=True)


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a headless Chromium. Raises ValueError where there is none on the PATH."""
    program = shutil.which("chromium")
    if program is None:
        raise ValueError("no chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium has none as root; the pages are our own
        command = [program, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", *QUIET, *root]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            told = Path(folder, "DevToolsActivePort")
            port = until(lambda: told.exists() and told.read_text().split("\n")[0], "chromium's debugging port")
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
            with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
                page = Page(json.load(answer)["webSocketDebuggerUrl"])
            page.size(WIDTH, HEIGHT)
            page.call("Emulation.setScrollbarsHidden", hidden=True)
            page.call("Page.enable")
            page.call("Page.addScriptToEvaluateOnNewDocument", source=NO_ASSISTANT)
            yield page
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def mlflow_pages(config: str, overrides: list[str]) -> Iterator[str]:
    """The address of `cdm ui` on a config's runs."""
    port = free_port()
    options = [word for value in overrides for word in ("--set", value)]
    command = [sys.executable, "-m", "cdm.cli", "ui", config, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: answers(port), "cdm ui")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # uvicorn's workers too
        process.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def run_ids(config: Config) -> tuple[str, dict[tuple[str, str], str]]:
    """The experiment, and MLflow's id of each run by stage and name; the newest of equals."""
    client = MlflowClient(tracking_uri(config))
    section = config.tracking
    experiment = client.get_experiment_by_name(section.experiment).experiment_id
    runs = reversed(client.search_runs([experiment]))
    return experiment, {(run.data.tags["cdm.stage"], run.info.run_name): run.info.run_id for run in runs}


def mlflow_pictures(page: Page, address: str, config: Config, folder: Path) -> None:
    """runs.png, charts.png, artifacts.png, registry.png, and search.png where there is one."""
    experiment, ids = run_ids(config)
    runs = f"{address}/#/experiments/{experiment}/runs"
    page.open(f"{runs}?{WORKFLOW}", config.name, "matching runs")
    page.click(EXPAND)
    page.waits_for("evaluate")
    page.settle()
    page.picture(folder / "runs.png")
    trained = ids["train", f"train {label(config.method)}"]
    page.open(f"{runs}/{trained}/model-metrics?{WORKFLOW}", "d1", "kd", "grad_norm")
    page.settle()
    page.picture(folder / "charts.png")
    evaluated = MlflowClient(tracking_uri(config)).get_run(ids["evaluate", "evaluate"])
    top = evaluated.data.tags[MLFLOW_PARENT_RUN_ID]  # a pipeline that was cut short shows nothing
    page.open(f"{runs}/{top}/artifacts/bits_per_byte.png?{WORKFLOW}", "overview.html", "results.json")
    until(lambda: page.value(DRAWN), "the artefact's picture")
    page.settle()
    page.picture(folder / "artifacts.png")
    page.open(f"{address}/#/models/{config.name}?{WORKFLOW}", "Version 1", "champion")
    page.picture(folder / "registry.png")


def overview_pictures(page: Page, config: Config, folder: Path) -> None:
    """pipeline-light.png, pipeline-dark.png and the same of a search: the `overview.html`, from its top."""
    for run in run_folders(storage_path(config)):
        facts, file = run_facts(run), Path(run, ARTIFACTS, "overview.html").resolve()
        if file.exists():
            for name, dark in (("light", False), ("dark", True)):
                page.dark(dark)
                page.size(OVERVIEW_WIDTH, HEIGHT)
                page.open(file.as_uri(), facts.run["name"])
                page.size(OVERVIEW_WIDTH, min(OVERVIEW_HEIGHT, page.value("document.documentElement.scrollHeight")))
                page.picture(folder / f"{facts.run['stage']}-{name}.png")


def take(path: str, folder: Path, overrides: list[str]) -> None:
    """All pictures, as PNG files of `folder`."""
    config = load_config(path, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as page:
        overview_pictures(page, config, folder)
        page.size(WIDTH, HEIGHT)
        page.dark(False)
        with mlflow_pages(path, overrides) as address:
            mlflow_pictures(page, address, config, folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.screenshots")
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", metavar="KEY=VALUE", default=[])
    asked = parser.parse_args()
    take(asked.config, asked.folder, asked.overrides)


if __name__ == "__main__":
    main()
