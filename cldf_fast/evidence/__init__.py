"""From a classifier to pixel labels: gradient maps, class activation maps, and their agreement."""

from cldf_fast.evidence.fusion import PixelLabels, pixel_labels
from cldf_fast.evidence.gradients import ClassifierSaliency, Evidence

__all__ = ["ClassifierSaliency", "Evidence", "PixelLabels", "pixel_labels"]
