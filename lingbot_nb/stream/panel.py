"""The player's widgets and their layout: what is on screen, and nothing about what happens."""

from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as w
import numpy as np
from ipyevents import Event
from traitlets import CInt

from lingbot_nb.stream import look

EVENTS = ["keydown", "keyup", "mouseenter", "mouseleave"]


class _Acknowledged(w.IntText):
    """A number that the browser sets; not echoed back, which would double the traffic."""

    value = CInt(0).tag(sync=True, echo_update=False)


class _Picture(w.Image):
    """A picture and its number in one message: the page links the number to the acknowledgement.

    The picture travels as a data URI: a third more bytes, but a browser spends 4 ms less on it than on a blob.
    """

    number = CInt(0).tag(sync=True)

    def show(self, jpeg: bytes, number: int | None) -> None:
        """Send a picture; without a number it is not acknowledged."""
        with self.hold_sync():
            self.value = look.data_uri(jpeg).encode()
            if number is not None:
                self.number = number


@dataclass(frozen=True)
class Offer:
    """What a session lets the user choose from."""

    title: str
    about: str
    keys: str
    prompts: Sequence[str]
    prompt: str
    scenes: Sequence[np.ndarray]
    steps: int
    seed: int
    height: int
    width: int
    chunk: int | None = None
    longest_chunk: int = 1
    window: int | None = None
    sink: int = 0
    shortest_window: int = 1
    longest_window: int = 0
    longest_sink: int = 0


class Panel:
    """All widgets of one player; `root` is what a notebook shows."""

    def __init__(self, offer: Offer):
        self.offer = offer
        self._build_stage()
        self._build_controls()
        self.header = w.HTML()
        body = w.Box([self._main(), self._side()])
        body.add_class("lb-body")
        hidden = w.Box([self.arrived])
        hidden.add_class("lb-hidden")
        style = w.HTML(look.STYLE + look.scene_style(offer.scenes))
        style.add_class("lb-style")
        self.root = w.VBox([style, self.header, body, hidden])
        self.root.add_class("lb-player")

    def _build_stage(self) -> None:
        offer = self.offer
        self.picture = _Picture(format="url", layout=w.Layout(width="100%", height="auto"))
        self.veil = w.HTML()
        self.veil.add_class("lb-veil")
        # The box keeps the picture's shape before the first frame has arrived, so that nothing jumps.
        self.stage = w.Box([self.picture, self.veil])
        self.stage.add_class("lb-stage")
        self.shape_style = w.HTML(f"<style>.lb-stage {{ aspect-ratio: {offer.width} / {offer.height}; }}</style>")
        self.shape_style.add_class("lb-style")
        self.events = Event(source=self.stage, watched_events=EVENTS)
        self.arrived = _Acknowledged(0)
        self.link = w.jsdlink((self.picture, "number"), (self.arrived, "value"))
        self.caps, self.statistics, self.strip = w.HTML(), w.HTML(), w.HTML()

    def _build_controls(self) -> None:
        offer = self.offer
        self.scenes = [self._scene(index) for index in range(len(offer.scenes))]
        prompts = [("choose a prompt …", ""), *((_short(p), p) for p in offer.prompts)]
        self.prompts = w.Dropdown(options=prompts, description="Ready-made prompts")
        self.prompt = w.Textarea(
            offer.prompt, rows=3, placeholder="What the world is like", description="Prompt", continuous_update=False
        )
        self.prompt.tooltip = "Prompt: takes effect at the next chunk when you leave the box"
        self.steps, self.steps_label = _slider("Steps", offer.steps, 1, 4, "Denoising steps per chunk")
        self.chunk, self.chunk_label = _slider(
            "Chunk", offer.chunk or 1, 1, offer.longest_chunk,
            "Latent frames made together: more keep up more easily, fewer answer keys sooner",
        )  # fmt: skip
        self.window, self.window_label = _slider(
            "Window", offer.window or 0, offer.shortest_window, offer.longest_window,
            "Latent frames in sight: the cache is built anew",
        )  # fmt: skip
        self.sink, self.sink_label = _slider(
            "Sink", offer.sink, 0, offer.longest_sink, "First latent frames that stay in sight: the cache is built anew"
        )
        wide = w.Layout(flex="1 1 auto", width="auto")
        self.seed = w.IntText(offer.seed, description="Seed", continuous_update=False, layout=wide)
        self.seed.tooltip = "Seed: start again with it"
        self.new_seed = _button("Another seed", "Another seed, start again", icon="random", width="40px")
        self.new_seed.add_class("lb-unwritten")
        self.script = w.Text("", placeholder="w-40,jl-20,none-8", description="Play keys", continuous_update=False)
        self.script.tooltip = "Keys to play by themselves: letters, a hyphen, pixel frames; Enter plays them"
        self.pause = _button("Pause", "Pause or go on (Space)", icon="pause")
        self.restart = _button("Reset", "Start again from the start image (R)", icon="undo")
        self.record = _button("Record", "Record to mp4, with the keys beside it", icon="circle")
        self.message = w.HTML()

    def _scene(self, index: int) -> w.Button:
        button = _button(f"Scene {index + 1}", f"Start from scene {index + 1}")
        button.add_class(f"lb-scene-{index}")
        button.add_class("lb-unwritten")
        return button

    def _main(self) -> w.VBox:
        self.caps.add_class("lb-keys")
        self.statistics.add_class("lb-numbers")
        deck = w.Box([self.caps, self.statistics], layout=w.Layout(overflow="visible", align_items="center"))
        deck.add_class("lb-deck-row")
        help_line = w.HTML(look.key_help(self.offer.keys))
        column = w.VBox([self.stage, deck, self.strip, help_line, self.shape_style])
        column.add_class("lb-main")
        return column

    def _side(self) -> w.VBox:
        groups = [_group(None, _row(self.pause, self.restart, self.record))]
        if self.scenes:
            gallery = w.Box(self.scenes)
            gallery.add_class("lb-scenes")
            groups.append(_group("Scene", gallery))
        prompt = [self.prompts, self.prompt] if self.offer.prompts else [self.prompt]
        groups.append(_group("Prompt", *prompt))
        steps, chunk = _group(self.steps_label, self.steps), _group(self.chunk_label, self.chunk)
        groups.append(steps if self.offer.chunk is None else _pair(steps, chunk))
        if self.offer.window is not None:
            groups.append(_pair(_group(self.window_label, self.window), _group(self.sink_label, self.sink)))
        groups.append(_group("Seed", _row(self.seed, self.new_seed)))
        groups.append(_group("Play keys", self.script))
        groups.append(self.message)
        column = w.VBox(groups)
        column.add_class("lb-side")
        return column

    def choose_scene(self, index: int) -> None:
        """Ring the scene's button."""
        for other, button in enumerate(self.scenes):
            (button.add_class if other == index else button.remove_class)("lb-chosen")

    def show_paused(self, paused: bool) -> None:
        self.pause.description, self.pause.icon = ("Play", "play") if paused else ("Pause", "pause")

    def show_recording(self, recording: bool) -> None:
        self.record.description, self.record.icon = ("Stop", "stop") if recording else ("Record", "circle")
        self.record.button_style = "danger" if recording else ""

    def disable(self) -> None:
        """Grey out every control: this player has ended."""
        controls = [
            self.prompts,
            self.prompt,
            self.steps,
            self.chunk,
            self.window,
            self.sink,
            self.seed,
            self.new_seed,
            self.script,
        ]
        for control in [*controls, self.pause, self.restart, self.record, *self.scenes]:
            control.disabled = True


def _button(description: str, tooltip: str, icon: str = "", width: str = "auto") -> w.Button:
    layout = w.Layout(width=width, flex="1 1 0" if width == "auto" else "0 0 auto", min_width="0")
    return w.Button(description=description, tooltip=tooltip, icon=icon, layout=layout)


def _slider(name: str, value: int, low: int, high: int, tooltip: str) -> tuple[w.IntSlider, w.HTML]:
    """A slider and the heading that shows its value."""
    slider = w.IntSlider(value, min(low, value), max(high, value), readout=False, continuous_update=False)
    slider.tooltip = tooltip
    heading = w.HTML(look.label(name, str(value)))
    slider.observe(lambda change: setattr(heading, "value", look.label(name, str(change["new"]))), "value")
    return slider, heading


def _row(*children: w.Widget) -> w.Box:
    row = w.Box(children)
    row.add_class("lb-row")
    return row


def _pair(*groups: w.Widget) -> w.Box:
    """Two controls beside each other."""
    row = _row(*groups)
    row.add_class("lb-pair-row")
    return row


def _group(heading: str | w.Widget | None, *children: w.Widget) -> w.VBox:
    head = [w.HTML(look.label(heading))] if isinstance(heading, str) else [heading] if heading else []
    group = w.VBox([*head, *children])
    group.add_class("lb-group")
    return group


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:39] + "…"
