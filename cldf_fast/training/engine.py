"""The training loop that all three networks share.

Everything random in a step follows from (seed, step) alone: the batch, the noise, the augmentation. Each process draws
for the joint batch and keeps its rows. So a resumed run needs no state of a random generator, and a run of two
processes equals a run of one with the same joint batch; but for dropout, which each process draws for its own rows.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cldf_fast.config import OptimisationConfig, flat
from cldf_fast.errors import CheckpointError, ConfigError, TrainingError
from cldf_fast.files import atomic_write, atomic_write_text
from cldf_fast.training.progress import Progress

# Added to the seed so that networks of one run do not see the same draws; the order of networks is irrelevant.
_STREAMS = {"cdm": 1, "classifier": 2, "decoder": 3}
_FINAL_LEARNING_RATE = 0.02  # of the peak, reached by a half cosine
_OF_FILES_ALONE = {"save_every", "log_every"}


@dataclass(frozen=True)
class StepDraws:
    """The random source of one step. batch_size is joint; rank r of `world` keeps rows r, r + world, ..."""

    generator: torch.Generator
    batch_size: int
    rank: int
    world: int

    def mine(self, joint: Tensor) -> Tensor:
        """This process's rows of a tensor drawn for the joint batch."""
        return joint[self.rank :: self.world]


LossFunction = Callable[[nn.Module, StepDraws], Tensor]
"""(module, draws) -> loss of this process's rows, a scalar whose mean over processes is the joint loss."""


def derived_seed(seed: int, *path: int) -> int:
    """A seed for a place below `seed` (a stream, a step), in the range that torch's generators take."""
    for part in path:
        seed = seed * 1_000_003 + part
    return seed % 2**63


def step_draws(seed: int, stream: str, step: int, batch_size: int, fabric: Fabric) -> StepDraws:
    """The random source of a step (see the module's first lines)."""
    generator = torch.Generator(device=fabric.device)
    generator.manual_seed(derived_seed(seed, _STREAMS[stream], step))
    return StepDraws(generator, batch_size, fabric.global_rank, fabric.world_size)


def learning_rate_factor(step: int, config: OptimisationConfig) -> float:
    """Linear warm-up, then a half cosine down to 2% of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    share = step / max(1, config.steps)
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
    return warm * (_FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * cosine)


def fit(
    name: str,
    module: nn.Module,
    loss_function: LossFunction,
    config: OptimisationConfig,
    *,
    fabric: Fabric,
    run: Path,
    seed: int,
    resume: bool,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Train `module` in place and return it with the moving average of its weights, in evaluation mode.

    name: "cdm", "classifier" or "decoder"; names the files in `run`: `<name>.checkpoint` (training state),
    `metrics.jsonl` (a row each log_every steps: network, step, loss, lr, seconds). resume: go on from the checkpoint
    where there is one, to the same weights as if it had never stopped (bit for bit with as many threads, on a CPU).
    settings: whatever else decides what is learnt, by name, plain values.
    Raises CheckpointError for a checkpoint that is damaged or was begun with another seed, configuration or settings,
    and TrainingError where the weights are not finite; the checkpoint is of before then.
    """
    if config.batch_size % fabric.world_size:
        raise ConfigError(
            f"batch_size: expected a multiple of the {fabric.world_size} processes, got {config.batch_size}"
        )
    # Before the optimiser: its state, when it is restored, goes where the weights are.
    module.to(fabric.device)
    average = {key: value.detach().clone() for key, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    path = run / f"{name}.checkpoint"
    begun_with = {"seed": seed, **(settings or {})} | {
        f"{name}.optimisation.{key}": value for key, value in flat(config).items() if key not in _OF_FILES_ALONE
    }
    first = 0
    if resume and path.exists():
        first = _restore(path, module, optimizer, average, fabric, begun_with)
    if first < config.steps:
        trained, optimizer = fabric.setup(module, optimizer)
        average = {key: value.to(fabric.device) for key, value in average.items()}
        log = MetricsLog(run / "metrics.jsonl", name, first, enabled=fabric.is_global_zero)
        trained.train()
        with Progress(name, config.steps, first, quiet=quiet or not fabric.is_global_zero) as progress:
            try:
                for step in range(first, config.steps):
                    loss = _step(trained, optimizer, loss_function, config, fabric, seed, name, step, average, module)
                    done = step + 1
                    logs = done % config.log_every == 0 or done == config.steps
                    saves = done % config.save_every == 0 or done == config.steps
                    if logs or saves:
                        _check_finite(name, module, done)
                    if logs:
                        loss = cast(Tensor, fabric.all_reduce(loss, reduce_op="mean"))
                        log.write(done, loss, optimizer.param_groups[0]["lr"])
                        progress.update(done, float(loss))
                    if saves:
                        _save(path, module, optimizer, average, done, fabric, begun_with)
            except KeyboardInterrupt:
                # The step that was interrupted may have half changed the weights: what was saved last stands.
                progress.note(f"{name}: interrupted; --resume goes on from the last checkpoint, {path.name}")
                raise
    module.load_state_dict(average)
    return module.eval()


def _step(
    trained: Any,
    optimizer: Any,
    loss_function: LossFunction,
    config: OptimisationConfig,
    fabric: Fabric,
    seed: int,
    name: str,
    step: int,
    average: dict[str, Tensor],
    module: nn.Module,
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * learning_rate_factor(step, config)
    draws = step_draws(seed, name, step, config.batch_size, fabric)
    torch.manual_seed(derived_seed(seed, step))  # dropout draws from the global generator
    loss = loss_function(trained, draws)
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    fabric.clip_gradients(trained, optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
    optimizer.step()
    # Early on the average follows quickly, so that short trainings do not carry their random start along.
    decay = min(config.ema_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1 - decay)
            else:
                average[key].copy_(value)
    return loss.detach()


def _check_finite(name: str, module: nn.Module, step: int) -> None:
    if not all(bool(value.isfinite().all()) for value in module.parameters()):
        raise TrainingError(
            f"{name}: the weights are not finite after step {step}, the training diverged; lower "
            f"{name}.optimisation.learning_rate"
        )


def _save(
    path: Path,
    module: nn.Module,
    optimizer: Any,
    average: dict[str, Tensor],
    step: int,
    fabric: Fabric,
    begun_with: Mapping[str, Any],
) -> None:
    if fabric.is_global_zero:
        state = {
            "module": module.state_dict(),
            "average": average,
            "optimizer": optimizer.state_dict(),
            "precision": fabric.strategy.precision.state_dict(),  # of 16-mixed, how losses are scaled
            "step": step,
            "begun_with": dict(begun_with),
        }
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
    fabric.barrier()


def _restore(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    fabric: Fabric,
    begun_with: Mapping[str, Any],
) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Checkpoints of before this was recorded have neither.
        before, precision = state.get("begun_with", {}), state.get("precision", {})
        if (key := next((key for key in before if begun_with.get(key) != before[key]), None)) is not None:
            raise CheckpointError(
                f"{path}: was begun with {key} {before[key]}, which is {begun_with.get(key)} now; set it back, or "
                "train without --resume"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.update(state["average"])
        if precision:
            fabric.strategy.precision.load_state_dict(precision)
        return int(state["step"])
    except CheckpointError:
        raise
    # What torch.load raises depends on where a file is damaged; AttributeError and TypeError are another object's.
    except (
        OSError,
        LookupError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.PickleError,
        AttributeError,
        TypeError,
    ) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise CheckpointError(f"{path}: can't be resumed from ({reason}); delete it to start this network again") from e


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, without one that a kill has torn."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


class MetricsLog:
    """Rows of `metrics.jsonl`. Rows of this network after the first step are dropped: they will be written again."""

    def __init__(self, path: Path, network: str, first_step: int, *, enabled: bool = True) -> None:
        self.path, self.network, self.enabled = path, network, enabled
        self.start = time.perf_counter()
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
        if enabled and path.exists():
            kept = [row for row in read_metrics(path) if row["network"] != network or row["step"] <= first_step]
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, loss: Tensor, learning_rate: float) -> None:
        if not self.enabled:
            return
        row = {
            "network": self.network,
            "step": step,
            "loss": round(float(loss), 6),
            "learning_rate": learning_rate,
            "seconds": round(time.perf_counter() - self.start, 2),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
