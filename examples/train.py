"""Train any model of fastvit_kernels, fused or stock, on handwritten digits or on a folder of images.

    python examples/train.py --model cvt_13 --output runs/digits
    python examples/train.py --model pvt_v2_b0 --data photos --amp bf16 --output runs/photos
    torchrun --nproc-per-node 2 examples/train.py --output runs/two

The same arguments with --resume go on where a run was interrupted, to the same losses.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from image_data import Data, DataError, Remaining, augmented, digits, image_folder
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_folder import COLUMNS, RunFolder
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, Subset

from fastvit_kernels.models import create_model

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Options that an interrupted run may come back with changed.
FREE = {"resume", "overwrite", "output", "workers", "threads", "save_every", "stop_after"}


class UsageError(Exception):
    """Something the user can put right; told in one line."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description="Train a model of fastvit_kernels.")
    add = partial(options.add_argument, help="default: %(default)s")
    flag = partial(options.add_argument, action="store_true")
    add("--model", default="cvt_13")
    options.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="arguments of the model"
    )
    flag("--stock", help="the operators in plain PyTorch instead of fused")
    add("--data", default="digits", help="'digits', or a folder with one subfolder per class; default: %(default)s")
    add("--held-out", type=float, default=0.2, metavar="SHARE", help="of an image folder; default: %(default)s")
    add("--size", type=int, help="of the images; default: 32 for digits, else 224")
    add("--output", type=Path, required=True, metavar="DIR", help="for checkpoint, log, plot and weights")
    add("--epochs", type=int, default=40)
    add("--batch", type=int, default=64, help="images of one process at a time; default: %(default)s")
    add("--accumulate", type=int, default=1, help="batches in one step; default: %(default)s")
    add("--rate", type=float, default=1e-3, help="highest learning rate; default: %(default)s")
    add("--warmup", type=int, default=3, help="epochs; default: %(default)s")
    add("--weight-decay", type=float, default=0.05)
    add("--smoothing", type=float, default=0.1, help="of the labels; default: %(default)s")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, 0 for any; default: %(default)s")
    add("--augment", type=float, default=1.0, help="strength, 0 for none; default: %(default)s")
    flag("--flip", help="mirror half of the images")
    add(
        "--ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="average of the weights, evaluated and exported; 0: none",
    )
    add("--amp", choices=sorted(AMP), help="autocast; default: fp32")
    flag("--compile", help="torch.compile(fullgraph=True)")
    flag("--checkpoint-activations", help="keep only the inputs of the blocks, compute the rest again")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0, help="processes that read images; default: %(default)s")
    add("--threads", type=int, help="default: torch's choice")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=0, metavar="STEPS", help="besides the end of every epoch; 0: not")
    add("--stop-after", type=int, metavar="STEPS", help="save and leave, to be resumed")
    begin = options.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    begin.add_argument("--overwrite", action="store_true", help="start anew over a run in the output folder")
    return options


def check(options: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot be trained with."""
    for name in ("epochs", "batch", "accumulate"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    for name, low, high in (("held_out", 0, 1), ("smoothing", 0, 1), ("ema", 0, 1), ("rate", 0, math.inf)):
        value = getattr(options, name)
        if not low <= value < high:
            raise UsageError(f"--{name.replace('_', '-')}: expected from {low} to below {high}, got {value:g}")
    if options.amp == "fp16" and torch.device(options.device).type != "cuda":
        raise UsageError("--amp fp16: only on CUDA, where gradients are scaled; use bf16")


def overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`["depths=(1,2)", "activation=gelu"]` as arguments."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.isidentifier()):
            raise UsageError(f"--override {text}: expected KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found


def rate_at(step: int, options: argparse.Namespace, steps_per_epoch: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warm, total = options.warmup * steps_per_epoch, options.epochs * steps_per_epoch
    if step < warm:
        return options.rate * (step + 1) / warm
    return options.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters; none for biases, norms, and what the model names."""
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[float, list[nn.Parameter]] = {decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        groups[0.0 if parameter.ndim < 2 or name in spared else decay].append(parameter)
    return [{"params": params, "weight_decay": value} for value, params in groups.items()]


def checkpoint_blocks(model: nn.Module) -> None:
    """Let every block compute its activations again in the backward instead of keeping them."""
    for module in model.modules():
        if type(module).__name__ == "Block":
            contexts = partial(_contexts, [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)])
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)


def _contexts(norms: list[nn.BatchNorm2d]) -> tuple[Any, Any]:
    return nullcontext(), _same_statistics(norms)


@contextmanager
def _same_statistics(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Computing again must not count the same batch again in the running statistics."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of parameters and statistics; the first steps weigh less than `decay` says."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def widened(logits: Tensor) -> Tensor:
    """Logits in fp32 or better, whatever autocast made them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Trainer:
    """One training run in one process of perhaps several."""

    def __init__(self, options: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
        self.options, self.device, self.rank, self.world = options, device, rank, world
        size = options.size or (32 if options.data == "digits" else 224)
        self.data: Data = (
            digits(size)
            if options.data == "digits"
            else image_folder(Path(options.data), size, options.held_out, options.seed)
        )
        arguments = {"in_chans": self.data.channels, **overrides(options.override)}
        self.about = {"model": options.model, "overrides": arguments, "size": size, "classes": self.data.classes}
        torch.manual_seed(options.seed)
        try:
            model = create_model(
                options.model,
                len(self.data.classes),
                backend="reference" if options.stock else None,
                **arguments,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"--model {options.model}: {error}") from error
        self.model = model.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval() if options.ema else self.model
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay), lr=options.rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        if options.checkpoint_activations:
            checkpoint_blocks(self.model)
        wrapped: nn.Module = self.model
        if world > 1:
            wrapped = DistributedDataParallel(wrapped, [device] if device.type == "cuda" else None)
        self.wrapped = torch.compile(wrapped, fullgraph=True) if options.compile else wrapped
        # Dropout differs between processes, and does not depend on how the model was initialised.
        torch.manual_seed(options.seed + 1 + rank)

        # With a generator of their own the loaders draw nothing from the one that dropout uses.
        load = partial(
            DataLoader,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
        self.sampler = DistributedSampler(self.data.train, world, rank, seed=options.seed)
        self.steps_per_epoch = len(self.sampler) // (options.batch * options.accumulate)
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--batch {options.batch} x --accumulate {options.accumulate}: more than the {len(self.sampler)} "
                "images of one process"
            )
        self.batches = Remaining(self.sampler, options.batch, self.steps_per_epoch * options.accumulate)
        self.train_loader = load(self.data.train, batch_sampler=self.batches)
        share = Subset(self.data.held_out, range(rank, len(self.data.held_out), world))
        self.test_loader = load(share, batch_size=options.batch)
        self.step, self.loss_sum = 0, 0.0
        self.rows: list[dict[str, Any]] = []

    def autocast(self) -> Any:
        """Mixed precision, where it is asked for."""
        dtype = AMP.get(self.options.amp)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def take(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def summed(self, *values: float) -> list[float]:
        """Values added over all processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def train_step(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """One step of the optimizer on the gradients of several batches; returns the mean loss."""
        options = self.options
        rate = rate_at(self.step, options, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Every step has its own random numbers for augmentation: an interrupted run meets the same ones.
        generator = torch.Generator().manual_seed((options.seed * 1_000_003 + self.step) * 1009 + self.rank)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            images, labels = self.take(*batch)
            images = augmented(images, options.augment, options.flip, generator)
            with ExitStack() as stack:
                if self.world > 1 and index < len(batches) - 1 and not options.compile:
                    stack.enter_context(self.wrapped.no_sync())
                with self.autocast():
                    logits = self.wrapped(images)
                loss = F.cross_entropy(widened(logits), labels, label_smoothing=options.smoothing) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if not math.isfinite(loss_value := total.item()):
            raise UsageError(
                f"step {self.step}: the loss is {loss_value}; a lower --rate or a stricter --clip may help"
            )
        if options.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if options.ema:
            update_average(self.average, self.model, options.ema, self.step)
        self.step += 1
        return loss_value

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy on the held-out images."""
        self.average.eval()
        if self.world > 1:
            # Each process has statistics of its own images; those of the first are kept.
            for buffer in self.average.buffers():
                dist.broadcast(buffer, 0)
        loss = right = seen = 0.0
        for batch in self.test_loader:
            images, labels = self.take(*batch)
            with self.autocast():
                logits = self.average(images)
            loss += F.cross_entropy(widened(logits), labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        loss, right, seen = self.summed(loss, right, seen)
        return loss / seen, right / seen

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; tensors and plain values only. Every process has to call it."""
        own = {"cpu": torch.get_rng_state(), "loss_sum": self.loss_sum}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        everyones: list[Any] = [own]
        if self.world > 1:
            everyones = [None] * self.world
            dist.all_gather_object(everyones, own)
        return {
            "options": settings(self.options, self.world),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.options.ema else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": everyones,
            "step": self.step,
            "rows": self.rows,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        now = settings(self.options, self.world)
        changed = [
            f"{key} {value!r} -> {now.get(key)!r}" for key, value in state["options"].items() if now.get(key) != value
        ]
        if changed:
            raise UsageError(f"--resume: the run was begun with other options: {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        if self.options.ema:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        own = state["processes"][self.rank]
        torch.set_rng_state(own["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.device)
        self.step, self.rows, self.loss_sum = state["step"], state["rows"], own["loss_sum"]

    def run(self, folder: RunFolder, progress: Progress) -> bool:
        """Train to the end, or to --stop-after; returns whether that was the end."""
        options, per_epoch = self.options, self.steps_per_epoch
        total = options.epochs * per_epoch
        task = progress.add_task("training", total=total, completed=self.step, loss=math.nan)

        def save() -> None:
            state = self.state()
            if self.rank == 0:
                folder.save(state)

        while self.step < total:
            epoch, self.batches.start = self.step // per_epoch, self.step % per_epoch * options.accumulate
            self.sampler.set_epoch(epoch)
            self.wrapped.train()
            start, group = time.perf_counter(), []
            for batch in self.train_loader:
                group.append(batch)
                if len(group) < options.accumulate:
                    continue
                loss = self.train_step(group)
                group = []
                self.loss_sum += loss
                progress.update(task, completed=self.step, loss=loss)
                if self.step % per_epoch == 0:
                    break
                if self.step == options.stop_after:
                    save()
                    return False
                if options.save_every and self.step % options.save_every == 0:
                    save()
            train_loss = self.summed(self.loss_sum)[0] / (per_epoch * self.world)
            held_out_loss, accuracy = self.evaluate()
            self.loss_sum = 0.0
            rate = self.optimizer.param_groups[0]["lr"]
            seconds = round(time.perf_counter() - start, 2)
            values = (epoch + 1, self.step, rate, train_loss, held_out_loss, accuracy, seconds)
            row = dict(zip(COLUMNS, values, strict=True))
            self.rows.append(row)
            if self.rank == 0:
                folder.write_log(self.rows)
                progress.console.print(
                    f"epoch {epoch + 1:>3}  train loss {train_loss:.4f}  held-out loss {held_out_loss:.4f}  "
                    f"accuracy {accuracy:.2%}  {seconds:.1f} s"
                )
            save()
            if self.step == options.stop_after:
                return False
        if self.rank == 0:
            folder.draw(self.rows)
            folder.export(self.average.state_dict(), {**self.about, "accuracy": self.rows[-1]["accuracy"]})
        return True


def settings(options: argparse.Namespace, world: int) -> dict[str, Any]:
    """What two runs must share to come to the same losses."""
    return {**{key: value for key, value in vars(options).items() if key not in FREE}, "processes": world}


@contextmanager
def processes(options: argparse.Namespace) -> Iterator[tuple[torch.device, int, int]]:
    """The device, rank and number of the processes that torchrun started, or of this one."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device}: this machine or build of torch has no CUDA device")
    if "WORLD_SIZE" not in os.environ:
        yield device, 0, 1
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Train as the options say.

    Raises:
        UsageError, DataError: something the user can put right.
    """
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    with processes(options) as (device, rank, world):
        folder = RunFolder(options.output)
        if options.resume and not folder.checkpoint.exists():
            raise UsageError(f"--resume: there is no checkpoint {folder.checkpoint}")
        if folder.checkpoint.exists() and not (options.resume or options.overwrite):
            raise UsageError(f"--output {folder.path}: holds a run already; --resume goes on, --overwrite starts anew")
        trainer = Trainer(options, device, rank, world)
        if options.resume:
            trainer.restore(folder.load())
        console = Console(highlight=False, markup=False, quiet=rank > 0)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        console.print(
            f"{options.model}, {'stock' if options.stock else 'fused'}, {parameters:,} parameters; "
            f"{len(trainer.data.train)} images to train on, {len(trainer.data.held_out)} held out"
        )
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            done = trainer.run(folder, progress)
        if done:
            console.print(f"Written: {folder.weights}, {folder.log}, {folder.plot}", soft_wrap=True)
        else:
            console.print(f"Stopped at step {trainer.step}; --resume goes on", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 for success, 2 for errors of the user's."""
    try:
        train(parser().parse_args(argv))
    except (UsageError, DataError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
