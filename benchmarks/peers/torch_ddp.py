"""PyTorch DistributedDataParallel over Gloo, a thread a rank. BatchNorm is each rank's own: SyncBatchNorm refuses CPUs.

Started by torchrun: ``python -m torch.distributed.run --standalone --nproc-per-node 2``.
"""

import os

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from benchmarks.peers.turns import GLOBAL_BATCH, LEARNING_RATE, LOG_EVERY_STEPS, MODE, load, steps, take_turns

if os.environ.get("BENCH_BIND") == "yes":  # which torchrun does not do by itself
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["LOCAL_RANK"])]})
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)


def on_host(part: str) -> TensorDataset:
    """The data as tensors in [0, 1]."""
    images, labels = load(part)
    return TensorDataset(torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels.astype(np.int64)))


net = nn.Sequential(
    nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
    nn.Conv2d(20, 50, 3), nn.BatchNorm2d(50), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
    nn.Flatten(), nn.Linear(1250, 128), nn.ReLU(inplace=True), nn.Linear(128, 10),
)  # fmt: skip
for layer in net:
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.normal_(layer.weight, std=0.01)
model = DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
train_set, test_set = on_host("train"), on_host("t10k")


def train_step(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step; its loss, and how many are right."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(images)
    loss = cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def batches(dataset: TensorDataset, sampler: DistributedSampler) -> DataLoader:
    """Whole batches are indexed at once, not sample by sample."""
    whole = BatchSampler(sampler, GLOBAL_BATCH // size, drop_last=False)
    return DataLoader(dataset, sampler=whole, batch_size=None)


sampler = DistributedSampler(train_set)
train_batches = batches(train_set, sampler)
test_batches = batches(test_set, DistributedSampler(test_set, shuffle=False))
epochs = 0


def epoch() -> None:
    """Train, log, evaluate."""
    global epochs
    sampler.set_epoch(epochs)
    model.train()
    for number, (images, labels) in enumerate(train_batches):
        loss, right = train_step(images, labels)
        if number % LOG_EVERY_STEPS == 0 and rank == 0:
            print(f"epoch {epochs} step {number} loss {loss.item():.4f} right {right.item()}", flush=True)
    model.eval()
    right = torch.zeros(1)
    with torch.inference_mode():
        for images, labels in test_batches:
            right += (net(images).argmax(1) == labels).sum()
    dist.all_reduce(right)
    if rank == 0:
        print(f"epoch {epochs} test accuracy {right.item() / len(test_set):.4f}", flush=True)
    epochs += 1


share = GLOBAL_BATCH // size
images, labels = (tensor[: 64 * GLOBAL_BATCH][rank::size] for tensor in train_set.tensors)


def step(number: int) -> None:
    """On a batch that lies ready."""
    first = number % 64 * share
    train_step(images[first : first + share], labels[first : first + share])


turn = steps(step)
take_turns(turn if MODE == "step" else epoch, lambda: [turn() for _ in range(3)], rank, dist.barrier)
dist.destroy_process_group()
