"""JupyterLab itself, in a real browser: open a notebook, run all cells, see its pictures, move a slider, chat."""
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM and not os.environ.get("CI"):
    pytest.skip("there is no chromium on the path", allow_module_level=True)

OPEN = """async (path) => {
  const app = window.jupyterapp;
  await app.restored;
  window.panel = await app.commands.execute('docmanager:open', {path});
  await panel.context.ready;
  await panel.sessionContext.ready;
  app.shell.activateById(panel.id);
}"""
RUN_ALL = "async () => await window.jupyterapp.commands.execute('notebook:run-all-cells')"  # answers when the last cell is done
CELLS = "() => window.panel.content.model.toJSON().cells"
SHOW = """async (start) => {
  const notebook = window.panel.content;
  const index = notebook.widgets.findIndex(cell => cell.model.sharedModel.getSource().includes(start));
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index, 'start');
}"""

ENDLESS = """
def generate(self, prompt, **settings):
    while True:
        time.sleep(0.01)
        yield self.tokenizer.encode("x"), [True]
Engine.generate = generate
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(url, process, log):
    "Wait until a server answers; False if it has ended instead."
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return process.poll() is None  # or else it was another program that answered
        except OSError:
            time.sleep(0.1)
    end(process)
    raise AssertionError(log.read_text())


def end(process):
    process.send_signal(signal.SIGTERM)  # ends the kernels, too
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_server(command, token, log, **settings):
    "Start a server on a free port, and on another one if somebody takes it first. Gives the process and the port."
    for _ in range(3):
        port = free_port()
        with open(log, "w") as file:
            process = subprocess.Popen([*command, f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"],
                                       stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **settings)
        if is_up(f"http://127.0.0.1:{port}/api?token={token}", process, log):
            return process, port
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A server with a copy of the notebooks, in a home of its own; it and its kernels end with the tests. Gives the address of a path."
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copytree(ROOT / "nbs", home / "nbs")
    own = {name: str(home / name.lower()) for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                                                      "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "NANOCHAT_BASE_DIR", "MPLCONFIGDIR")}
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {key: value for key, value in os.environ.items() if key != "NANOCHAT_PROGRESS"} | own | {"PYTHONPATH": search, "MPLBACKEND": ""}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--ServerApp.root_dir={home}",
               "--LabApp.expose_app_in_browser=True"]
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], env=environment | {"MPLBACKEND": "agg"}, check=True)  # lists the fonts, and may say so
    quiet = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no question over the page, and no request to anybody
    process, port = start_server(command, token, home / "server.log", cwd=home, env=environment)
    try:
        yield lambda path: f"http://127.0.0.1:{port}/{path}?token={token}&reset"
    finally:
        end(process)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.fail("CI must have chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


def run_all(lab, browser, name):
    "Open a notebook, run it, and see that nothing went wrong; gives the page and the cells."
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    hosts = set()
    page.on("request", lambda request: hosts.add(re.sub(r"^\w+://([^/:]*).*", r"\1", request.url)))
    page.goto(lab("lab"))
    page.wait_for_function("() => window.jupyterapp !== undefined")
    page.evaluate(OPEN, f"nbs/{name}.ipynb")
    assert page.evaluate(RUN_ALL), [o for cell in page.evaluate(CELLS) for o in cell.get("outputs", []) if o["output_type"] == "error"]
    cells = page.evaluate(CELLS)
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip())
    assert {host for host in hosts if not host.startswith("data:")} <= {"127.0.0.1", ""}, hosts
    return page, cells


def show(page, start):
    "Bring a cell into view, as the one that is active."
    page.evaluate(SHOW, start)
    return page.locator(".jp-Notebook-cell.jp-mod-active")


def text_of(locator, old):
    "The text of a part of the page, as soon as it is another than before."
    locator.page.wait_for_function("([element, old]) => element.innerText !== old", arg=[locator.element_handle(), old])
    return locator.inner_text()


def test_a_port_that_is_taken_costs_a_second_try(tmp_path, monkeypatch):
    serve = "import http.server, sys; http.server.HTTPServer(('127.0.0.1', int(sys.argv[1].partition('=')[2])), http.server.SimpleHTTPRequestHandler).serve_forever()"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        ports = [other.getsockname()[1], free_port()]
        monkeypatch.setitem(globals(), "free_port", lambda: ports.pop(0))
        (tmp_path / "api").touch()
        process, _ = start_server([sys.executable, "-c", serve], "x", tmp_path / "log", cwd=tmp_path)
        end(process)
    assert ports == []  # both were tried


def test_a_lecture_shows_its_plots(lab, browser):
    page, cells = run_all(lab, browser, "10_bpe")
    plots = [cell for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert plots
    image = show(page, "".join(plots[0]["source"]).splitlines()[0]).locator(".jp-RenderedImage img")
    image.wait_for()
    assert image.evaluate("async image => { await image.decode(); return image.naturalWidth }") > 100
    page.close()


def test_widgets_live(lab, browser):
    page, cells = run_all(lab, browser, "62_widgets")
    live = [cell for cell in cells for output in cell.get("outputs", []) if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert len(live) == 6

    cell = show(page, "explore_tokens({")  # a text that is typed
    cell.get_by_text("39 bytes").first.wait_for()
    cell.get_by_label("Text").fill("<img src=x onerror=alert(1)> 27")
    cell.get_by_text("31 bytes").first.wait_for()
    assert page.locator("img[src=x]").count() == 0

    cell = show(page, "browse_attention(model")  # a slider that is moved
    view, slider = cell.locator(".widget-html").last, cell.get_by_role("slider").last
    view.locator("td").first.wait_for()
    before = view.inner_html()
    slider.press("ArrowLeft")
    page.wait_for_function("([element, old]) => element.innerHTML !== old", arg=[view.element_handle(), before])

    cell = show(page, "sample_next(model")  # a dial, and a button
    text, bars = cell.locator(".widget-html").first, cell.locator(".widget-html").last
    bars.get_by_text("tokens can be drawn").wait_for()
    before = bars.inner_text()
    cell.get_by_role("slider").nth(1).press("Home")  # top-k 1
    assert before.count("cut") == 0 and text_of(bars, before).count("cut") == 19
    before = text.inner_text()
    cell.get_by_role("button", name="Draw a token").click()
    assert before.strip() and text_of(text, before).startswith(before.strip())

    cell = show(page, "chat_panel(run_engines(trained")  # a reply that arrives while the kernel goes on listening
    cell.get_by_label("You").fill("Hello!")
    cell.get_by_label("You").press("Enter")
    send = cell.get_by_role("button", name="Send")
    page.wait_for_function("([button, cell]) => !button.disabled && cell.querySelectorAll('.widget-html').length === 2", arg=[send.element_handle(), cell.element_handle()])
    assert "Hello!" in cell.locator(".widget-html").first.inner_text()
    page.evaluate("async code => (await window.panel.sessionContext.session.kernel.requestExecute({code}).done).content.status", ENDLESS)
    cell.get_by_label("You").fill("Go on!")
    cell.get_by_label("You").press("Enter")
    cell.get_by_text("xxxxx").wait_for()
    cell.get_by_role("button", name="Stop").click()
    cell.get_by_text("[stopped]").wait_for()

    cell = show(page, "pretend(1, 200)")  # a file that grew while the notebook went on
    cell.get_by_text("step 230 of 300").wait_for()
    assert cell.locator("svg.nanochat-figure").count() == 1

    cell = show(page, 'compare_runs(["narrow"')
    view = cell.locator(".widget-html").last
    cell.get_by_label("Against", exact=True).select_option("seconds")
    view.locator("svg[aria-label*='against seconds']").wait_for()
    assert "base.width" in view.inner_text()
    page.close()
