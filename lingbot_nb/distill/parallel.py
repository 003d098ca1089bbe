"""One training on several GPUs: every rank holds the whole model, draws its rows of a batch, and averages gradients.

All functions do nothing, and cost nothing, in a single process. Ranks are started by torchrun (`launch`).

Random numbers come in two kinds. A `SharedGenerator` is seeded alike on all ranks, which then stay in step: a training
gives the same curve on any number of ranks with the same global batch, and rank 0's checkpoint is everyone's. A plain
generator, seeded apart on each rank, suits ranks that hold different data.
"""

import os
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start() -> tuple[int, int, torch.device]:
    """(rank, ranks, device) of this process; joins the group that torchrun announces, NCCL on GPUs and gloo on CPUs."""
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _own_device(local)
    if ranks > 1:
        _join(device)
    return (dist.get_rank() if ranks > 1 else 0), ranks, device


MEETING = "LINGBOT_MEETING"
"""Environment variable with the file by which the processes of one machine find each other: the same for all, not there
before."""


def meet(rank: int, ranks: int) -> torch.device:
    """Joins the `ranks` processes that were told the same `MEETING`, NCCL on GPUs and gloo on CPUs; returns this one's
    device. No port is opened to the outside: exchanges use loopback alone."""
    os.environ.update(NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    device = _own_device(rank % max(torch.cuda.device_count(), 1))
    _join(device, init_method=f"file://{os.environ[MEETING]}", rank=rank, world_size=ranks)
    return device


def _own_device(local: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _join(device: torch.device, **where) -> None:
    # NCCL would map the buffers of a recorded exchange into the peer. With PyTorch's expandable segments the first
    # replay then never ends (two H100, torch 2.11); without the mapping the exchange copies once more.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **where)


def several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """(rank, ranks) of this process; (0, 1) when it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


class SharedGenerator(torch.Generator):
    """A generator that all ranks seed alike and advance alike: `draw` gives each rank its rows of one global draw."""


def shared_generator(device: torch.device | str, seed: int) -> SharedGenerator:
    return SharedGenerator(device).manual_seed(seed)


FAR = 1_000_003
"""Between the seeds of two steps: farther than those of ranks and purposes lie apart."""


def draw_on(generator: torch.Generator, seed: int, step: int) -> None:
    """Sends a rank's own generator to a place that only its seed and the step decide: for a training that resumes from
    another rank's checkpoint. It draws what it would not have drawn otherwise, and nothing twice."""
    generator.manual_seed(seed + FAR * step)


def draw(make: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """make(shape), random numbers with one row a sample of the batch.

    From a `SharedGenerator` every rank makes the rows of all ranks and keeps its own, so that a sample's noise does not
    depend on how many ranks share the batch.
    """
    rank, ranks = place()
    rows = shape[0]
    if ranks == 1 or not isinstance(generator, SharedGenerator):
        return make(tuple(shape))
    return make((ranks * rows, *shape[1:]))[rank * rows : (rank + 1) * rows]


def rounds(global_batch: int, most: int | None = None) -> tuple[int, int]:
    """(clips at a time, times) with which each rank makes its part of an update's `global_batch` clips, at most `most`
    at a time: what a step takes as its batches' size and as `accumulate`.

    Raises ValueError when the ranks cannot share the clips out evenly.
    """
    ranks = place()[1]
    if global_batch < 1 or global_batch % ranks:
        raise ValueError(f"a batch of {global_batch} clips does not spread over {ranks} processes: use a multiple")
    mine = global_batch // ranks
    size = next(size for size in range(min(mine, most or mine), 0, -1) if mine % size == 0)
    return size, mine // size


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], values: Sequence[Tensor] = ()) -> list[Tensor]:
    """Replaces every gradient by its mean over ranks, in one all-reduce of all of them.

    `values`, scalars to log, travel along; their means are returned. Gradients of sharded parameters (`sharded`) are
    means already.
    """
    if not several():
        return list(values)
    gradients = [p.grad for p in parameters if p.grad is not None and not _is_shard(p.grad)]
    like = gradients[0] if gradients else values[0].float()
    flat = torch.cat([*(g.reshape(-1) for g in gradients), *(v.detach().reshape(1).to(like) for v in values)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, means = flat.split([*(g.numel() for g in gradients), len(values)])
    if gradients:
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return list(means.unbind())


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients to norm `limit` where theirs is larger, and returns the norm before, of all ranks' shards
    together; fp32, on every rank the same."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if _is_shard(norm) else norm


def sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether each rank holds only its shard of these parameters."""
    return any(_is_shard(p) for p in parameters)


def _is_shard(tensor: Tensor) -> bool:
    # Importing DTensor to ask takes a second, which those who never shard need not wait.
    return hasattr(tensor, "full_tensor")


def agree(value: float, device: torch.device | str) -> float:
    """Rank 0's value on every rank: what decides about stopping or branching must be the same everywhere.

    The host waits for the device here: not for every step.
    """
    if not several():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.item()


@torch.no_grad()
def same_start(module: nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank."""
    if several():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def gathered(tensor: Tensor) -> Tensor:
    """The ranks' tensors, which must have one shape, concatenated along the first dimension."""
    if not several():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
