"""The processes that torchrun started together, or the one that runs alone."""

import os
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn


class Processes:
    """This process among its peers; on GPUs each process has one."""

    def __init__(self) -> None:
        """Join the peers that torchrun's variables name."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.world == 1:
            return
        gradients = [gradient_of(parameter) for parameter in parameters]
        flat = torch.cat([gradient.view(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))

    def from_first(self, value: float) -> float:
        """The value that the first process has."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def leave(self) -> None:
        """Wait for the peers, then part."""
        if self.world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, which every parameter has after a backward pass."""
    assert parameter.grad is not None
    return parameter.grad
