"""How the player looks: style sheet, key caps, read-outs and filmstrip as HTML. Pure functions, no widgets.

Colours come from JupyterLab's theme variables (with fall-backs for other hosts), so light and dark themes both work.
Everything that came from a user is escaped here.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

STYLE = """<style>
.lb-player { --lb-line: var(--jp-border-color2, #dadde1); --lb-ink: var(--jp-ui-font-color1, #1f2328);
  --lb-soft: var(--jp-ui-font-color2, #6a737d); --lb-card: var(--jp-layout-color1, #fff);
  --lb-well: var(--jp-layout-color2, #f3f4f6); --lb-brand: var(--jp-brand-color1, #1976d2);
  --lb-gap: 12px; color: var(--lb-ink); font-family: var(--jp-ui-font-family, system-ui, sans-serif);
  font-size: 13px; background: var(--lb-card); border: 1px solid var(--lb-line); border-radius: 8px;
  padding: var(--lb-gap); max-width: 972px; box-sizing: border-box; overflow: hidden; }
.lb-player .widget-html, .lb-player .widget-html-content { line-height: 1.35; height: auto; margin: 0;
  width: 100%; align-self: stretch; font-size: 13px; }
.lb-style { display: none !important; }
.lb-hidden { display: none !important; }
.lb-body { gap: 16px; flex-flow: row wrap; align-items: flex-start; overflow: visible; }
.lb-main { flex: 1000 1 400px; min-width: 0; max-width: 680px; gap: 12px; overflow: visible; }
.lb-side { flex: 1 1 252px; min-width: 216px; max-width: 672px; gap: 13px; overflow: visible; }
.lb-side .widget-inline-hbox, .lb-side > .widget-box { width: 100%; margin: 0; }
.lb-group { gap: 5px; overflow: visible; }
.lb-group > *, .lb-row > * { margin: 0 !important; }
.lb-row { gap: 6px; overflow: visible; align-items: stretch; }
.lb-label { font-size: 11px; font-weight: 600; letter-spacing: .04em; text-transform: uppercase;
  color: var(--lb-soft); }
.lb-label b { float: right; font-weight: 600; color: var(--lb-ink); letter-spacing: 0;
  font-variant-numeric: tabular-nums; }

.lb-head { display: flex; align-items: center; gap: 10px; margin-bottom: 10px; min-height: 22px; }
.lb-title { font-weight: 600; font-size: 14px; }
.lb-about { color: var(--lb-soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.lb-state { margin-left: auto; display: inline-flex; align-items: center; gap: 6px; padding: 2px 10px 2px 8px;
  border-radius: 11px; background: var(--lb-well); font-size: 12px; white-space: nowrap; }
.lb-dot { width: 8px; height: 8px; border-radius: 50%; background: var(--lb-soft); }
.lb-playing .lb-dot { background: #2da44e; } .lb-paused .lb-dot { background: #bf8700; }
.lb-waiting .lb-dot { background: #bf8700; } .lb-failed .lb-dot { background: #cf222e; }
.lb-recording .lb-dot { background: #cf222e; animation: lb-blink 1s steps(2, start) infinite; }
@keyframes lb-blink { 50% { opacity: .25; } }

.lb-stage { position: relative; width: 100%; border-radius: 6px; overflow: hidden; background: #000;
  outline: 2px solid transparent; outline-offset: 2px; transition: outline-color .12s; cursor: crosshair; }
.lb-player .lb-main { padding: 4px; margin: -4px; }
.lb-stage:hover { outline-color: var(--lb-brand); }
.lb-stage img { display: block; width: 100%; height: 100%; margin: 0; object-fit: contain;
  image-rendering: auto; user-select: none; -webkit-user-drag: none; }
.lb-stage > * { margin: 0 !important; }
.lb-veil { position: absolute !important; inset: 0; pointer-events: none; }
.lb-veil .widget-html-content { height: 100%; }
.lb-note { position: absolute; left: 50%; bottom: 14px; transform: translateX(-50%); white-space: nowrap;
  background: rgba(15, 18, 22, .78); color: #fff; border-radius: 6px; padding: 5px 12px; font-size: 13px; }
.lb-note kbd { font: inherit; font-weight: 600; }
.lb-stage:hover .lb-hint { opacity: 0; transition: opacity .2s; }
.lb-error { left: 14px; right: 14px; transform: none; white-space: normal; background: rgba(140, 20, 24, .92); }
.lb-lost { animation: lb-lost 0s linear 4s forwards; visibility: hidden; bottom: auto; top: 14px; }
@keyframes lb-lost { to { visibility: visible; } }

.lb-pair-row { gap: 18px; }
.lb-pair-row > * { flex: 1 1 0; min-width: 0; }
.lb-row > .widget-button { padding: 0 6px; }

.lb-deck-row { gap: 12px 28px; flex-flow: row wrap; justify-content: space-between; }
.lb-deck-row > * { margin: 0 !important; }
.lb-deck-row > .lb-keys { flex: 0 0 auto; width: auto !important; }
.lb-deck-row > .lb-numbers { flex: 1 1 340px; max-width: 420px; }
.lb-deck { display: flex; align-items: flex-end; gap: 20px; }
.lb-caps { display: grid; grid-template-columns: repeat(3, 27px); grid-auto-rows: 27px; gap: 4px; }
.lb-cap { display: flex; align-items: center; justify-content: center; border: 1px solid var(--lb-line);
  border-bottom-width: 2px; border-radius: 5px; font-size: 12px; font-weight: 600; color: var(--lb-soft);
  background: var(--lb-card); box-sizing: border-box; }
.lb-cap.lb-down { background: var(--lb-brand); border-color: var(--lb-brand); color: #fff; }
.lb-cap.lb-none { visibility: hidden; }
.lb-caps.lb-pair { grid-template-columns: repeat(2, 27px); }
.lb-stats { display: grid; grid-template-columns: repeat(4, 1fr); }
.lb-stat { padding: 1px 4px 1px 12px; border-left: 1px solid var(--lb-line); }
.lb-stat b { display: block; font-size: 19px; font-weight: 600; line-height: 1.25; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.lb-stat b small { font-size: 12px; font-weight: 400; color: var(--lb-soft); }
.lb-stat span { font-size: 11px; color: var(--lb-soft); white-space: nowrap; }

.lb-strip { display: grid; gap: 4px; }
.lb-strip figure { margin: 0; min-width: 0; }
.lb-strip img, .lb-strip i { display: block; width: 100%; border-radius: 3px; background: var(--lb-well); }
.lb-strip figcaption { display: flex; gap: 6px; font-size: 10px; line-height: 1.6;
  color: var(--lb-soft); font-variant-numeric: tabular-nums; }
.lb-strip figcaption b { color: var(--lb-ink); font-weight: 600; }

.lb-scenes { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); gap: 6px;
  overflow: visible; }
.lb-scenes > .widget-button { margin: 0; padding: 0; width: auto; height: auto; border-radius: 4px; min-height: 24px;
  background-size: cover; background-position: center; border: 0; outline: 2px solid transparent;
  outline-offset: 1px; line-height: normal; }
.lb-scenes > .widget-button:hover { outline-color: var(--lb-line); box-shadow: none; }
.lb-scenes > .widget-button:focus-visible, .lb-scenes > .widget-button.lb-chosen { outline-color: var(--lb-brand); }
.lb-side .widget-button { border-radius: 4px; margin: 0; }
/* Names for screen readers; what is seen stands above the control, or is a picture. */
.lb-side .widget-label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.lb-side .lb-unwritten { font-size: 0; display: flex; align-items: center; justify-content: center; }
.lb-side .lb-unwritten > i { font-size: 13px; margin: 0; }
.lb-side .widget-text, .lb-side .widget-textarea, .lb-side .widget-dropdown, .lb-side .widget-slider {
  width: 100%; margin: 0; }
.lb-side select, .lb-side input, .lb-side textarea { border-radius: 4px !important; }
.lb-side textarea { font-family: inherit !important; }
/* JupyterLab's own arrow is dark in the dark theme too. */
.lb-side select { background-image: linear-gradient(45deg, transparent 50%, var(--lb-soft) 50%),
  linear-gradient(-45deg, transparent 50%, var(--lb-soft) 50%) !important; background-repeat: no-repeat !important;
  background-position: right 13px center, right 8px center !important; background-size: 5px 5px !important; }
.lb-message { color: var(--lb-soft); font-size: 12px; overflow-wrap: anywhere; }
.lb-message.lb-bad { color: var(--jp-error-color1, #cf222e); }
.lb-help { color: var(--lb-soft); font-size: 12px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.lb-help kbd { display: inline-block; min-width: 9px; padding: 0 4px; border: 1px solid var(--lb-line);
  border-radius: 3px; font: inherit; font-size: 11px; text-align: center; color: var(--lb-ink);
  background: var(--lb-well); box-shadow: none; line-height: 1.4; margin-right: 2px; }
.lb-help span { white-space: nowrap; }
</style>"""

STATES = {
    "playing": "Playing",
    "paused": "Paused",
    "waiting": "Waiting for the browser",
    "stopped": "Stopped",
    "failed": "Stopped by an error",
}


@dataclass(frozen=True)
class Still:
    """One picture of the filmstrip: JPEG bytes, seconds since the start, keys that were down."""

    jpeg: bytes
    second: float
    names: str


def jpeg(frame: np.ndarray, quality: int = 90) -> bytes:
    """A pixel frame u8 [H, W, 3] as JPEG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    return buffer.getvalue()


def thumbnail(frame: np.ndarray, width: int) -> bytes:
    """A pixel frame u8 [H, W, 3] reduced to `width` pixels, as JPEG bytes."""
    from PIL import Image

    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    small = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
    return jpeg(np.asarray(small), 85)


def data_uri(picture: bytes) -> str:
    """JPEG bytes as the address of a picture."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def header(title: str, about: str, state: str, recording: bool = False) -> str:
    """Title, what is being played, and a pill that names the state."""
    word = "Recording" if recording and state == "playing" else STATES[state]
    kind = "recording" if recording and state == "playing" else state
    return (
        f'<div class="lb-head"><span class="lb-title">{html.escape(title)}</span>'
        f'<span class="lb-about">{html.escape(about)}</span>'
        f'<span class="lb-state lb-{kind}" role="status"><span class="lb-dot"></span>{word}</span></div>'
    )


def key_caps(down: Iterable[str], available: str) -> str:
    """W A S D and I J K L as key caps; the ones in `down` are lit, ones the model does not know are left out."""
    down = set(down)
    look_keys = [" i ", "jkl"] if "i" in available else ["jl"]
    clusters = [_cluster(rows, down, available) for rows in ([" w ", "asd"], look_keys)]
    spoken = ", ".join(sorted(down)).upper() or "none"
    return f'<div class="lb-deck" role="img" aria-label="keys held: {spoken}">{"".join(clusters)}</div>'


def _cluster(rows: list[str], down: set[str], available: str) -> str:
    caps = [_cap(letter, letter in down, letter in available) for row in rows for letter in row]
    return f'<div class="lb-caps{" lb-pair" if len(rows) == 1 else ""}">{"".join(caps)}</div>'


def _cap(letter: str, down: bool, known: bool) -> str:
    kind = " lb-none" if not known else " lb-down" if down else ""
    return f'<span class="lb-cap{kind}">{letter.upper() if known else ""}</span>'


def statistics(fps: float, latency_ms: float, waiting: int, chunk_ms: float) -> str:
    """The four numbers under the picture; NaN and 0 show as a dash."""
    cells = (
        (_number(fps, 1), "", "frames / s"),
        (_number(latency_ms, 0), "ms", "key → browser"),
        (_number(chunk_ms, 0), "ms", "per chunk"),
        (str(waiting), "", "frames waiting"),
    )
    return f'<div class="lb-stats">{"".join(_stat(*cell) for cell in cells)}</div>'


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) or value <= 0 else f"{value:.{digits}f}"


def _stat(value: str, unit: str, label: str) -> str:
    unit = f" <small>{unit}</small>" if unit and value != "–" else ""
    return f'<div class="lb-stat"><b>{value}{unit}</b><span>{label}</span></div>'


def timings_title(timings: dict[str, float]) -> str:
    """Milliseconds of each stage of the last chunk, in one line."""
    return " · ".join(f"{name} {value:.0f} ms" for name, value in timings.items())


def veil(state: str, message: str = "", hint: bool = True) -> str:
    """What lies over the picture: how to begin, that it is paused, or what went wrong.

    While play lasts this is sent anew every second, each time with a hidden note that would appear by itself after four
    seconds: it is seen only when the kernel has gone away.
    """
    if state == "stopped":
        return f'<div class="lb-note">{html.escape(message) or "Stopped. Run the cell again to play."}</div>'
    lost = '<div class="lb-note lb-lost">No word from the kernel. If it was restarted, run the cell again.</div>'
    if state == "failed":
        return (
            f'{lost}<div class="lb-note lb-error" role="alert">{html.escape(message)} — press R to start again.</div>'
        )
    if state == "paused":
        return f'{lost}<div class="lb-note">Paused — <kbd>Space</kbd> to go on</div>'
    return lost + ('<div class="lb-note lb-hint">Hold the mouse here and press <kbd>W</kbd></div>' if hint else "")


def filmstrip(stills: Sequence[Still], count: int, aspect: float) -> str:
    """The last `count` stills, oldest left, each with its time and the keys that were down; empty places stay grey."""
    empty = f'<figure><i style="aspect-ratio:{aspect:.4f}"></i><figcaption>&nbsp;</figcaption></figure>'
    cells = [empty] * (count - len(stills)) + [_still(still) for still in stills[-count:]]
    return f'<div class="lb-strip" style="grid-template-columns:repeat({count},1fr)">{"".join(cells)}</div>'


def _still(still: Still) -> str:
    minutes, seconds = divmod(int(still.second), 60)
    alt = f"{still.second:.0f} s, keys {still.names or 'none'}"
    return (
        f'<figure><img src="{data_uri(still.jpeg)}" alt="{alt}" decoding="sync">'
        f"<figcaption><span>{minutes}:{seconds:02d}</span><b>{still.names.upper()}</b></figcaption></figure>"
    )


def scene_style(pictures: Sequence[np.ndarray]) -> str:
    """Backgrounds of the gallery's buttons, `.lb-scene-0`, `.lb-scene-1`, …"""
    rules = [
        f".lb-scene-{index} {{ background-image: url({data_uri(thumbnail(picture, 120))}) !important;"
        f" aspect-ratio: {picture.shape[1] / picture.shape[0]:.4f}; }}"
        for index, picture in enumerate(pictures)
    ]
    return f"<style>{''.join(rules)}</style>"


def label(text: str, value: str = "") -> str:
    """A small heading over a control, with its value at the right."""
    right = f"<b>{html.escape(value)}</b>" if value else ""
    return f'<div class="lb-label">{right}{html.escape(text)}</div>'


def message(text: str, bad: bool = False) -> str:
    """One line of news, escaped."""
    return f'<div class="lb-message{" lb-bad" if bad else ""}" role="status">{html.escape(text)}</div>'


def key_help(available: str) -> str:
    """What the keys do."""
    looks = "i" in available
    rows = [("walk", "WASD" if looks else "WASD↑↓"), ("turn", "JL←→")]
    if looks:
        rows.append(("look up, down", "IK↑↓"))
    rows += [("pause", ["Space"]), ("start again", "R")]
    parts = [f"<span>{''.join(f'<kbd>{cap}</kbd>' for cap in caps)} {text}</span>" for text, caps in rows]
    return f'<div class="lb-help">{"".join(parts)}</div>'
