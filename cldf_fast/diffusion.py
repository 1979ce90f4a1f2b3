"""The forward diffusion process (Ho et al. 2020, Nichol & Dhariwal 2021) and DDIM (Song et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cldf_fast.errors import ConfigError

_BETA_MAX = 0.999

NoisePredictor = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], network timesteps [B]) -> predicted noise [B, C, H, W]."""


def alpha_bars(timesteps: int, schedule: str) -> Tensor:
    """Cumulative signal share alpha-bar_t for t = 0 .. timesteps - 1, float64 [T], falling from near 1 to near 0."""
    if schedule == "linear":
        # The published end points belong to 1000 steps; other lengths keep the same process in more or fewer steps.
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, min(scale * 0.02, _BETA_MAX), timesteps, dtype=torch.float64)
    elif schedule == "cosine":
        share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        signal = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=_BETA_MAX)
    else:
        raise ConfigError(f"schedule: expected 'linear' or 'cosine', got {schedule!r}")
    return torch.cumprod(1 - betas, dim=0)


class Diffusion:
    """A noise schedule and the network's way of being told the time.

    timesteps: T. schedule: "linear" or "cosine". rescale_timesteps: networks read t * 1000 / T instead of t.
    level_unit: what noise levels are counted in, "fraction" (of T) or "alpha_bar". alpha_bar: float32 [T].
    input_scale: b, where the schedule's noise is added to b * x (Chen 2023) and alpha_bar is to be that of x: its
        process, divided by what makes x and the noise weigh 1 together.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        schedule: str = "linear",
        rescale_timesteps: bool = False,
        level_unit: str = "fraction",
        input_scale: float = 1.0,
    ) -> None:
        if level_unit not in ("fraction", "alpha_bar"):
            raise ConfigError(f"level_unit: expected 'fraction' or 'alpha_bar', got {level_unit!r}")
        self.level_unit = level_unit
        self.timesteps = timesteps
        share = alpha_bars(timesteps, schedule)
        signal = input_scale**2 * share
        self.alpha_bar = (signal / (signal + 1 - share)).float()
        self.rescale_timesteps = rescale_timesteps
        self._alpha_bar_on = {self.alpha_bar.device: self.alpha_bar}  # copies: to make one synchronises with the host

    def step_of_fraction(self, fraction: float) -> int:
        """The step t nearest to a noise level given as a fraction of T, in [0, 1]; 1 is the last step."""
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"noise level: expected a fraction of T in [0, 1], got {fraction}")
        return min(round(fraction * self.timesteps), self.timesteps - 1)

    def step_of_alpha_bar(self, alpha_bar: float) -> int:
        """The step t whose alpha-bar is nearest to the one given, in (0, 1]."""
        if not 0.0 < alpha_bar <= 1.0:
            raise ConfigError(f"noise level: expected an alpha-bar in (0, 1], got {alpha_bar}")
        return int((self.alpha_bar - alpha_bar).abs().argmin())

    def steps_of(self, levels: Sequence[float]) -> Tensor:
        """The steps t of noise levels in this process's unit: int64 [L]."""
        step_of = self.step_of_fraction if self.level_unit == "fraction" else self.step_of_alpha_bar
        return torch.tensor([step_of(level) for level in levels])

    def network_time(self, steps: Tensor) -> Tensor:
        """What a network is fed for integer steps [B]: float32 [B]."""
        return steps.float() * (1000.0 / self.timesteps) if self.rescale_timesteps else steps.float()

    def _level(self, steps: Tensor) -> Tensor:
        if steps.device not in self._alpha_bar_on:
            self._alpha_bar_on[steps.device] = self.alpha_bar.to(steps.device)
        return self._alpha_bar_on[steps.device][steps].view(-1, 1, 1, 1)

    def q_sample(self, x: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(ab_t) x + sqrt(1 - ab_t) noise. x, noise: [B, C, H, W]; steps: int64 [B]."""
        level = self._level(steps).to(x.dtype)
        return level.sqrt() * x + (1 - level).sqrt() * noise

    def predict_x0(self, x_t: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """The clean image that x_t and a predicted noise imply. Shapes as in q_sample."""
        level = self._level(steps).to(x_t.dtype)
        return (x_t - (1 - level).sqrt() * noise) / level.sqrt()

    def ddim_move(self, x_t: Tensor, noise: Tensor, step: int, to_step: int) -> Tensor:
        """One deterministic DDIM move from `step` to `to_step`, up or down; -1 stands for the clean image."""
        level, target = self._signal(step), self._signal(to_step)
        x0 = (x_t - (1 - level).sqrt() * noise) / level.sqrt()
        return target.sqrt() * x0 + (1 - target).sqrt() * noise

    def _signal(self, step: int) -> Tensor:
        return self.alpha_bar[step] if step >= 0 else torch.ones(())

    def ddim_ladder(self, top: int, moves: int) -> list[int]:
        """Steps from -1 (clean) up to `top` in `moves` near-equal moves."""
        return sorted({round(-1 + (top + 1) * i / moves) for i in range(moves + 1)})

    def ddim(self, x: Tensor, predict: NoisePredictor, ladder: Sequence[int]) -> Tensor:
        """Follow a ladder of steps from its first to its last entry, upwards (encoding) or downwards (sampling).

        x: [B, C, H, W] at ladder[0]. predict is asked at each entry but the last. A step of -1 (clean) is told to the
        network as step 0, which is the nearest that it knows.
        """
        for step, to_step in pairwise(ladder):
            steps = torch.full((x.shape[0],), max(step, 0), device=x.device)
            noise = predict(x, self.network_time(steps))
            x = self.ddim_move(x, noise, step, to_step)
        return x
