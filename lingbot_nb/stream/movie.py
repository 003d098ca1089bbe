"""Pixel frames to an mp4 file, through PyAV."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from lingbot_nb.presets import FPS


class Movie:
    """An mp4 (H.264) that is written frame by frame and appears under its name only when it is whole.

    Frames are u8 [H, W, 3] of one size; odd sizes are padded by repeating the last row or column, which H.264 needs.
    `scale` enlarges every pixel to a block (small worlds are hard to see in most players). Raises RuntimeError without
    PyAV and ValueError for a frame of another size.
    """

    def __init__(self, path: str | Path, fps: float = FPS, *, scale: int = 1, crf: int = 18):
        try:
            import av
        except ImportError as error:
            raise RuntimeError("writing mp4 needs PyAV: run `pip install av`") from error
        self._av = av
        self.path, self.scale, self.crf = Path(path), scale, crf
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rate = round(fps)
        self._temporary = self.path.with_name(f".{self.path.name}.part")
        self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = None
        self._size: tuple[int, int] | None = None
        self.frames = 0

    def append(self, frame: np.ndarray) -> None:
        """Add one pixel frame, u8 [H, W, 3]."""
        if self._size is None:
            self._size = frame.shape[:2]
            self._stream = self._open_stream(frame.shape[0] * self.scale, frame.shape[1] * self.scale)
        if frame.shape[:2] != self._size:
            raise ValueError(f"frame of {frame.shape[:2]} in a movie of {self._size}: all frames share one size")
        picture = self._av.VideoFrame.from_ndarray(self._fit(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> Path:
        """Finish the file and give it its name."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if not self.frames:
            self._temporary.unlink(missing_ok=True)
            raise ValueError(f"no frames for {self.path.name}: a movie needs at least one")
        os.replace(self._temporary, self.path)
        return self.path

    def discard(self) -> None:
        """Drop what was written; the name stays as it was."""
        with suppress(OSError):  # on a full disk the end cannot be written either
            self._container.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "Movie":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.discard() if kind else self.close()

    def _open_stream(self, height: int, width: int):
        stream = self._container.add_stream("libx264", rate=self._rate)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(self.crf), "preset": "veryfast"}
        stream.thread_count = 1
        return stream

    def _fit(self, frame: np.ndarray) -> np.ndarray:
        large = frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        odd = [(0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)]
        return np.ascontiguousarray(np.pad(large, odd, mode="edge"))


def write_movie(path: str | Path, frames: Iterable[np.ndarray], fps: float = FPS, *, scale: int = 1) -> Path:
    """Write pixel frames u8 [n, H, W, 3] to `path` as mp4; an existing file is replaced only by a whole one."""
    with Movie(path, fps, scale=scale) as movie:
        for frame in frames:
            movie.append(frame)
    return movie.path


def read_movie(path: str | Path) -> np.ndarray:
    """The pixel frames u8 [n, H, W, 3] of a movie (as stored: H.264 is lossy, odd sizes were padded)."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError("reading mp4 needs PyAV: run `pip install av`") from error
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
