"""An engine directory as a torch module, for libraries that want one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cldf_fast.deploy.predictor import Predictor


class EngineNetwork(nn.Module):
    """What a predictor's `segment` gives; its graphs run where the predictor runs them, whatever the module's device.

    predictor: loaded at the first call.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities float32 [B, K + 1, S, S], background first, of images float32 [B, C, S, S] in [-1, 1].

        Those of classes that are absent by the predicted image-level label are 0, so that argmax gives the mask. On the
        images' device; no gradient. Raises DataError as `Predictor.segment` does.
        """
        found = self.predictor.segment(images.detach().cpu().numpy())
        allowed = np.pad(found.present, ((0, 0), (1, 0)), constant_values=True)[:, :, None, None]
        return torch.from_numpy(np.where(allowed, found.probability, np.float32(0))).to(images.device)
