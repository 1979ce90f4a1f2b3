"""The training loop: each step against a loop written out, resuming after a stop at any moment, damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cldf_fast.config import OptimisationConfig
from cldf_fast.errors import CheckpointError, ConfigError, TrainingError
from cldf_fast.training import engine
from cldf_fast.training.engine import StepDraws, derived_seed, fit, learning_rate_factor, step_draws

STEPS = OptimisationConfig(
    steps=11,
    batch_size=4,
    learning_rate=0.05,
    weight_decay=0.1,
    warmup_steps=3,
    ema_decay=0.9,
    save_every=4,
    log_every=2,
)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def network() -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))


def loss(module: nn.Module, draws: StepDraws) -> Tensor:
    x = torch.randn(draws.batch_size, 3, generator=draws.generator)
    x = draws.mine(x)
    return 30 * (module(x) - x.sum(dim=1, keepdim=True)).square().mean()  # steep enough to be clipped


def train(fabric: Fabric, run: Path, *, function: Callable[..., Tensor] = loss, **options: Any) -> nn.Module:
    arguments: dict[str, Any] = {"seed": 5, "resume": False, "quiet": True, **options}
    return fit("cdm", network(), function, arguments.pop("config", STEPS), fabric=fabric, run=run, **arguments)


def stopping_at(step: int) -> Callable[..., Tensor]:
    """The loss, until it is asked for a step: then someone presses Ctrl-C."""
    calls = iter(range(step))

    def stopped(module: nn.Module, draws: StepDraws) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(module, draws)

    return stopped


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (key, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert value.equal(other), key


def rows(run: Path, network: str = "cdm") -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["network"] == network]


def test_the_learning_rate_warms_up_and_falls_to_two_percent() -> None:
    config = OptimisationConfig(steps=200, warmup_steps=10)
    factors = [learning_rate_factor(step, config) for step in range(201)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1, abs=0.01)
    assert factors[100] == pytest.approx(0.51)
    assert factors[200] == pytest.approx(0.02)
    assert all(later <= earlier for earlier, later in pairwise(factors[9:]))
    assert learning_rate_factor(0, OptimisationConfig(warmup_steps=0)) == 1


def test_a_training_equals_the_loop_written_out(fabric: Fabric, tmp_path: Path) -> None:
    trained = train(fabric, tmp_path)
    module = network().train()
    average = {key: value.clone() for key, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.99))
    losses, clipped = [], 0
    for step in range(11):
        optimizer.param_groups[0]["lr"] = 0.05 * learning_rate_factor(step, STEPS)
        torch.manual_seed(derived_seed(5, step))
        value = loss(module, step_draws(5, "cdm", step, 4, fabric))
        optimizer.zero_grad()
        value.backward()
        clipped += int(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0) > 1)
        optimizer.step()
        share = min(0.9, (1 + step) / (10 + step))
        for key, now in module.state_dict().items():
            average[key] = share * average[key] + (1 - share) * now if now.is_floating_point() else now.clone()
        losses.append(float(value.detach()))
    assert clipped > 5
    assert not trained.training
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-6, msg=key)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [2, 4, 6, 8, 10, 11]
    for row in logged:
        assert row["loss"] == pytest.approx(losses[row["step"] - 1], rel=1e-4)
        assert row["learning_rate"] == pytest.approx(0.05 * learning_rate_factor(row["step"] - 1, STEPS))


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 8, 10])
def test_resuming_ends_at_the_weights_of_an_undisturbed_run(fabric: Fabric, tmp_path: Path, stop: int) -> None:
    undisturbed = train(fabric, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(fabric, tmp_path / "cut", function=stopping_at(stop))
    resumed = train(fabric, tmp_path / "cut", resume=True)
    assert_same_weights(undisturbed, resumed)
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert [(row["step"], row["loss"]) for row in cut] == [(row["step"], row["loss"]) for row in whole]


def test_being_stopped_twice_changes_nothing(fabric: Fabric, tmp_path: Path) -> None:
    undisturbed = train(fabric, tmp_path / "whole")
    for stop in (6, 3):
        with pytest.raises(KeyboardInterrupt):
            train(fabric, tmp_path / "cut", function=stopping_at(stop), resume=True)
    assert_same_weights(undisturbed, train(fabric, tmp_path / "cut", resume=True))


def test_a_stop_while_a_checkpoint_is_written_leaves_the_one_before(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(fabric, tmp_path / "whole")
    real, written = torch.save, []

    def dying(state: Any, path: Path) -> None:
        real(state, path)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.torch, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(fabric, tmp_path / "cut")
    monkeypatch.undo()
    assert torch.load(tmp_path / "cut" / "cdm.checkpoint", weights_only=True)["step"] == 4
    assert [path.name for path in (tmp_path / "cut").iterdir() if path.name.startswith(".")] == []
    assert_same_weights(undisturbed, train(fabric, tmp_path / "cut", resume=True))


def test_a_finished_training_is_not_repeated(fabric: Fabric, tmp_path: Path) -> None:
    trained = train(fabric, tmp_path)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    assert_same_weights(trained, train(fabric, tmp_path, function=stopping_at(0), resume=True))
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_without_resume_a_training_starts_again(fabric: Fabric, tmp_path: Path) -> None:
    trained = train(fabric, tmp_path)
    (tmp_path / "cdm.checkpoint").write_bytes(b"damaged, but not asked for")
    assert_same_weights(trained, train(fabric, tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 10, 11]


def test_rows_of_other_networks_stay_and_a_torn_row_goes(fabric: Fabric, tmp_path: Path) -> None:
    other = {"network": "classifier", "step": 9, "loss": 0.5, "learning_rate": 0.1, "seconds": 1.0}
    with pytest.raises(KeyboardInterrupt):
        train(fabric, tmp_path, function=stopping_at(7))
    log = tmp_path / "metrics.jsonl"
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]
    log.write_text(json.dumps(other) + "\n" + log.read_text() + '{"network": "cdm", "st', encoding="utf-8")
    train(fabric, tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 10, 11]
    assert rows(tmp_path, "classifier") == [other]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_bytes(b"no checkpoint at all" * 20)


def replaced_by_a_list(path: Path) -> None:
    torch.save([1, 2], path)


def replaced_by_a_part(path: Path) -> None:
    torch.save({"module": network().state_dict()}, path)


def replaced_by_a_whole_module(path: Path) -> None:
    torch.save(network(), path)


def replaced_by_another_network(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({**state, "module": nn.Linear(2, 2).state_dict()}, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        emptied,
        overwritten,
        replaced_by_a_list,
        replaced_by_a_part,
        replaced_by_a_whole_module,
        replaced_by_another_network,
    ],
)
def test_a_damaged_checkpoint_is_named(fabric: Fabric, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(fabric, tmp_path, function=stopping_at(5))
    damage(tmp_path / "cdm.checkpoint")
    with pytest.raises(CheckpointError, match=r"cdm\.checkpoint: can't be resumed from \(.+\); delete it") as caught:
        train(fabric, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed 5, which is 6"),
        ({"config": STEPS.model_copy(update={"steps": 20})}, "cdm.optimisation.steps 11, which is 20"),
        ({"config": STEPS.model_copy(update={"batch_size": 8})}, "cdm.optimisation.batch_size 4, which is 8"),
        ({"settings": {"cdm.null_probability": 0.2}}, "cdm.null_probability 0.1, which is 0.2"),
    ],
)
def test_another_training_s_checkpoint_is_not_taken_up(
    fabric: Fabric, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    settings = {"settings": {"cdm.null_probability": 0.1}}
    with pytest.raises(KeyboardInterrupt):
        train(fabric, tmp_path, function=stopping_at(5), **settings)
    with pytest.raises(CheckpointError, match=rf"cdm\.checkpoint: was begun with {named} now; set it back, or train"):
        train(fabric, tmp_path, resume=True, **(settings | change))
    often = STEPS.model_copy(update={"save_every": 1, "log_every": 5})
    train(fabric, tmp_path, resume=True, config=often, **settings)


def test_a_training_that_diverges_is_stopped_and_keeps_the_checkpoint_of_before(fabric: Fabric, tmp_path: Path) -> None:
    calls = iter(range(99))

    def diverging(module: nn.Module, draws: StepDraws) -> Tensor:
        return loss(module, draws) * (torch.inf if next(calls) == 6 else 1)

    with pytest.raises(TrainingError, match="cdm: the weights are not finite after step 8, the training diverged"):
        train(fabric, tmp_path, function=diverging)
    state = torch.load(tmp_path / "cdm.checkpoint", weights_only=True)
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["module"].values())
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("seed", [0, 2**40, 2**63 - 1, 20_251_122_093_000])
def test_any_seed_serves_and_each_gives_its_own_draws(fabric: Fabric, seed: int) -> None:
    def drawn(*place: Any) -> Tensor:
        draws = step_draws(*place, 4, fabric)
        return torch.rand(8, generator=draws.generator)

    base = drawn(seed, "cdm", 3)
    assert base.equal(drawn(seed, "cdm", 3))
    for place in ((seed, "cdm", 4), (seed, "classifier", 3), (max(seed - 1, 1), "cdm", 3)):
        assert not base.equal(drawn(*place))


def test_processes_divide_the_joint_batch_among_them() -> None:
    joint = torch.arange(12).view(12, 1)
    parts = [StepDraws(torch.Generator(), 12, rank, 3).mine(joint) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert torch.cat(parts).sort(dim=0).values.equal(joint)


def test_a_batch_that_the_processes_cannot_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        train(SimpleNamespace(world_size=3), tmp_path)  # type: ignore[arg-type]
