"""Train and play at once: the newest student of a run, loaded beside the play that goes on."""

import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lingbot_nb.distill.train import checkpoints
from lingbot_nb.model import checkpoint
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import ModelSize


@dataclass(frozen=True)
class Student:
    """Weights that a run has written: the model, its training step (None where its card has none), the file."""

    dit: DiT
    step: int | None
    file: Path


class Newest:
    """The newest weights under `folder`: a training checkpoint (step-….pt in it or anywhere below) or a file of
    weights (`file`), whichever was written last.

    `role` is the model's name in the training state; its moving average is taken where there is one. Only whole files
    count: a checkpoint exists once its card does, and its bytes must match the card.
    """

    def __init__(self, folder: str | Path, size: ModelSize, *, role: str = "student", file: str | None = None):
        self.folder, self.size, self.role = Path(folder), size, role
        self.file = file or f"{role}.safetensors"
        self._seen: tuple[Path, int] | None = None

    def poll(self) -> Student | None:
        """The newest weights if they have not been given before, else None.

        Raises ValueError when they are of another model; they are then not tried again.
        """
        before = self._seen
        try:
            found = max(self._candidates(), key=lambda candidate: candidate[1], default=None)
            if found is None or found == before:
                return None
            self._seen = found
            return self._read(found[0])
        except FileNotFoundError:  # replaced or cleared away while it was being read: the next look finds the next one
            self._seen = before
            return None

    def _candidates(self) -> list[tuple[Path, int]]:
        folders = {card.parent for card in self.folder.rglob("step-*.json")}
        files = [file for folder in folders for file in checkpoints(folder)[-1:]]
        weights = self.folder / self.file
        files += [weights] if weights.exists() else []
        return [(file, card.stat().st_mtime_ns) for file in files if (card := checkpoint.card_path(file)).exists()]

    def _read(self, file: Path) -> Student:
        data, card = file.read_bytes(), checkpoint.read_card(file)
        if hashlib.sha256(data).hexdigest() != card["sha256"]:
            raise FileNotFoundError(f"{file} is being replaced")
        dit = DiT(self.size)
        if file.suffix == ".pt":
            return Student(self._fill(dit, file, data), card["step"], file)
        checkpoint.load_into(file, dit)
        return Student(dit, card.get("steps"), file)

    def _fill(self, dit: DiT, file: Path, data: bytes) -> DiT:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if self.role not in state["models"]:
            raise ValueError(f"{file} holds no {self.role}, only {', '.join(state['models'])}: name another role")
        averages = state["averages"]
        try:
            dit.load_state_dict(averages[self.role]["module"] if self.role in averages else state["models"][self.role])
        except RuntimeError as error:
            raise ValueError(f"{file} is of another model size: {str(error).splitlines()[-1].strip()}") from error
        return dit


class Follower:
    """A thread that looks for new weights every `seconds` and hands them to `take(student)`; `tell(text)` gets what
    went wrong. Reading takes no time from the play: the player swaps between two chunks."""

    def __init__(
        self, newest: Newest, take: Callable[[Student], None], tell: Callable[[str], None], seconds: float = 1
    ):
        self._newest, self._take, self._tell, self._seconds = newest, take, tell, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lingbot-follow", daemon=True)

    def start(self) -> "Follower":
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; waits for a file that is being read."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _look(self) -> None:
        while not self._ended.is_set():
            try:
                student = self._newest.poll()
                if student is not None:
                    self._take(student)
            except (ValueError, OSError) as error:
                self._tell(str(error))
            self._ended.wait(self._seconds)
