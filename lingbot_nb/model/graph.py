"""Work that is prepared once and repeated: CUDA graphs and compiled functions that fall back to the plain call."""

import os
import warnings
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

Compile = Callable[[Callable], Callable]
"""A function -> the same function, compiled."""


class Compiler:
    """torch.compile for functions that must compile as a whole, one compilation for each set of shapes.

    If any of them fails, all of them are called plainly ever after, with one warning. `backend` is torch.compile's.
    """

    def __init__(self, backend: str | Callable = "inductor"):
        keep_what_is_compiled()
        compile_often()
        self.failed = False
        self._how = {"backend": backend, **({"options": FUSE_MORE} if backend == "inductor" else {})}

    def __call__(self, function: Callable) -> Callable:
        """`function`, compiled when it is first called."""
        compiled = torch.compile(function, dynamic=False, fullgraph=True, **self._how)

        @wraps(function)
        def call(*args):
            if not self.failed:
                try:
                    with _whole_rows():
                        return compiled(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self._warn(function, error)
            return function(*args)

        return call

    def _warn(self, function: Callable, error: Exception) -> None:
        self.failed = True
        warnings.warn(
            f"torch.compile of '{function.__name__}' failed, all runs uncompiled and slower: {_told(error)}",
            stacklevel=3,
        )


def compile_often() -> None:
    """Lets this process compile one function for many shapes and networks: every chunk length, picture size, number
    format and width is a compilation of its own. At torch's limit of eight it would go on uncompiled, with a mere
    warning, and FlexAttention in a form that holds all scores in memory."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def keep_what_is_compiled() -> None:
    """Inductor's cache in the home folder, unless a place was chosen for it. The default is a temporary folder, where a
    machine that starts anew would compile anew; whatever compiled before us has already written that down as chosen."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not chosen or Path(chosen).name.startswith("torchinductor_"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path.home() / ".cache" / "lingbot_nb" / "inductor")


FUSE_MORE = {"realize_acc_reads_threshold": 32, "realize_opcount_threshold": 100}
"""Inductor's options that let norm, rotation and cache write become one kernel: by default it stores what has been read
from many places, here keys in fp32, before it goes on."""

LONGEST_ROW = 16384
"""Numbers of a row that a GPU's thread block can hold."""


def _whole_rows():
    """While compiling: norms and scales over a row keep the row in registers. By default Inductor does so up to 1024
    numbers, and beyond writes what the second half of a kernel needs to memory, in fp32, to read it again."""
    try:
        from torch._inductor.virtualized import V

        return V.set_choices_handler(_rows_in_registers())
    except (ImportError, AttributeError):
        return nullcontext()


@cache
def _rows_in_registers():
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class RowsInRegisters(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            inner = features.get_reduction_hint() == ReductionHint.INNER
            if inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW):
                return True
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

        def uuid(self):
            return "rows in registers"

    return RowsInRegisters()


def _told(error: Exception) -> str:
    """An error in one line: compilers put what went wrong below a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


class Recorder:
    """Makes functions that repeat themselves as CUDA graphs out of one pool of memory: no two of them run at once.

    `first`: where other work wants the GPU too, their kernels come before its.
    """

    def __init__(self, *, first: bool = False):
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = False
        # A recorded kernel keeps the priority of the stream that it was recorded on, wherever it is replayed.
        self.recording_stream = torch.cuda.Stream(priority=-1) if first else None
        self._side = torch.cuda.Stream()

    def repeated(self, run: Callable[[], Any]) -> "Repeated":
        """`run` as a function of a key: see `Repeated`."""
        return Repeated(run, self)

    def aside(self, run: Callable[[], Any]) -> Any:
        """`run()` on a stream of its own, as recording will be: what warms up there is what gets recorded."""
        here = torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            outcome = run()
        here.wait_stream(self._side)
        return outcome


class Repeated:
    """`run()` by a key: for every key the first call is plain, the second is recorded as a CUDA graph, all others
    replay it. Equal keys must mean the same kernels on the same addresses.

    Returns what the recording returned: the same tensors each time, overwritten by the next replay. Python in `run`
    stands still in replays. If a recording fails, all functions of the recorder are called plainly ever after, with
    one warning: a graph may rely on what another one leaves where it left it.
    """

    def __init__(self, run: Callable[[], Any], recorder: Recorder):
        self._run = run
        self._recorder = recorder
        self._seen: set[Hashable] = set()
        self._recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, key: Hashable) -> Any:
        if self._recorder.failed:
            return self._run()
        if key not in self._seen:
            self._seen.add(key)
            return self._recorder.aside(self._run)
        if key not in self._recordings and not self._record(key):
            return self._run()
        graph, outcome = self._recordings[key]
        graph.replay()
        return outcome

    def _record(self, key: Hashable) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (a process group's watchdog, say) may ask the device things meanwhile.
            how = dict(pool=self._recorder.pool, stream=self._recorder.recording_stream)
            with torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                outcome = self._run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._recorder.failed = True
            warnings.warn(
                f"no CUDA graph could be recorded, the host launches all kernels: {_told(error)}", stacklevel=3
            )
            return False
        self._recordings[key] = graph, outcome
        return True
