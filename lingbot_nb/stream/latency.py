"""From a key on the page to a pixel on the page: what a player's latency is made of, measured in a real browser.

Every pixel frame of a measured session carries a marker: its number and the keys it was made under. A script in the
page notes when a key event happens and when a picture with which marker has been drawn; the kernel notes when a key
arrived and when a chunk began under which keys. All clocks are the machine's own wall clock.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from lingbot_nb.control.keys import KEYS, held
from lingbot_nb.report.architecture import markdown_table

CELL = 4
"""Pixels of a marker's side per bit: 8 columns of bits, a row of keys over two of the pixel frame's number."""
COLUMNS, NUMBER_BITS = 8, 16
STALL = 0.25
"""Seconds without a new picture that count as a stall."""

WATCH = """([cell, columns, rows]) => {
    const now = () => performance.timeOrigin + performance.now();
    const log = window.lingbotLog = { keys: [], pictures: [] };
    for (const kind of ['keydown', 'keyup'])
        window.addEventListener(kind, event => { if (!event.repeat)
            log.keys.push([performance.timeOrigin + event.timeStamp, event.key, kind === 'keydown']); }, true);
    const canvas = document.createElement('canvas');
    canvas.width = cell * columns; canvas.height = cell * rows;
    const pen = canvas.getContext('2d', { willReadFrequently: true });
    const image = document.querySelector('.lb-stage img');
    let bits = null;
    image.addEventListener('load', () => {
        pen.drawImage(image, 0, 0);
        const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
        const waiting = bits !== null;
        bits = '';
        for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
            const at = 4 * ((row * cell + cell / 2) * canvas.width + column * cell + cell / 2);
            bits += data[at] + data[at + 1] + data[at + 2] > 382 ? '1' : '0';
        }
        // A picture that is replaced before the browser draws a frame was never seen: only the last one counts.
        if (!waiting) requestAnimationFrame(() => { log.pictures.push([now(), bits]); bits = null; });
    });
}"""


# -- markers ----------------------------------------------------------------------------------------------------------


def burn(frame: np.ndarray, number: int, keys_8: np.ndarray) -> None:
    """Paint the marker into the upper left corner of a pixel frame u8 [H, W, 3]: 12 rows of 32 pixels."""
    bits = [*keys_8, *((number >> bit) & 1 for bit in range(NUMBER_BITS))]
    cells = np.array(bits, np.uint8).reshape(-1, COLUMNS) * 255
    picture = cells.repeat(CELL, axis=0).repeat(CELL, axis=1)
    frame[: picture.shape[0], : picture.shape[1]] = picture[..., None]


def read(frame: np.ndarray) -> tuple[int, str]:
    """The number and the keys that `burn` painted, also from a lossy copy."""
    rows = len(KEYS) // COLUMNS + NUMBER_BITS // COLUMNS
    cells = frame[CELL // 2 : rows * CELL : CELL, CELL // 2 : COLUMNS * CELL : CELL].mean(axis=-1) > 127
    return _decode("".join("1" if bit else "0" for bit in cells.ravel()))


def _decode(bits: str) -> tuple[int, str]:
    keys = "".join(name for name, bit in zip(KEYS, bits, strict=False) if bit == "1")
    return int(bits[len(KEYS) :][::-1], 2), keys


def mark(session, note: Callable[..., None]):
    """Make `session` burn markers into its frames and tell `note(kind, keys)` when a chunk begins; returns it."""
    generate, numbers = session.generate, count(1)
    parts = getattr(session, "stream", lambda keys, newer: [generate(keys)])

    def marked(keys, newer=lambda: None):
        count, told = session.next_frames, []

        def tell(keys) -> None:
            rows = np.asarray(keys) if isinstance(keys, np.ndarray) else held(keys)
            told[:] = np.broadcast_to(rows, (count, len(KEYS)))
            note("chunk", "".join(name for name, down in zip(KEYS, told[0], strict=True) if down))

        def asked():
            keys = newer()
            if keys is not None:
                tell(keys)
            return keys

        tell(keys)
        for frames in parts(keys, asked):
            for frame in frames:
                burn(frame, next(numbers) % 2**NUMBER_BITS, told.pop(0))
            yield frames

    session.stream = marked
    session.generate = lambda keys: np.concatenate(list(marked(keys)))
    return session


def log_keys(held_keys, note: Callable[..., None]) -> None:
    """Make a player's `HeldKeys` tell `note(kind, letter)` when a key arrives in the kernel."""
    press, release = held_keys.press, held_keys.release

    def pressed(code: str, letter: str, repeat: bool = False) -> None:
        if not repeat:
            note("down", letter)
        press(code, letter, repeat)

    def released(code: str) -> None:
        note("up", code.removeprefix("Key").lower())
        release(code)

    held_keys.press, held_keys.release = pressed, released


class Log:
    """Lines of (seconds, kind, keys) in a file that another process reads."""

    def __init__(self, path: str | Path):
        self._file = Path(path).open("a", buffering=1)

    def __call__(self, kind: str, keys: str) -> None:
        self._file.write(json.dumps([time.time(), kind, keys]) + "\n")


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One key that went down or up; seconds from the event on the page until it reached the kernel, began a chunk, and
    was on screen."""

    letter: str
    down: bool
    kernel: float
    chunk: float
    pixel: float


@dataclass(frozen=True)
class Delivery:
    """How evenly pictures came over `seconds`: pictures drawn, gaps above `STALL`, the longest gap in seconds, and how
    far the world's clock (pixel frames over `fps`) ran ahead of the wall clock, in seconds."""

    seconds: float
    pictures: int
    stalls: int
    longest: float
    drift: float

    @property
    def fps(self) -> float:
        return self.pictures / self.seconds


def press_keys(page, seconds: float, *, letters: str = "wl", seed: int = 0) -> None:
    """Hold and let go of keys at random moments for `seconds`, the mouse over the picture."""
    draw = np.random.default_rng(seed)
    page.hover(".lb-stage")
    page.wait_for_timeout(1000)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        letter = str(draw.choice(list(letters)))
        page.keyboard.down(letter)
        page.wait_for_timeout(draw.uniform(900, 1600))
        page.keyboard.up(letter)
        page.wait_for_timeout(draw.uniform(900, 1600))


def watch(page) -> None:
    """Start noting keys and pictures on the page; `seen` reads what was noted."""
    page.evaluate(WATCH, [CELL, COLUMNS, (len(KEYS) + NUMBER_BITS) // COLUMNS])


def seen(page) -> dict[str, list]:
    """ "keys": [seconds, letter, down] and "pictures": [seconds, number, keys], oldest first."""
    log = page.evaluate("() => window.lingbotLog")
    return {
        "keys": [(at / 1000, letter, down) for at, letter, down in log["keys"]],
        "pictures": [(at / 1000, *_decode(bits)) for at, bits in log["pictures"]],
    }


def changes(page_log: Mapping[str, Sequence], kernel_log: Sequence) -> Iterator[Change]:
    """Every key change that can be followed from the page to the kernel, a chunk and a picture."""
    for at, letter, down in page_log["keys"]:
        kind = "down" if down else "up"
        kernel = _first(kernel_log, at, lambda line, kind=kind, letter=letter: line[1:] == (kind, letter))
        chunk = kernel and _first(kernel_log, kernel, _begins(letter, down))
        pixel = chunk and _first(page_log["pictures"], chunk, _shows(letter, down))
        if pixel:
            yield Change(letter, down, kernel - at, chunk - at, pixel - at)


def _begins(letter: str, down: bool) -> Callable[[tuple], bool]:
    return lambda line: line[1] == "chunk" and (letter in line[2]) == down


def _shows(letter: str, down: bool) -> Callable[[tuple], bool]:
    return lambda picture: (letter in picture[2]) == down


def _first(log: Sequence[tuple], after: float, fits: Callable[[tuple], bool]) -> float | None:
    return next((line[0] for line in log if line[0] >= after and fits(line)), None)


def delivery(pictures: Sequence[tuple], fps: float) -> Delivery:
    """How evenly the numbered pictures [(seconds, number, keys)] came; a number shown twice counts once.

    Raises ValueError for fewer than two pictures.
    """
    fresh = [now for before, now in zip([None, *pictures[:-1]], pictures, strict=True)
             if before is None or before[1] != now[1]]  # fmt: skip
    if len(fresh) < 2:
        raise ValueError(f"{len(fresh)} pictures were drawn: the player never ran, look at its message")
    times = np.array([picture[0] for picture in fresh])
    gaps, seconds = np.diff(times), float(times[-1] - times[0])
    walked = (fresh[-1][1] - fresh[0][1]) % 2**NUMBER_BITS
    return Delivery(seconds, len(gaps), int((gaps > STALL).sum()), float(gaps.max()), walked / fps - seconds)


def read_log(path: str | Path) -> list[tuple[float, str, str]]:
    """What a `Log` has written."""
    return [tuple(json.loads(line)) for line in Path(path).read_text().splitlines()]


HEAD = ("chunk", "steps", "FPS", "stalls", "longest gap", "drift", "keys", "key → kernel", "key → chunk", "key → pixel")


def row(chunk: int, steps: int, delivered: Delivery, followed: Sequence[Change]) -> tuple[str, ...]:
    """A line of the table; latencies in ms as p50 / p95 / p99."""
    parts = [_percentiles([getattr(change, name) for change in followed]) for name in ("kernel", "chunk", "pixel")]
    longest, drift = f"{1000 * delivered.longest:.0f} ms", f"{1000 * delivered.drift:+.0f} ms"
    numbers = (f"{delivered.fps:.2f}", str(delivered.stalls), longest, drift, str(len(followed)))
    return (f"{chunk} frame{'s' if chunk > 1 else ''}", str(steps), *numbers, *parts)


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "–"
    return " / ".join(f"{1000 * value:.0f}" for value in np.percentile(seconds, [50, 95, 99]))


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as Markdown; latencies are p50 / p95 / p99 in ms."""
    return markdown_table(HEAD, rows)
