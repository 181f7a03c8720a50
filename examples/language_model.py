"""A language model of your own, with a head whose prototypes are sharded over ranks, under plain torch.distributed.

    pip install .
    python examples/language_model.py [TEXT]                            # one process
    torchrun --nproc-per-node 2 examples/language_model.py [TEXT]       # each rank half of the batch and of the rows

Seconds on a CPU. It learns the bytes of TEXT, or its own, and prints the loss of every tenth step, 1.4 nats per byte at
the end: the same figures for any number of ranks, to rounding.

Whose gradient is whose. The loss is the mean over the tokens of the whole group, and its gradient to the hidden states
is multiplied by the group's size: DDP's average over ranks is then that of the mean. The gradient of a rank's own
prototypes is complete as it is, so they stay outside DDP, and each rank's optimiser has the rows that it holds.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from overtone import HarmonicHead, shard_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BYTES, DIM = 256, 64
BATCH, LENGTH, STEPS = 16, 64, 100  # of all ranks together


class Trunk(nn.Module):
    """Any module from tokens (B, T) to hidden states (B, T, D) will do; here a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, DIM)
        self.gru = nn.GRU(DIM, DIM, batch_first=True)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> hidden states (B, T, D)."""
        return self.norm(self.gru(self.embedding(tokens))[0])


def batches(text: Tensor) -> Tensor:
    """(STEPS, BATCH, LENGTH + 1) pieces of the text, the same on every rank."""
    starts = torch.randint(len(text) - LENGTH, (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    return text[starts[..., None] + torch.arange(LENGTH + 1)]


def main() -> None:
    """Trains on this rank; the first one prints."""
    group = None
    if "RANK" in os.environ:  # as torchrun sets it
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        group = dist.group.WORLD
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    if BATCH % ranks:
        sys.exit(f"{ranks} ranks: every rank must have as many tokens, so take a divisor of {BATCH}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    trunk = Trunk().to(device)
    head = HarmonicHead(BYTES, DIM, shard=shard_of(BYTES, group), seed=0, device=device)
    optimizer = torch.optim.AdamW([*trunk.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.0)
    replicas = DistributedDataParallel(trunk) if group else trunk
    scale = head.feature_length / DIM**0.5  # the length of hidden states that a head starts best with

    text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
    for step, batch in enumerate(batches(torch.tensor(list(text)))):
        tokens = batch[rank::ranks].to(device)
        loss = head(replicas(tokens[:, :-1]) * scale, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1:3}  loss {loss.item():.6f}", flush=True)
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
