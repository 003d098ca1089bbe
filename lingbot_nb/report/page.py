"""What a run shows of itself: its tables as text, and index.html with its pictures.

Rows come from what notebooks record: every result that is a dict with one of the columns' keys is a row, e.g.
`run.record("06_eval", teacher={"steps": 50, "seconds_per_clip": 31.0}, student={"steps": 4, "fps": 21.0})`.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lingbot_nb.runs import all_results, read_card, read_marker

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
MOVIES = (".mp4", ".webm")
_KINDS = {"image/png": ".png", "image/jpeg": ".jpg"}
_LEFT_OUT = {"index.html", ".lock"}


@dataclass(frozen=True)
class Column:
    """A number of the table of models: its key in a recorded dict, its title with the unit, its digits."""

    key: str
    title: str
    digits: int


COLUMNS = (
    Column("steps", "steps", 0),
    Column("seconds_per_clip", "seconds a clip", 1),
    Column("fps", "FPS", 1),
    Column("latency_ms", "latency ms", 0),
    Column("psnr", "PSNR dB", 2),
    Column("psnr_after_s", "after s", 2),
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999 } figure { margin: 1.5rem 0 } figcaption, .dim { color: #666; font-size: .9rem }
img, video { max-width: 100%; image-rendering: auto } .failed { color: #b00020 } code { font-size: .9rem }
"""


@dataclass(frozen=True)
class Picture:
    """A picture that a notebook showed: its bytes, file ending and the heading above the cell that drew it."""

    data: bytes
    ending: str
    caption: str


def model_rows(results: Mapping[str, Mapping[str, object]]) -> list[tuple[str, ...]]:
    """The table of models, title row first; later notebooks win, what nobody recorded is a dash."""
    found: dict[str, dict] = {"teacher": {}, "student": {}}
    for recorded in results.values():
        for name, value in recorded.items():
            if isinstance(value, Mapping) and any(column.key in value for column in COLUMNS):
                found.setdefault(name, {}).update(value)
    title = ("", *(column.title for column in COLUMNS))
    return [title, *((_words(name), *(_number(row, column) for column in COLUMNS)) for name, row in found.items())]


def notebook_rows(folder: Path) -> list[tuple[str, ...]]:
    """The table of a run's notebooks: state, minutes, error."""
    entries = (read_card(folder) or {}).get("notebooks", {})
    rows = [(name, e["status"], f"{e['seconds'] / 60:.1f}", e.get("error", "")) for name, e in entries.items()]
    return [("notebook", "state", "minutes", ""), *rows]


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length in columns, the first row underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def conditions(folder: Path) -> str:
    """The conditions of the last notebook that recorded results, '' if none did."""
    markers = [read_marker(folder, path.stem) for path in sorted(folder.glob("results/*.json"))]
    return next((marker["conditions"] for marker in reversed(markers) if marker.get("conditions")), "")


def write(folder: Path) -> Path:
    """Write index.html: the tables, movies, every picture of the executed notebooks and of figures/, links to the rest.

    Pictures of notebooks are laid out as files under pictures/. The page needs nothing from the network.
    """
    folder = Path(folder)
    card = read_card(folder) or {}
    body = "\n".join(_sections(folder, card))
    title = html.escape(f"Run {folder.name}")
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n"
    )
    partial = folder / ".index.html.partial"
    partial.write_text(page, encoding="utf-8")
    return partial.replace(folder / "index.html")


def notebook_pictures(path: Path) -> Iterator[Picture]:
    """The pictures among a notebook's outputs, in order; an unreadable notebook has none."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, OSError):
        return
    heading = path.stem
    for cell in cells:
        if cell["cell_type"] == "markdown":
            heading = _heading("".join(cell["source"])) or heading
        for output in cell.get("outputs", []):
            for kind, ending in _KINDS.items():
                if kind in output.get("data", {}):
                    yield Picture(base64.b64decode("".join(output["data"][kind])), ending, heading)
                    break


def _sections(folder: Path, card: Mapping) -> Iterator[str]:
    yield f"<p>Preset <b>{html.escape(card.get('preset', '?'))}</b>. {html.escape(conditions(folder))}</p>"
    yield _html_table(model_rows(all_results(folder)))
    for path in _files(folder, MOVIES):
        yield _figure(
            f'<video src="{_link(folder, path)}" controls loop muted autoplay playsinline></video>', path.name
        )
    shown = set()
    for name, entry in card.get("notebooks", {}).items():
        yield _notebook_section(folder, name, entry, shown)
    extra = [path for path in _files(folder / "figures", PICTURES) if _digest(path.read_bytes()) not in shown]
    if extra:
        yield "<h2>Figures</h2>" + "".join(_figure(_image(folder, path), _words(path.stem)) for path in extra)
    yield f"<h2>Files</h2>\n<ul>{''.join(_file_item(folder, path) for path in _files(folder, None))}</ul>"


def _notebook_section(folder: Path, name: str, entry: Mapping, shown: set[str]) -> str:
    link = f'<a href="{quote(name)}.ipynb">{html.escape(name)}.ipynb</a>'
    state = html.escape(f"{entry['status']}, {entry['seconds'] / 60:.1f} min")
    error = f'<p class="failed">{html.escape(entry["error"])}</p>' if entry.get("error") else ""
    figures = []
    for i, picture in enumerate(notebook_pictures(folder / f"{name}.ipynb")):
        shown.add(_digest(picture.data))
        path = _lay_out(folder / "pictures" / f"{name}-{i:02d}{picture.ending}", picture.data)
        figures.append(_figure(_image(folder, path), picture.caption))
    return f'<h2>{html.escape(_words(name))}</h2>\n<p class="dim">{link} · {state}</p>{error}\n' + "\n".join(figures)


def _lay_out(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _files(folder: Path, endings: Sequence[str] | None) -> list[Path]:
    """Files below `folder` with one of `endings`; None means all but hidden ones, the page and its pictures."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if endings is not None:
        return [path for path in paths if path.suffix.lower() in endings]
    return [path for path in paths if path.name not in _LEFT_OUT and path.parent.name != "pictures"]


def _file_item(folder: Path, path: Path) -> str:
    name = html.escape(str(path.relative_to(folder)))
    return f'<li><a href="{_link(folder, path)}">{name}</a> <span class="dim">{_size(path.stat().st_size)}</span></li>'


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(folder: Path, path: Path) -> str:
    return f'<img src="{_link(folder, path)}" alt="{html.escape(_words(path.stem), quote=True)}" loading="lazy">'


def _link(folder: Path, path: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


def _heading(markdown: str) -> str:
    """The last heading of a markdown cell without its marks, '' if it has none."""
    lines = [line.lstrip("#").strip() for line in markdown.splitlines() if line.startswith("#")]
    return lines[-1] if lines else ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(row: Mapping[str, object], column: Column) -> str:
    value = row.get(column.key)
    return f"{value:.{column.digits}f}" if isinstance(value, (int, float)) else "–"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
