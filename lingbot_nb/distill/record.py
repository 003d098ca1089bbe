"""A training step's forward and backward, recorded once as a CUDA graph and replayed.

A small model on a fast GPU waits for its host: the tiny preset's step is thousands of launches of a few microseconds.
Recorded, it is one launch, random draws included.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lingbot_nb.distill.forcing import Info

Loss = Callable[[], tuple[Tensor, Info]]
"""() -> loss and what to log, with gradient."""
Gradients = Callable[[Sequence[nn.Parameter], Loss, int], tuple[Tensor, Info]]
"""(parameters, loss, accumulate) -> the mean of `accumulate` losses and the last one's info, detached; the parameters'
gradients are filled."""

WARM_UP = 2
"""Plain calls before recording: compilers, caches and kernel choices must have settled."""


def fresh(parameters: Sequence[nn.Parameter], loss: Loss, accumulate: int = 1) -> tuple[Tensor, Info]:
    """Gradients by running the loss and its backward."""
    for parameter in parameters:
        parameter.grad = None
    total, info = 0.0, {}
    for _ in range(accumulate):
        value, info = loss()
        (value / accumulate).backward()
        total = total + value.detach() / accumulate
    return total, {name: part.detach() for name, part in info.items()}


class Recorded:
    """`fresh`, from the third call on as a replay of one recording.

    What a recording can hold: the same loss every time, on tensors that stay where they are (a batch drawn inside the
    loss is fine, one that the host picks is not), drawing from `generators` alone, all on one CUDA device. Python in
    the loss runs for the last time while it is recorded: counters and logs in it stand still from then on.

    Raises what CUDA raises when the loss waits for the device or copies from the host.
    """

    def __init__(self, *generators: torch.Generator):
        self.generators = tuple(dict.fromkeys(generators))
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, parameters: Sequence[nn.Parameter], loss: Loss, accumulate: int = 1) -> tuple[Tensor, Info]:
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._aside(lambda: fresh(parameters, loss, accumulate))
        if self._graph is None:
            self._record(parameters, loss, accumulate)
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._graph.replay()
        # The recording writes to the same places each time, and the caller may read them steps later.
        total, *values = torch.stack([self._total.float(), *(v.float() for v in self._info.values())]).unbind()
        return total, dict(zip(self._info, values, strict=True))

    def _record(self, parameters: Sequence[nn.Parameter], loss: Loss, accumulate: int) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            # A plain view of the same state: a subclass is refused.
            graph.register_generator_state(generator.graphsafe_get_state())
        # Other threads (a process group's watchdog) may ask the device things meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._total, self._info = fresh(parameters, loss, accumulate)
        self._gradients = [parameter.grad for parameter in parameters]
        self._graph = graph

    @staticmethod
    def _aside(call: Callable[[], tuple[Tensor, Info]]) -> tuple[Tensor, Info]:
        # On a stream of its own, as recording will be: what warms up there is what gets recorded.
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            result = call()
        here.wait_stream(side)
        return result
