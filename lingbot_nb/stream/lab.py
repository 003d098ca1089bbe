"""A JupyterLab with one notebook, opened in headless Chromium: for the browser tests and the latency bench."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
READY = """() => { const app = window.jupyterapp; const book = app && app.shell.currentWidget;
    return !!(book && book.sessionContext && book.sessionContext.session
        && book.sessionContext.session.kernel && book.sessionContext.session.kernel.status === 'idle'); }"""


@dataclass(frozen=True)
class Lab:
    """A running server: where it answers, the token it asks for, its process."""

    address: str
    token: str
    process: subprocess.Popen

    def url(self, path: str) -> str:
        return f"{self.address}/{path}?token={self.token}"

    def memory(self) -> int:
        """Resident bytes of the server process now (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def check_browser() -> None:
    """Raise RuntimeError when there is no Chromium or one of the packages that drive it is missing."""
    if CHROMIUM is None:
        raise RuntimeError("no Chromium here: install the system package `chromium`")
    try:
        import ipyevents  # noqa: F401
        import jupyterlab  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"a browser cannot be driven without {error.name}: run `pip install {error.name}`"
        ) from error


@contextmanager
def jupyterlab(folder: Path, **environment: str) -> Iterator[Lab]:
    """A server on 127.0.0.1 that serves `folder` and keeps its settings there; `environment` goes to its kernels."""
    token, address = secrets.token_urlsafe(16), f"http://127.0.0.1:{_free_port()}"
    options = {
        "ServerApp.port": address.rsplit(":", 1)[1],
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": folder,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True,
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    # The token goes through the environment: a command line can be read by everyone on the machine.
    homes = {**os.environ, **_homes(folder / ".config"), "JUPYTER_TOKEN": token, **environment}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=homes, stdout=log, stderr=subprocess.STDOUT)
    lab = Lab(address, token, server)
    try:
        _wait_until_up(lab, folder / "server.log")
        yield lab
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def _homes(config: Path) -> dict[str, str]:
    return {
        **{f"JUPYTER_{name}_DIR": str(config / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": str(config),
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTERLAB_WORKSPACES_DIR": str(config / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(config / "settings"),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(lab: Lab, log: Path) -> None:
    for _ in range(300):
        if lab.process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once:\n{log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(lab.url("api/status"), timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not answer in 30 s:\n{log.read_text()[-2000:]}")


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of code cells."""
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, str(path))


def choose(folder: Path, theme: str = "JupyterLab Light") -> None:
    """JupyterLab's settings, before the server starts: the theme, and no question about news."""
    settings = folder / ".config" / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "themes.jupyterlab-settings").write_text(f'{{"theme": "{theme}"}}')
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')


@contextmanager
def chromium(width: int = 1380, height: int = 900):
    """A fresh headless Chromium; yields a Playwright browser context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser.new_context(viewport={"width": width, "height": height})
        finally:
            browser.close()


def open_notebook(context, lab: Lab, notebook: str):
    """The notebook in a new tab, its kernel ready; a Playwright page."""
    page = context.new_page()
    page.goto(lab.url(f"lab/tree/{notebook}"))
    page.wait_for_function(READY, timeout=40_000)
    return page


def run_all(page) -> None:
    """Run every cell of the notebook on the page."""
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
