"""Trains a deep sigmoid denoising autoencoder on handwritten digits with CTLD.

    python examples/denoising_autoencoder.py                # explore, fine-tune, figure: about a minute
    python examples/denoising_autoencoder.py --compare      # against Langevin, SGD and Adam
    python examples/denoising_autoencoder.py --data fashion-mnist --temperature 0.5

This is the first experiment of Ye, Zhu and Mantiuk (NIPS 2017) at small scale: a network of many sigmoid
layers, hard to train because gradients shrink from layer to layer, learns to restore images of which some
pixels were zeroed. CTLD first samples its posterior with a temperature that is itself a dynamical
variable, then switches the noise off and descends.

Writes figure.png, results.json and checkpoint.pt to --out. Ctrl-C saves a checkpoint first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import autoencoder_data
import torch
from autoencoder_checkpoint import Checkpoint, CheckpointError, Interrupt
from autoencoder_data import PIXELS, DataError, Images, MiniBatches
from autoencoder_report import Curves, Sampler, draw, table
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from ctld_cuda import CTLD, Tempering, backend_info

Tensor = torch.Tensor

LAYERS = (PIXELS, 256, 128, 32, 128, 256, PIXELS)
EPOCHS = {"mnist": 150, "fashion-mnist": 20}
RECORD_EVERY = 10  # steps between two records of the temperature
INTERRUPTED = 128 + 2  # exit status after SIGINT
DIVERGED = 10 * PIXELS * math.log(2)  # ten times the cross-entropy of an all-grey image
SHOWN = 20  # test images in the figure


@dataclass(frozen=True)
class Method:
    """A way to train, with the settings that served it best on the MNIST digits."""

    label: str
    lr: float
    temperature: float | None = None  # None: no noise


METHODS = {
    "ctld": Method("CTLD", lr=0.03, temperature=0.03),
    "langevin": Method("Langevin", lr=0.045, temperature=0.1),
    "sgd": Method("SGD + momentum", lr=0.045),
    "adam": Method("Adam", lr=0.005),
}


class Failure(Exception):
    """Ends the program with a message instead of a traceback."""


def build_model(gain: float, seed: int, device: torch.device) -> nn.Sequential:
    """The autoencoder; it returns logits, whose sigmoids are the pixels of the restored image."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(LAYERS):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_normal_(linear.weight, gain=gain, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1]).to(device)


def cross_entropy(logits: Tensor, images: Tensor) -> Tensor:
    """Nats per image: the binary cross-entropy summed over pixels, averaged over images."""
    return binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def build_optimizer(
    method: str, parameters, args: argparse.Namespace, num_data: int, explore_steps: int
) -> torch.optim.Optimizer:
    """The optimizer of ``method``, with the options given or its own defaults."""
    lr = METHODS[method].lr if args.lr is None else args.lr
    if method == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
    if method == "adam":
        return torch.optim.Adam(
            parameters, lr=lr, betas=(args.momentum, 0.999), weight_decay=args.weight_decay
        )
    tempering = Tempering(max_temperature=args.max_temperature) if method == "ctld" else None
    try:
        return CTLD(
            parameters,
            lr=lr,
            momentum=args.momentum,
            num_data=num_data,
            temperature=METHODS[method].temperature if args.temperature is None else args.temperature,
            weight_decay=args.weight_decay,
            tempering=tempering,
            explore_steps=explore_steps,
            seed=args.seed,
            backend=args.backend,
        )
    except (ValueError, RuntimeError) as error:
        raise Failure(str(error)) from None


class Training:
    """The training of one method: model, optimizer, position in the data, and what was recorded."""

    def __init__(self, method: str, args: argparse.Namespace, images: Images) -> None:
        device = images.train.device
        # the same for all methods: initial weights, minibatches and corruptions
        self.model = build_model(args.init_gain, args.seed, device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.batches = MiniBatches(images.train, args.batch_size, self.generator)
        self.images = images
        self.method = method
        self.corruption = args.corruption
        self.steps = args.epochs * self.batches.per_epoch
        self.explore_steps = round(args.explore * args.epochs) * self.batches.per_epoch
        self.optimizer = build_optimizer(
            method, self.model.parameters(), args, len(images.train), self.explore_steps
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)
        self.step = 0
        self.seconds = 0.0
        records = -(-self.steps // RECORD_EVERY)
        self.trace = {
            "loss": torch.full((self.steps,), math.nan, device=device),
            "test": torch.full((args.epochs,), math.nan, device=device),
            "temperature": torch.full((records,), math.nan, dtype=torch.float64, device=device),
            "kinetic": torch.full((records,), math.nan, dtype=torch.float64, device=device),
        }

    def learning_rate_factor(self, step: int) -> float:
        """Constant while CTLD explores, then half a cosine to 0: the same for every method."""
        progress = (step - self.explore_steps) / max(1, self.steps - self.explore_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))

    @property
    def samples(self) -> bool:
        return isinstance(self.optimizer, CTLD)

    @property
    def done(self) -> bool:
        return self.step == self.steps

    def advance(self) -> None:
        """One optimizer step, and the test at the end of an epoch."""
        clean = self.batches.draw()
        corrupted = autoencoder_data.corrupt(clean, self.corruption, self.generator)
        loss = cross_entropy(self.model(corrupted), clean)
        self.optimizer.zero_grad()
        loss.backward()
        # the minibatch loss is the energy that CTLD's temperature answers to
        self.optimizer.step(loss=loss.detach()) if self.samples else self.optimizer.step()
        self.scheduler.step()
        self.record(loss.detach())
        self.step += 1
        if self.step % self.batches.per_epoch == 0:
            self.trace["test"][self.epoch - 1] = self.test()

    @property
    def epoch(self) -> int:
        """The number of complete epochs."""
        return self.step // self.batches.per_epoch

    def record(self, loss: Tensor) -> None:
        self.trace["loss"][self.step] = loss
        if self.samples and self.step % RECORD_EVERY == 0 and self.optimizer.phase == "explore":
            state = self.optimizer.tempering_state()
            self.trace["temperature"][self.step // RECORD_EVERY] = state["temperature"]
            self.trace["kinetic"][self.step // RECORD_EVERY] = state["kinetic_temperature"]

    @torch.no_grad()
    def test(self) -> Tensor:
        return cross_entropy(self.model(self.images.corrupted_test), self.images.test)

    @torch.no_grad()
    def reconstruct(self, count: int) -> Tensor:
        """The first ``count`` corrupted test images, restored."""
        return self.model(self.images.corrupted_test[:count]).sigmoid()

    @property
    def label(self) -> str:
        return METHODS[self.method].label

    def epoch_losses(self) -> Tensor:
        """The mean training loss of every epoch; NaN from the first incomplete one on."""
        return self.trace["loss"].view(-1, self.batches.per_epoch).mean(dim=1)

    def progress(self) -> str:
        """Where the last complete epoch ended.

        Raises:
            Failure: if the loss is not finite, or far above that of an all-grey image.
        """
        loss, test = float(self.epoch_losses()[self.epoch - 1]), float(self.trace["test"][self.epoch - 1])
        if not loss < DIVERGED:
            advice = "--lr or --temperature" if self.samples else "--lr"
            raise Failure(
                f"{self.label} diverged to {loss:.3g} in epoch {self.epoch}: try a smaller {advice}"
            )
        exploring = self.step <= self.explore_steps
        text = f"{'explore' if exploring else 'fine-tune'}, loss {loss:.1f}, test {test:.1f}"
        if self.samples and exploring:
            text += f", T {float(self.optimizer.tempering_state()['temperature']):.3f}"
        return text

    def result(self) -> dict:
        """The row of the final table."""
        return {
            "method": self.method,
            "label": self.label,
            "lr": self.scheduler.base_lrs[0],
            "temperature": self.optimizer.temperature if self.samples else None,
            "train_loss": float(self.epoch_losses()[-1]),
            "test_cross_entropy": float(self.trace["test"][-1]),
            "kinetic_over_target": self.kinetic_over_target(),
            "seconds": round(self.seconds, 1),
        }

    def kinetic_over_target(self) -> float | None:
        """Measured over set temperature: above 1 by the heat of the minibatch noise.

        The mean over the second half of the exploration, when the start is forgotten.
        """
        ratios = self.trace["kinetic"] / self.trace["temperature"]
        ratios = ratios[ratios.isfinite()]
        return float(ratios[len(ratios) // 2 :].mean()) if len(ratios) else None

    def curves(self) -> Curves:
        """What the figure shows of this training."""
        return Curves(
            label=self.label,
            train=self.epoch_losses().tolist(),
            test=self.trace["test"].tolist(),
            explore_epochs=self.explore_steps / self.batches.per_epoch,
            restored=self.reconstruct(SHOWN).cpu().numpy(),
            sampler=self.sampler() if self.samples and self.explore_steps else None,
        )

    def sampler(self) -> Sampler:
        """The history of the temperature."""
        state, tempering = self.optimizer.tempering_state(), self.optimizer.tempering
        return Sampler(
            epochs=[step / self.batches.per_epoch for step in range(0, self.steps, RECORD_EVERY)],
            temperature=self.trace["temperature"].tolist(),
            kinetic=self.trace["kinetic"].tolist(),
            bin_centers=state["bin_centers"].tolist(),
            visits=state["visits"].tolist(),
            window=tempering.flat if tempering else 0.0,
        )

    def state_dict(self) -> dict:
        """Everything that the rest of the training depends on."""
        return {name: part.state_dict() for name, part in self._parts().items()} | {
            "trace": self.trace,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for name, values in self.trace.items():
            values.copy_(state["trace"][name])
        self.step, self.seconds = state["step"], state["seconds"]

    def _parts(self) -> dict:
        return {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "batches")}


def train(training: Training, checkpoint: Checkpoint, every: int, interrupt: Interrupt) -> None:
    """Trains to the end, or until Ctrl-C; saves a checkpoint each ``every`` epochs and when stopping."""
    started = time.perf_counter() - training.seconds
    with tqdm(total=training.steps, initial=training.step, desc=training.label, unit="step") as bar:
        while not (training.done or interrupt.requested):
            training.advance()
            bar.update()
            if training.step % training.batches.per_epoch == 0:
                bar.set_postfix_str(training.progress())
                training.seconds = time.perf_counter() - started
                if training.epoch % every == 0 and not training.done:
                    checkpoint.save()
    training.seconds = time.perf_counter() - started
    checkpoint.save()


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False):
    """An argparse type: a finite number in [low, high], or in (low, high] if ``above``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {low:g}"
                + (f" and at most {high:g}" if math.isfinite(high) else "")
            )
        return value

    parse.__name__ = {int: "integer", float: "number"}[kind]  # for argparse's "invalid number value"
    return parse


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a deep sigmoid denoising autoencoder with CTLD: explore, then fine-tune.",
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    own = ", ".join(f"{m.lr:g} for {name}" for name, m in METHODS.items())
    noisy = ", ".join(f"{m.temperature:g} for {name}" for name, m in METHODS.items() if m.temperature)
    some = "default: %(default)s"

    what = parser.add_argument_group("what to train")
    one = what.add_mutually_exclusive_group()
    one.add_argument("--method", choices=METHODS, default="ctld", help=some)
    one.add_argument("--compare", action="store_true", help="train with every method and compare")
    what.add_argument("--data", choices=EPOCHS, default="mnist", help=f"mnist: 5,000 digits; {some}")
    what.add_argument(
        "--data-dir",
        type=Path,
        default=autoencoder_data.FASHION_MNIST_DIR,
        metavar="DIR",
        help=f"where the files of Fashion-MNIST are; {some}",
    )
    what.add_argument(
        "--corruption", type=number(float, 0, 1), default=0.25, help=f"share of pixels zeroed; {some}"
    )
    what.add_argument(
        "--init-gain",
        type=number(float, 0, above=True),
        default=1.0,
        help=f"gain of Glorot's initial weights; 4 suits sigmoids best; {some}",
    )
    what.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help=f"of everything random; {some}"
    )

    how = parser.add_argument_group("how to train")
    how.add_argument(
        "--epochs", type=number(int, 1, 100_000), help="default: 150 for mnist, 20 for fashion-mnist"
    )
    how.add_argument("--batch-size", type=number(int, 1), default=100, help=some)
    how.add_argument("--lr", type=number(float, 0, above=True), help=f"default: {own}")
    how.add_argument(
        "--momentum", type=number(float, 0, 0.9999), default=0.9, help=f"Adam's first beta; {some}"
    )
    how.add_argument("--weight-decay", type=number(float, 0), default=0.0, help=some)
    how.add_argument(
        "--temperature", type=number(float, 0, above=True), help=f"1 samples the posterior; default: {noisy}"
    )
    how.add_argument(
        "--max-temperature",
        type=number(float, 1, above=True),
        default=10.0,
        help=f"CTLD's highest temperature, in multiples of --temperature; {some}",
    )
    how.add_argument(
        "--explore",
        type=number(float, 0, 1),
        default=0.6,
        help=f"share of the epochs before the noise goes off and the learning rate decays; {some}",
    )

    machine = parser.add_argument_group("machine and files")
    machine.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help=some
    )
    machine.add_argument("--backend", choices=sorted(backend_info()), help="of CTLD; default: the fastest")
    # the matrices are small: more threads gain little, and on busy cores lose much by waiting for each other
    machine.add_argument("--threads", type=number(int, 1, 1024), default=1, help=some)
    machine.add_argument(
        "--out", type=Path, default=Path("runs/denoising_autoencoder"), metavar="DIR", help=some
    )
    machine.add_argument("--checkpoint-every", type=number(int, 1), default=10, metavar="EPOCHS", help=some)
    machine.add_argument(
        "--resume", type=Path, metavar="CHECKPOINT", help="continue a run; give its other options again"
    )
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser()
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = EPOCHS[args.data]
    if args.temperature is not None and not args.compare and METHODS[args.method].temperature is None:
        parser.error(f"argument --temperature: {args.method} has no noise")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no usable CUDA device")
    return args


def settings_of(args: argparse.Namespace) -> dict:
    """The options that determine the results, up to rounding."""
    elsewhere = {"device", "backend", "threads", "out", "checkpoint_every", "resume"}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in elsewhere
    }


def resume_command(checkpoint: Path) -> str:
    """The command line that continues this run."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--resume":
            next(words)
        elif not word.startswith("--resume="):
            kept.append(word)
    return shlex.join(["python", sys.argv[0], *kept, "--resume", str(checkpoint)])


def report(trainings: list[Training], args: argparse.Namespace, images: Images) -> None:
    """Prints the table; writes results.json and figure.png."""
    results = [training.result() for training in trainings]
    print(table(results))
    content = {
        "settings": settings_of(args),
        "threads": args.threads,
        "torch": torch.__version__,
        "results": results,
    }
    (args.out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    clean, corrupted = (x[:SHOWN].cpu().numpy() for x in (images.test, images.corrupted_test))
    draw(args.out / "figure.png", [training.curves() for training in trainings], clean, corrupted)
    print(f"Wrote {args.out / 'figure.png'} and {args.out / 'results.json'}.")


def run(args: argparse.Namespace) -> int:
    """Trains what ``args`` ask for; returns the exit status."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images = autoencoder_data.load(args.data, args.data_dir, args.corruption, torch.device(args.device))
    if args.batch_size > len(images.train):
        raise Failure(f"--batch-size {args.batch_size} exceeds the {len(images.train)} training images")
    methods = METHODS if args.compare else [args.method]
    trainings = {method: Training(method, args, images) for method in methods}
    checkpoint = Checkpoint(args.out / "checkpoint.pt", settings_of(args), trainings)
    if args.resume:
        checkpoint.load(args.resume)
    with Interrupt() as interrupt:
        for training in trainings.values():
            train(training, checkpoint, args.checkpoint_every, interrupt)
            if interrupt.requested:
                print(f"Interrupted. To continue:\n  {resume_command(checkpoint.path)}", file=sys.stderr)
                return INTERRUPTED
    report(list(trainings.values()), args, images)
    return 0


def main() -> int:
    args = parse_arguments()
    try:
        return run(args)
    except (Failure, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
