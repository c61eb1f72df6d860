"""Trains the denoising autoencoder on several processes with CTLD: DDP or FSDP2, on CPUs or GPUs.

    torchrun --nproc-per-node 2 examples/distributed_autoencoder.py
    torchrun --nproc-per-node 2 examples/distributed_autoencoder.py --parallel ddp
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 \\
        examples/distributed_autoencoder.py

Every rank takes its part of the same minibatches, so that the run is the same for any number of ranks, up to
the rounding of sums over ranks. A checkpoint is written every --checkpoint-every steps, in a folder of its
own, and complete or not there at all: if a rank dies, start the same command again, with as many ranks as
there are, or let torchrun do it (--max-restarts); at most the steps since are lost. For that, torchrun must
give every start a key-value store of its own (the variable above): in the one that it shares by default,
new processes can find the addresses of the dead ones (https://github.com/pytorch/pytorch/issues/135712).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import autoencoder_data
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from autoencoder_data import DataError, Images
from denoising_autoencoder import build_model, cross_entropy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ctld_cuda import CTLD

Tensor = torch.Tensor

KEPT = 2  # complete checkpoints
TIMEOUT = datetime.timedelta(minutes=2)


class Batches:
    """Minibatches that depend on nothing but seed and step; a rank takes its part of each."""

    def __init__(self, images: Tensor, size: int, corruption: float, seed: int) -> None:
        self.images, self.size, self.corruption, self.seed = images, size, corruption, seed
        self.per_epoch = len(images) // size

    def part(self, step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
        """Corrupted and clean images of one rank."""
        epoch, number = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.images), generator=self._generator(epoch, 0))
        batch = order[number * self.size : (number + 1) * self.size].to(self.images.device)
        kept = torch.rand(self.size, self.images.shape[1], generator=self._generator(step, 1))
        mine = slice(rank * self.size // ranks, (rank + 1) * self.size // ranks)
        clean = self.images[batch[mine]]
        return clean * (kept[mine] >= self.corruption).to(clean), clean

    def _generator(self, number: int, stream: int) -> torch.Generator:
        # torch's generators mix their seeds well enough for neighbours to be unrelated
        return torch.Generator().manual_seed((self.seed << 40) + (number << 1) + stream)


def parallel(model: nn.Sequential, kind: str, device: torch.device) -> nn.Module:
    """The model on all ranks: replicated (ddp), or every layer's rows shared out (fsdp)."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Checkpoints:
    """Folders step-<number>; one is complete when its .metadata, which is written last, is there."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: CTLD) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer

    def complete(self) -> list[Path]:
        """Oldest first."""
        return sorted(path.parent for path in self.folder.glob("step-*/.metadata"))

    def save(self, step: int) -> None:
        path = self.folder / f"step-{step:08d}"
        if dist.get_rank() == 0:  # what a killed run has left there
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        dcp.save(self._state(), checkpoint_id=path)
        if dist.get_rank() == 0:
            for old in self.complete()[:-KEPT]:
                shutil.rmtree(old)

    def load(self) -> int:
        """The number of steps that the newest complete checkpoint has done; 0 if there is none."""
        found = self.complete()
        dist.barrier()  # all have looked before anyone writes
        if not found:
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return int(found[-1].name.removeprefix("step-"))

    def _state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Constant while CTLD explores, then linear to 0."""
    explored = args.explore * args.steps
    return args.lr * min(1.0, (args.steps - step) / max(args.steps - explored, 1.0))


def say(text: str) -> None:
    """Prints a line at once: torchrun's processes share the terminal."""
    print(text + "\n", end="", flush=True)


def train(args: argparse.Namespace, images: Images, device: torch.device) -> dict:
    """Trains; returns the result, the same on all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = parallel(build_model(1.0, args.seed, device), args.parallel, device)
    optimizer = CTLD(
        model.parameters(),
        lr=args.lr,
        num_data=len(images.train),
        temperature=args.temperature,
        explore_steps=round(args.explore * args.steps),
        seed=args.seed,
    )
    batches = Batches(images.train, args.batch_size, args.corruption, args.seed)
    checkpoints = Checkpoints(args.out, model, optimizer)
    first = checkpoints.load()
    say(f"rank {rank} of {ranks}: process {os.getpid()}, from step {first}")
    for step in range(first, args.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        corrupted, clean = batches.part(step, rank, ranks)
        loss = cross_entropy(model(corrupted), clean)
        optimizer.zero_grad()
        loss.backward()
        # every rank gives the loss of its part; CTLD takes their mean for the energy
        optimizer.step(loss=loss.detach())
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            checkpoints.save(step + 1)
            if rank == 0:
                say(f"step {step + 1}: loss {float(loss.detach()):.2f}, {optimizer.phase}")
    model.eval()
    with torch.no_grad():
        test = cross_entropy(model(images.corrupted_test), images.test)
    return {
        "ranks": ranks,
        "parallel": args.parallel,
        "steps": args.steps,
        "test_cross_entropy": float(test),
        "alpha": float(optimizer.tempering_state()["alpha"]),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the denoising autoencoder on several processes; start it with torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp", help="shards or replicas")
    parser.add_argument("--data", choices=("mnist", "fashion-mnist"), default="mnist")
    parser.add_argument("--data-dir", type=Path, default=autoencoder_data.FASHION_MNIST_DIR, metavar="DIR")
    parser.add_argument("--corruption", type=float, default=0.25, help="share of pixels zeroed")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=100, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--temperature", type=float, default=0.03)
    parser.add_argument(
        "--explore", type=float, default=0.6, help="share of the steps before the noise goes off"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/distributed_autoencoder"), metavar="DIR")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, for example: torchrun --nproc-per-node 2 " + sys.argv[0])
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and restarts > 0:
        parser.error("with --max-restarts, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun starts")
    if args.steps < 1 or args.batch_size < 1 or args.checkpoint_every < 1 or not 0 <= args.explore <= 1:
        parser.error("--steps, --batch-size and --checkpoint-every must be positive, --explore within [0, 1]")
    ranks = int(os.environ["WORLD_SIZE"])
    if args.batch_size % ranks:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of the {ranks} ranks")
    return args


def main() -> int:
    args = parse_arguments()
    # a thread per rank: ranks share the machine's cores
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    # torch warns about its own internals when checkpoints meet gloo
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        images = autoencoder_data.load(args.data, args.data_dir, args.corruption, device)
        result = train(args, images, device)
        if dist.get_rank() == 0:
            (args.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
            print(f"test cross-entropy {result['test_cross_entropy']:.2f} nats per image")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
