"""Noise schedules, the forward process and DDIM against values and formulas in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cldf_fast.diffusion import Diffusion, alpha_bars
from cldf_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("schedule", "timesteps", "known"),
    [
        ("linear", 1000, {50: 0.970, 150: 0.786, 250: 0.521, 400: 0.194, 500: 0.078}),
        ("linear", 4000, {200: 0.970, 400: 0.896, 500: 0.845, 600: 0.787, 1000: 0.523}),
        ("cosine", 1000, {50: 0.992, 150: 0.940, 250: 0.846}),
        ("cosine", 4000, {400: 0.972, 500: 0.958}),
    ],
)
def test_schedules_have_their_published_values(schedule: str, timesteps: int, known: dict[int, float]) -> None:
    level = alpha_bars(timesteps, schedule)
    assert level.dtype == torch.float64
    assert level.shape == (timesteps,)
    assert (level.diff() < 0).all()
    assert 0.999 < level[0] < 1
    assert 0 < level[-1] < 1e-4
    for step, value in known.items():
        assert float(level[step]) == pytest.approx(value, abs=6e-4)


def test_a_short_linear_schedule_stays_a_schedule() -> None:
    level = alpha_bars(10, "linear")
    assert (level > 0).all()
    assert (level.diff() < 0).all()


def test_noising_and_its_inverse() -> None:
    diffusion = Diffusion()
    x, noise = torch.rand(6, 2, 3, 5) * 2 - 1, torch.randn(6, 2, 3, 5)
    steps = torch.tensor([0, 1, 50, 150, 500, 999])
    noised = diffusion.q_sample(x, steps, noise)
    for i, step in enumerate(steps.tolist()):
        level = float(alpha_bars(1000, "linear")[step])
        expected = math.sqrt(level) * x[i].double() + math.sqrt(1 - level) * noise[i].double()
        torch.testing.assert_close(noised[i].double(), expected, rtol=0, atol=1e-5)
    back = diffusion.predict_x0(noised, steps, noise)
    # At the last step less than 1% of the image is left: rounding is multiplied by that much.
    torch.testing.assert_close(back[:5], x[:5], rtol=0, atol=1e-5)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


def test_noising_keeps_the_dtype() -> None:
    diffusion, step = Diffusion(), torch.tensor([7])
    x = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    assert diffusion.q_sample(x, step, x).dtype == torch.bfloat16
    assert diffusion.predict_x0(x.double(), step, x.double()).dtype == torch.float64


def test_levels_by_fraction_and_by_alpha_bar_name_the_same_process() -> None:
    short, long = Diffusion(1000), Diffusion(4000)
    assert [short.step_of_fraction(f) for f in (0, 0.05, 0.4, 1)] == [0, 50, 400, 999]
    assert [long.step_of_fraction(f) for f in (0, 0.05, 0.4, 1)] == [0, 200, 1600, 3999]
    for step in (0, 50, 321, 999):
        assert short.step_of_alpha_bar(float(short.alpha_bar[step])) == step
    assert short.step_of_alpha_bar(1.0) == 0
    assert long.step_of_alpha_bar(float(short.alpha_bar[100])) == pytest.approx(400, abs=5)


def test_levels_are_counted_in_the_unit_of_the_process() -> None:
    signal = Diffusion().alpha_bar
    assert Diffusion().steps_of((0.0, 0.25)).tolist() == [0, 250]
    assert Diffusion(level_unit="alpha_bar").steps_of((1.0, float(signal[250]))).tolist() == [0, 250]
    with pytest.raises(ConfigError, match="level_unit: expected 'fraction' or 'alpha_bar', got 'snr'"):
        Diffusion(level_unit="snr")


def test_the_network_is_told_the_time_in_its_own_units() -> None:
    steps = torch.tensor([0, 400, 3999])
    assert Diffusion(4000).network_time(steps).tolist() == [0, 400, 3999]
    assert Diffusion(4000, rescale_timesteps=True).network_time(steps).tolist() == [0, 100, 999.75]


@pytest.mark.parametrize(("top", "moves"), [(500, 10), (9, 10), (3, 50), (0, 1)])
def test_a_ladder_climbs_from_clean_to_the_top(top: int, moves: int) -> None:
    ladder = Diffusion().ddim_ladder(top, moves)
    assert ladder[0] == -1
    assert ladder[-1] == top
    assert ladder == sorted(set(ladder))
    assert len(ladder) == min(moves, top + 1) + 1
    heights = [b - a for a, b in pairwise(ladder)]
    assert max(heights) - min(heights) <= 1


def test_ddim_with_known_noise_lands_on_the_forward_process_and_comes_back() -> None:
    diffusion = Diffusion()
    x, noise = torch.rand(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    ladder = diffusion.ddim_ladder(600, 7)
    encoded = diffusion.ddim(x, lambda _x, _t: noise, ladder)
    torch.testing.assert_close(encoded, diffusion.q_sample(x, torch.tensor([600, 600]), noise), rtol=0, atol=1e-6)
    torch.testing.assert_close(diffusion.ddim(encoded, lambda _x, _t: noise, ladder[::-1]), x, rtol=0, atol=1e-6)


def test_ddim_follows_the_flow_of_gaussian_data_and_returns() -> None:
    """For data N(mean, s^2) the best noise predictor is linear, and the flow maps x to a closed form."""
    diffusion, mean, deviation, top = Diffusion(rescale_timesteps=True), 0.3, 0.5, 400
    told: list[float] = []

    def predict(x: Tensor, time: Tensor) -> Tensor:
        told.append(float(time[0]))
        level = diffusion.alpha_bar.double()[time.long()].view(-1, 1, 1, 1)
        return (1 - level).sqrt() * (x - level.sqrt() * mean) / (level * deviation**2 + 1 - level)

    x = mean + deviation * torch.randn(3, 1, 4, 4).double()
    level = float(diffusion.alpha_bar[top])
    flow = math.sqrt(level) * mean + math.sqrt(level * deviation**2 + 1 - level) / deviation * (x - mean)
    errors = []
    for moves in (50, 400):
        ladder = diffusion.ddim_ladder(top, moves)
        told.clear()
        encoded = diffusion.ddim(x, predict, ladder)
        assert told == [max(step, 0) for step in ladder[:-1]]
        back = diffusion.ddim(encoded, predict, ladder[::-1])
        errors.append((float((encoded - flow).abs().max()), float((back - x).abs().max())))
    (coarse_flow, coarse_back), (fine_flow, fine_back) = errors
    assert fine_flow < 0.01 < coarse_flow
    assert fine_back < 0.01 < coarse_back


def test_values_out_of_range_are_named() -> None:
    diffusion = Diffusion()
    with pytest.raises(ConfigError, match="schedule: expected 'linear' or 'cosine', got 'sigmoid'"):
        Diffusion(schedule="sigmoid")
    for fraction in (-0.01, 1.01, math.nan):
        with pytest.raises(ConfigError, match=r"noise level: expected a fraction of T in \[0, 1\]"):
            diffusion.step_of_fraction(fraction)
    for level in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match=r"noise level: expected an alpha-bar in \(0, 1\]"):
            diffusion.step_of_alpha_bar(level)
