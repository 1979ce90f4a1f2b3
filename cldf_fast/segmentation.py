"""From embeddings to masks: prototypes of every class, similarity to them, a calibrated decision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_KMEANS_ITERATIONS = 25


@dataclass(frozen=True)
class Prototypes:
    """Directions that stand for the classes in the embedding space.

    vectors: float32 [K + 1, P, D], unit length; class 0 is background. temperature: of the similarities.
    bias: float32 [K + 1], added to a class's score; decides how much evidence a class needs.
    """

    vectors: Tensor
    bias: Tensor
    temperature: float

    def scores(self, embeddings: Tensor) -> Tensor:
        """Log-scores [..., K + 1] of embeddings [..., D]: a soft maximum over the similarities to each prototype."""
        similarity = torch.einsum("...d,kpd->...kp", embeddings, self.vectors) / self.temperature
        return similarity.logsumexp(dim=-1) + self.bias

    def probability(self, embeddings: Tensor) -> Tensor:
        """Class probabilities [..., K + 1], summing to 1."""
        return self.scores(embeddings).softmax(dim=-1)


def fit_prototypes(
    embeddings: Tensor, labels: Tensor, *, num_classes: int, per_class: int, temperature: float, seed: int = 0
) -> Prototypes:
    """Spherical k-means of every class's embeddings.

    embeddings: [M, D], unit length. labels: [M], 0..num_classes - 1, below 0 ignored. num_classes counts background.
    A class with fewer embeddings than per_class repeats some; a class with none gets zero vectors and a bias of minus
    infinity, so that it is never chosen.
    """
    vectors = embeddings.new_zeros(num_classes, per_class, embeddings.shape[1])
    bias = embeddings.new_zeros(num_classes)
    for k in range(num_classes):
        members = embeddings[labels == k]
        if len(members):
            vectors[k] = spherical_kmeans(members, per_class, seed)
        else:
            bias[k] = -torch.inf
    return Prototypes(vectors, bias, temperature)


def spherical_kmeans(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster directions [M, D] -> unit centres [clusters, D] by cosine similarity, deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)
    # More centres than points: some are taken twice, and stay equal.
    centres = points[order[torch.arange(clusters) % len(points)].to(points.device)]
    for _ in range(_KMEANS_ITERATIONS):
        nearest = (points @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        # A centre that lost all its points stays where it was.
        occupied = torch.bincount(nearest, minlength=clusters).unsqueeze(1) > 0
        centres = torch.nn.functional.normalize(torch.where(occupied, sums, centres), dim=1)
    return centres


def calibrate(prototypes: Prototypes, embeddings: Tensor, labels: Tensor, weight: Tensor) -> Prototypes:
    """Choose each foreground class's bias so that it agrees best with the pixel labels: no mask is used.

    For class k the threshold on its margin over background that maximises the weighted F1 score on pixels labelled k or
    background; over the plateau of near-equal values (within 1%) the middle is taken.
    embeddings: [M, D]. labels: [M], below 0 ignored. weight: [M], pixels that each one stands for.
    """
    scores = prototypes.scores(embeddings)
    bias = prototypes.bias.clone()
    for k in range(1, len(bias)):
        chosen = (labels == k) | (labels == 0)
        truth = labels[chosen] == k
        if truth.all() or not truth.any():
            continue
        margin, order = (scores[chosen, k] - scores[chosen, 0]).sort(descending=True)
        mass = weight[chosen][order].double()
        hit = (mass * truth[order]).cumsum(0)
        f1 = 2 * hit / (mass.cumsum(0) + hit[-1])
        plateau = (f1 >= 0.99 * f1.max()).nonzero().flatten()
        # A threshold can fall to the margin of the pixel after the plateau before it lets that pixel in.
        below = torch.cat([margin, margin[-1:] - 1])[plateau[-1] + 1]
        bias[k] = bias[k] - (margin[plateau[0]] + below) / 2
    return Prototypes(prototypes.vectors, bias, prototypes.temperature)


def masks_from_probability(probability: Tensor, present: Tensor) -> Tensor:
    """Masks uint8 [B, H, W] of class probabilities.

    probability: [B, K + 1, H, W], background first. present: bool [B, K]; classes that are absent by the image-level
    label are never chosen.
    """
    allowed = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)[:, :, None, None]
    return torch.where(allowed, probability, -1.0).argmax(dim=1).to(torch.uint8)


def second_view(maps: Tensor, *, mirror: bool, back: bool = False) -> Tensor:
    """Images or maps [B, ..., H, W] moved by a pixel and, where left and right mean the same, mirrored; or back."""
    if back:
        maps = maps.roll((-1, -1), dims=(-2, -1))
    if mirror:
        maps = maps.flip(-1)
    return maps if back else maps.roll((1, 1), dims=(-2, -1))
