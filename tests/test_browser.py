"""The player in a real browser: JupyterLab and headless Chromium, keys pressed and pixels read back from the page."""

import base64
import io
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fake_session import FakeSession, read_keys, read_number
from PIL import Image

from lingbot_nb.stream.lab import check_browser, choose, chromium, jupyterlab, open_notebook, run_all, write_notebook

HERE = Path(__file__).parent

EVIL = '<img src=x onerror="window.hacked = 1">'

CELL = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from fake_session import FakeSession
from lingbot_nb.stream.player import play
play(FakeSession(seconds=0.03, log="keys.jsonl"), prompts=["a painted corridor", {EVIL!r}])
"""
PROBE = """() => {
    const player = document.querySelector('.lb-player');
    const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const paint = colours => { pen.clearRect(0, 0, 1, 1);
        for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
        return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3); };
    const linear = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
    const light = rgb => { const [r, g, b] = rgb.map(linear);
        return .2126 * r + .7152 * g + .0722 * b; };
    const contrast = element => { const ground = [];
        for (let at = element; at; at = at.parentElement) ground.unshift(getComputedStyle(at).backgroundColor);
        const [a, b] = [ground, [...ground, getComputedStyle(element).color]].map(c => light(paint(c)));
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
    const written = '.lb-title, .lb-about, .lb-state, .lb-label, .lb-label b, .lb-cap:not(.lb-none), .lb-stat b, '
        + '.lb-stat span, .lb-help span, .lb-help kbd, .lb-strip figcaption span, .lb-side select, .lb-side input, '
        + '.lb-side textarea, .lb-row > button';
    const edges = selector => [...player.querySelectorAll(selector)].map(e => e.getBoundingClientRect())
        .map(box => [Math.round(box.left), Math.round(box.right)]);
    return { faint: [...player.querySelectorAll(written)].map(e => [e.className || e.tagName, contrast(e)])
            .filter(([, value]) => value < 4.5),
        ground: light(paint([getComputedStyle(player).backgroundColor])),
        stage: edges('.lb-stage, .lb-strip'),
        side: edges('.lb-side > *, .lb-side .lb-row, .lb-side select, .lb-side textarea'),
        wide: player.scrollWidth - player.clientWidth }; }"""
"""How the player looks: texts that stand out too little, how bright it is, where its columns begin and end."""
READ = """() => { const image = document.querySelector('.lb-stage img');
    if (!image || !image.naturalWidth) return null;
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.toDataURL('image/png'); }"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    try:
        check_browser()
    except RuntimeError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(place):
    choose(place)
    write_notebook(place / "play.ipynb", CELL, "print('the kernel is free')")
    with jupyterlab(place, OMP_NUM_THREADS="1") as lab:
        yield lab


@pytest.fixture(scope="module")
def browser(lab):
    with chromium() as context:
        yield context


@pytest.fixture(scope="module")
def page(lab, browser):
    page = open_notebook(browser, lab, "play.ipynb")
    run_all(page)
    page.wait_for_selector(".lb-stage img", timeout=30_000)
    return page


def picture(page) -> np.ndarray:
    """The picture on the page as it is now, u8 [96, 160, 3]."""
    data = None
    while data is None:  # for a moment after each frame the browser has none decoded
        data = page.evaluate(READ)
    png = base64.b64decode(data.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def wait(page, seen, timeout=8.0):
    """Wait until `seen()` is true, letting the page live meanwhile."""
    end = time.monotonic() + timeout
    while not seen():
        assert time.monotonic() < end, "the page never showed it"
        page.wait_for_timeout(20)


def shows(page, keys):
    return lambda: read_keys(picture(page)) == keys


def log(place) -> list[dict]:
    """What the sessions of the page received, chunk by chunk."""
    return [json.loads(line) for line in (place / "keys.jsonl").read_text().splitlines()]


@pytest.fixture
def over(page):
    """The mouse over the picture, no key down; out again afterwards."""
    page.hover(".lb-stage")
    wait(page, shows(page, ""))
    yield
    page.mouse.move(5, 5)
    wait(page, shows(page, ""))


def test_the_picture_appears_and_moves(page):
    first = read_number(picture(page))
    wait(page, lambda: read_number(picture(page)) > first + 8)
    assert "the kernel is free" in page.inner_text(".jp-Notebook")
    assert page.inner_text(".lb-state") == "Playing"


def test_holding_w_walks_and_releasing_stops(page, place, over):
    page.keyboard.down("w")
    wait(page, shows(page, "w"))
    assert log(place)[-1]["keys"] == "w"
    assert page.inner_text(".lb-down") == "W"
    page.keyboard.up("w")
    wait(page, shows(page, ""))
    assert log(place)[-1]["keys"] == ""
    assert page.query_selector(".lb-down") is None


def test_two_keys_at_once_and_arrows(page, over):
    page.keyboard.down("w")
    page.keyboard.down("ArrowRight")
    wait(page, shows(page, "wl"))
    page.keyboard.up("w")
    wait(page, shows(page, "l"))
    page.keyboard.up("ArrowRight")
    wait(page, shows(page, ""))


def test_the_mouse_leaving_lets_go(page, over):
    page.keyboard.down("w")
    wait(page, shows(page, "w"))
    page.mouse.move(5, 5)
    wait(page, shows(page, ""))
    page.keyboard.up("w")


def test_alt_tab_lets_go(page, over):
    page.keyboard.down("d")
    wait(page, shows(page, "d"))
    page.keyboard.down("Alt")
    wait(page, shows(page, ""))
    page.keyboard.up("Alt")
    page.keyboard.up("d")


def test_another_tab_lets_go(page, place, browser, over):
    """No event tells of it, and the key is lifted over there: the repeats fall silent."""
    page.keyboard.down("d")
    page.keyboard.down("d")  # as a held key repeats
    wait(page, shows(page, "d"))
    other = browser.new_page()
    other.bring_to_front()
    other.keyboard.up("d")
    wait(other, lambda: log(place)[-1]["keys"] == "", timeout=3)
    other.close()
    page.bring_to_front()
    page.keyboard.up("d")


def test_keys_do_not_reach_jupyterlab(page, over):
    cells = page.locator(".jp-Cell").count()
    for key in "abdxs":
        page.keyboard.press(key)
    wait(page, shows(page, ""))
    assert page.locator(".jp-Cell").count() == cells


def test_space_pauses_and_the_picture_stands_still(page, over):
    page.keyboard.press(" ")
    wait(page, lambda: page.inner_text(".lb-state") == "Paused")
    page.wait_for_timeout(150)
    before = read_number(picture(page))
    page.wait_for_timeout(400)
    assert read_number(picture(page)) == before
    page.keyboard.press(" ")
    wait(page, lambda: read_number(picture(page)) > before)


def test_r_starts_again(page, over):
    wait(page, lambda: read_number(picture(page)) > 40)
    page.keyboard.press("r")
    wait(page, lambda: read_number(picture(page)) < 30)


def test_the_picture_is_the_sessions_own(page, place, over):
    """What is on the page is, up to JPEG, the frame that a second session paints under the keys the first received."""
    page.keyboard.press("r")
    wait(page, lambda: read_number(picture(page)) < 20)
    page.keyboard.down("w")
    page.keyboard.down("l")
    wait(page, shows(page, "wl"))
    page.wait_for_timeout(500)
    page.keyboard.up("w")
    wait(page, shows(page, "l"))
    shown = picture(page)
    page.keyboard.up("l")
    number, lines = read_number(shown), log(place)
    start = max(at for at, line in enumerate(lines) if line["number"] == 0)
    own, mirrored = FakeSession(), FakeSession()
    for line in lines[start:]:
        if own.number >= number:
            break
        frames = own.generate(line["keys"])
        wrong = mirrored.generate(line["keys"].replace("l", "j"))
    at = number - own.number - 1
    assert {"w", "l", "wl"} & {line["keys"] for line in lines[start:]}
    error = np.abs(frames[at].astype(int) - shown).mean()
    assert error < 3
    assert np.abs(wrong[at].astype(int) - shown).mean() > 4 * error


def test_a_screen_reader_finds_names(page):
    for role, name in (("button", "Pause"), ("button", "Another seed"), ("textbox", "Prompt"), ("spinbutton", "Seed"),
                       ("combobox", "Ready-made prompts"), ("textbox", "Play keys")):  # fmt: skip
        assert page.get_by_role(role, name=name, exact=False).count() == 1, name
    assert page.get_by_role("img", name="keys held").count() == 1


def test_it_can_be_played_without_a_mouse(page):
    focused = lambda: page.evaluate("() => document.activeElement.innerText.trim()")  # noqa: E731
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Space")
    wait(page, lambda: page.inner_text(".lb-state") == "Paused")
    assert focused() == "Play"
    page.keyboard.press("Enter")
    wait(page, lambda: page.inner_text(".lb-state") == "Playing")
    page.keyboard.press("Tab")
    assert focused() == "Reset"
    page.get_by_role("textbox", name="Play keys").focus()
    page.keyboard.type("wl-32")
    page.keyboard.press("Enter")
    wait(page, shows(page, "wl"))
    wait(page, shows(page, ""))


def test_what_is_typed_is_shown_and_never_run(page):
    page.get_by_role("combobox", name="Ready-made prompts").select_option(index=2)
    prompt = page.get_by_role("textbox", name="Prompt")
    wait(page, lambda: prompt.input_value() == EVIL)
    script = page.get_by_role("textbox", name="Play keys")
    script.fill(EVIL)
    script.press("Enter")
    page.wait_for_selector(".lb-bad")
    assert "<img" in page.inner_text(".lb-bad") and page.query_selector(".lb-message img") is None
    assert page.evaluate("() => window.hacked") is None
    script.fill("")


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_it_is_readable_and_aligned_in_both_themes(page, theme):
    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", f"JupyterLab {theme}"
    )
    wait(page, lambda: (page.evaluate(PROBE)["ground"] < 0.5) == (theme == "Dark"))
    looks = page.evaluate(PROBE)
    assert not looks["faint"] and looks["wide"] <= 0
    for column, rows in (("stage", 2), ("side", 5)):
        edges = looks[column]
        assert len(edges) >= rows and len({left for left, _ in edges}) == len({right for _, right in edges}) == 1, edges


def test_the_chunk_changes_while_playing(page, place):
    handle = page.locator(".lb-side .noUi-handle").nth(1)
    handle.focus()
    handle.press("ArrowRight")
    steps = lambda: [after["number"] - before["number"] for before, after in pairwise(log(place)[-3:])]  # noqa: E731
    wait(page, lambda: steps() == [8, 8])
    assert "2 a chunk" in page.inner_text(".lb-about")
    handle.press("ArrowLeft")
    wait(page, lambda: steps() == [4, 4])


def test_a_blocked_page_stops_the_world_and_catches_up(page, lab):
    """While the page is deaf no frames pile up, in the browser or the server: the world goes on where it stood."""
    before, memory = read_number(picture(page)), lab.memory()
    page.evaluate("() => { const end = performance.now() + 3000; while (performance.now() < end); }")
    after = read_number(picture(page))
    assert after - before < 40  # 3 s at 16 frames a second would be 48 more, and all of them sent
    wait(page, lambda: read_number(picture(page)) > after + 4, timeout=4)
    assert lab.memory() - memory < 10e6


def test_running_all_again_leaves_one_player(page, place):
    old = log(place)[-1]["session"]
    run_all(page)
    wait(page, lambda: log(place)[-1]["session"] != old, timeout=15)
    start = len(log(place)) - 1
    page.hover(".lb-stage")
    page.keyboard.down("a")
    wait(page, shows(page, "a"))
    page.keyboard.up("a")
    assert page.locator(".lb-player").count() == 1
    assert page.inner_text(".lb-state") == "Playing"
    assert old not in {line["session"] for line in log(place)[start:]}


@pytest.fixture(scope="module")
def reopened(page, lab, browser, place):
    """The notebook saved, its tab closed for two seconds, then opened in another tab."""
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    wait(page, lambda: "widget-view" in (place / "play.ipynb").read_text())
    page.close()
    time.sleep(1.5)  # longer than a viewer may be silent
    length = len(log(place))
    time.sleep(1.0)
    assert len(log(place)) == length, "the world went on with nobody looking"
    return open_notebook(browser, lab, "play.ipynb")


def test_closing_the_tab_holds_the_world_and_reopening_resumes_it(reopened, place):
    before = log(place)[-1]
    reopened.wait_for_selector(".lb-stage img", timeout=15_000)
    wait(reopened, lambda: read_number(picture(reopened)) > before["number"] + 12)
    assert log(place)[-1]["session"] == before["session"]
    reopened.hover(".lb-stage")
    reopened.keyboard.down("d")
    wait(reopened, shows(reopened, "d"))
    reopened.keyboard.up("d")
    reopened.mouse.move(5, 5)


def test_an_interrupt_ends_play_with_a_message(reopened):
    interrupt = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()"
    reopened.evaluate(interrupt)
    wait(reopened, lambda: reopened.inner_text(".lb-state") == "Stopped")
    assert "kernel was interrupted" in reopened.inner_text(".lb-note")
    before = read_number(picture(reopened))
    reopened.wait_for_timeout(300)
    assert read_number(picture(reopened)) == before
    run_all(reopened)
    wait(reopened, lambda: reopened.inner_text(".lb-state") == "Playing", timeout=15)


def test_a_restart_is_told_and_playing_again_works(reopened, place):
    old = log(place)[-1]["session"]
    reopened.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    reopened.wait_for_selector(".lb-lost", state="visible", timeout=12_000)
    assert "run the cell again" in reopened.inner_text(".lb-lost")
    run_all(reopened)
    wait(reopened, lambda: log(place)[-1]["session"] != old, timeout=20)
    wait(reopened, lambda: reopened.locator(".lb-player").count() == 1)
    reopened.wait_for_selector(".lb-stage img")
    start = read_number(picture(reopened))
    wait(reopened, lambda: read_number(picture(reopened)) != start)
