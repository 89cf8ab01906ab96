"""Several processes on one profile (`torchrun`): each records a share of the batches, rank 0 merges and writes.

Tensors travel through torch.distributed, over gloo; on GPUs nccl is set up beside it for what runs on the device.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from actsparse.errors import RunError, reason_of
from actsparse.pipelines import ranks

# How long a process waits for another: probes and solving run in rank 0 alone.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run: this one's `rank` of `size`. A team of one sends nothing."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batches: list[list[int]]) -> list[list[int]]:
        """The batches that this process records."""
        return batches[self.rank :: self.size]

    def told(self, numbers: list[int]) -> list[int]:
        """What rank 0 was given here, in every process."""
        if self.size == 1:
            return numbers
        with _speaking():
            length = torch.tensor([len(numbers)])
            dist.broadcast(length, 0)
            content = torch.tensor(numbers if self.leads else [0] * int(length), dtype=torch.int64)
            dist.broadcast(content, 0)
        return content.tolist()

    def told_text(self, text: str) -> str:
        """The text that rank 0 was given here, in every process."""
        return bytes(self.told(list(text.encode()))).decode()

    def wait(self) -> None:
        """Until every process is here."""
        self.told([])

    def collect(self, state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """In rank 0 the state of every other rank, one after the other; elsewhere nothing, once `state` was sent.

        All states have the same names in the same order; lengths may differ.
        """
        if self.size == 1:
            return
        if not self.leads:
            with _speaking():
                for tensor in state.values():
                    plain = tensor.detach().cpu().contiguous()
                    dist.send(torch.tensor([plain.dim(), *plain.shape, *[0] * (4 - plain.dim())]), 0)
                    if plain.numel():
                        dist.send(plain.view(torch.uint8) if plain.dim() else plain.view(1).view(torch.uint8), 0)
            return
        for rank in range(1, self.size):
            with _speaking():
                yield {name: _received(rank, tensor.dtype) for name, tensor in state.items()}


ALONE = Team()


def _received(rank: int, dtype: torch.dtype) -> Tensor:
    header = torch.zeros(5, dtype=torch.int64)
    dist.recv(header, rank)
    shape = header[1 : 1 + int(header[0])].tolist()
    found = torch.empty(shape, dtype=dtype)
    if found.numel():
        dist.recv(found.view(torch.uint8) if found.dim() else found.view(1).view(torch.uint8), rank)
    return found


@contextmanager
def team(device: str) -> Iterator[Team]:
    """The team that `torchrun` started this process in; a team of one without it.

    Raises RunError where the other processes cannot be reached.
    """
    size = ranks.size()
    if size == 1 or dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    with _speaking():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """`auto` and `cuda` as the GPU that belongs to this process of a team."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or ranks.size() == 1 or device not in ("auto", "cuda"):
        return device
    gpus = torch.cuda.device_count()
    return f"cuda:{int(rank) % gpus}" if gpus else device


@contextmanager
def _speaking() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"a process of this run cannot be reached: {reason_of(error)}",
            "start the same command again: what was finished is kept",
        ) from None
