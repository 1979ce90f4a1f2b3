"""Losses of the pixel decoder: the project's own, its memory, and the call shapes of the losses that it replaces."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import ConfigError, DataError
from cldf_fast.ops import sample_anchors
from cldf_fast.ops._arguments import check_choice, check_count, check_positive, check_tensor
from cldf_fast.ops.infonce import pixel_infonce, pixel_infonce_sum


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks; the gradient of own rows is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size())[distributed.get_rank()]


class PixelInfoNCE(nn.Module):
    """Contrastive loss of labelled pixel embeddings against each other: every embedding is anchor and candidate.

    temperature, variant: see `ops.pixel_infonce`. impl: the backend. class_weight: [K], the weight of each class's
    anchors in the mean, for labels below K; None: all alike.

    Under torch.distributed the candidates are those of all processes, gathered with their gradients; shapes must be
    equal on all of them, so pad with label -1. The loss is scaled so that the mean over processes, which is what data
    parallel training takes of gradients, is the mean over all anchors of all processes that count. A process without
    any anchor contributes a zero that is connected to the graph.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        variant: Literal["per_positive", "supcon"] = "supcon",
        impl: str = "auto",
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, ("per_positive", "supcon"))
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.variant: Literal["per_positive", "supcon"] = variant
        self.impl = impl
        if class_weight is not None:
            check_tensor("class_weight", class_weight, "floating", ("K",))
            if not bool(((class_weight >= 0) & class_weight.isfinite()).all()):
                raise ConfigError(f"class_weight: expected finite weights, 0 or more, got {class_weight.tolist()}")
        self.register_buffer("class_weight", class_weight)

    def forward(self, embeddings: Tensor, labels: Tensor, bank: PixelBank | None = None) -> Tensor:
        """Scalar loss of embeddings [M, D] (usually of unit length) with labels [M]; labels below 0 are ignored.

        bank: further candidates, without gradient.
        """
        check_tensor("embeddings", embeddings, "floating", ("M", "D"))
        check_tensor("labels", labels, "integer", (embeddings.shape[0],), embeddings)
        candidates, candidate_labels, first = embeddings, labels, 0
        world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if world > 1:
            candidates, candidate_labels = _GatherRows.apply(embeddings), _GatherRows.apply(labels)
            first = distributed.get_rank() * embeddings.shape[0]
        vectors = bank_labels = None
        if bank is not None:
            vectors, bank_labels = bank.candidates()
            vectors = vectors.to(embeddings.dtype)
        own = torch.arange(first, first + embeddings.shape[0], device=embeddings.device)
        total, weight = pixel_infonce_sum(
            embeddings,
            candidates,
            labels,
            candidate_labels,
            temperature=self.temperature,
            variant=self.variant,
            self_index=own,
            anchor_weight=self._weight_of(labels),
            bank=vectors,
            bank_labels=bank_labels,
            impl=self.impl,
        )
        if world > 1:
            distributed.all_reduce(weight)
        return total * world / torch.where(weight > 0, weight, 1)

    def _weight_of(self, labels: Tensor) -> Tensor | None:
        if self.class_weight is None:
            return None
        try:
            return self.class_weight[labels.long().clamp_min(0)]
        except IndexError as error:  # on the CPU alone; to look would synchronise elsewhere
            raise DataError(
                f"labels: expected classes below {len(self.class_weight)}, which is how many weights class_weight has, "
                f"got {int(labels.max())}"
            ) from error


class PixelBank(nn.Module):
    """The newest embeddings of every class, as further candidates that cost no backward pass: a ring buffer a class.

    num_classes: K, background (label 0) included. size: rows of each class. dim: D.
    State (in `state_dict`): vectors float32 [K, size, D], filled bool [K, size], next_slot int64 [K].
    """

    vectors: Tensor
    filled: Tensor
    next_slot: Tensor

    def __init__(self, num_classes: int, size: int, dim: int) -> None:
        super().__init__()
        check_count(num_classes=num_classes, size=size, dim=dim)
        self.register_buffer("vectors", torch.zeros(num_classes, size, dim))
        self.register_buffer("filled", torch.zeros(num_classes, size, dtype=torch.bool))
        self.register_buffer("next_slot", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        """Put in embeddings [M, D] with labels [M] in their order; the oldest of their class give way.

        Labels below 0 or from K up are left out. No host synchronisation, no shape that depends on the data.
        """
        classes, size, dim = self.vectors.shape
        check_tensor("embeddings", embeddings, "floating", ("M", dim), self.vectors)
        check_tensor("labels", labels, "integer", (embeddings.shape[0],), self.vectors)
        member = labels.unsqueeze(1) == torch.arange(classes, device=labels.device)
        count = member.sum(dim=0)
        order = member.cumsum(dim=0) - 1
        # Of more rows than there is room for, the last ones stay.
        member = member & (order >= count - size)
        slot = (self.next_slot + order) % size + size * torch.arange(classes, device=labels.device)
        # Whatever stays out goes to one place beyond the end, which is then cut off.
        place = torch.where(member, slot, classes * size).amin(dim=1)
        rows = torch.cat([self.vectors.flatten(0, 1), self.vectors.new_zeros(1, dim)])
        self.vectors.copy_(rows.index_copy(0, place, embeddings.to(rows.dtype))[:-1].view_as(self.vectors))
        full = torch.cat([self.filled.flatten(), self.filled.new_zeros(1)])
        self.filled.copy_(full.index_fill(0, place, True)[:-1].view_as(self.filled))
        self.next_slot.copy_((self.next_slot + count) % size)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """vectors [K * size, D] and their labels int64 [K * size], -1 in slots that were never filled."""
        classes = torch.arange(self.filled.shape[0], device=self.filled.device).unsqueeze(1)
        return self.vectors.flatten(0, 1), torch.where(self.filled, classes, -1).flatten()


class SupConLoss(nn.Module):
    """Supervised contrastive loss with the call shape of HobbitLong/SupContrast, without its M x M matrices.

    temperature, base_temperature: the loss is scaled by their ratio. contrast_mode: "all" views are anchors, or "one".
    As there, an anchor without a positive counts as 0 in the mean. Two differences: an anchor without any negative (all
    labels equal) counts as 0 too, not as a constant; and there is no `mask` in place of labels.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: Literal["all", "one"] = "all",
        base_temperature: float = 0.07,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        check_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.impl = impl

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scalar loss of features [B, V, D], V views of each of B images, usually of unit length; further axes are
        part of D.

        labels: integers [B] or [B, 1], negative ones are classes too; None: every image is its own class (SimCLR).
        """
        if isinstance(features, Tensor) and features.ndim > 3:
            features = features.flatten(2)
        check_tensor("features", features, "floating", ("B", "V", "D"))
        batch, views, _ = features.shape
        if labels is None:
            labels = torch.arange(batch, device=features.device)
        elif isinstance(labels, Tensor) and labels.shape == (batch, 1):
            labels = labels.squeeze(1)
        check_tensor("labels", labels, "integer", (batch,), features)
        if batch:
            labels = labels.long()
            labels = labels - labels.amin()
        # View by view, so that the anchors of mode "one" are the first rows.
        candidates, candidate_labels = features.transpose(0, 1).flatten(0, 1), labels.repeat(views)
        anchors = batch if self.contrast_mode == "one" else batch * views
        loss = pixel_infonce(
            candidates[:anchors],
            candidates,
            candidate_labels[:anchors],
            candidate_labels,
            temperature=self.temperature,
            variant="supcon",
            self_index=torch.arange(anchors, device=features.device),
            reduction="sum",
            impl=self.impl,
        )
        return self.temperature / self.base_temperature * loss / max(anchors, 1)


class PixelContrastLoss(nn.Module):
    """Pixel contrast with the call shape of tfzhou/ContrastiveSeg: anchors, half of them misclassified, per image.

    temperature, base_temperature: the loss is scaled by their ratio. ignore_label: pixels left out. max_views: anchors
    of every class of every image; where one kind of pixel, misclassified or correct, has fewer than half of them, the
    other kind fills up. num_classes: K. seed: of the sampling; it goes on with every call.
    Other than there, a class of few pixels takes part with those it has, and a batch with nothing to contrast gives a
    connected 0, not an error or NaN.
    """

    calls: Tensor

    def __init__(
        self,
        num_classes: int,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        ignore_label: int = -1,
        max_views: int = 100,
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, base_temperature=base_temperature)
        check_count(num_classes=num_classes, max_views=max_views)
        self.num_classes = num_classes
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.ignore_label = ignore_label
        self.max_views = max_views
        self.impl = impl
        # On the device, so that a call never synchronises and a CUDA graph can go on counting.
        self.register_buffer("calls", torch.tensor(seed, dtype=torch.int64))

    @classmethod
    def from_configer(cls, configer: Any, **options: Any) -> PixelContrastLoss:
        """The loss that ContrastiveSeg constructs from its `Configer`; options: further arguments.

        Its `max_samples`, a bound on the anchors of a batch, has no counterpart: memory does not grow with their pairs.
        """
        read = {name: configer.get("contrast", name) for name in ("temperature", "base_temperature", "max_views")}
        ignored = (configer.get("loss", "params") if configer.exists("loss", "params") else {}).get(
            "ce_ignore_index", -1
        )
        return cls(**{"num_classes": configer.get("data", "num_classes"), "ignore_label": ignored} | read | options)

    def forward(self, feats: Tensor, labels: Tensor, predict: Tensor) -> Tensor:
        """Scalar loss of feats [B, D, h, w] of unit length.

        labels: [B, H, W], any integer dtype, brought to h x w by the nearest pixel. predict: [B, h, w], predicted
        labels.
        """
        check_tensor("feats", feats, "floating", ("B", "D", "h", "w"))
        batch, dim, height, width = feats.shape
        check_tensor("labels", labels, "integer", (batch, "H", "W"), feats)
        check_tensor("predict", predict, "integer", (batch, height, width), feats)
        resized = F.interpolate(labels.unsqueeze(1).double(), (height, width), mode="nearest").squeeze(1).long()
        known = (resized != self.ignore_label) & (resized >= 0) & (resized < self.num_classes)
        wrong = resized != predict
        (hard, num_hard), (easy, num_easy) = (
            sample_anchors(
                torch.where(known & kind, resized, -1),
                num_classes=self.num_classes,
                per_class=self.max_views,
                seed=self.calls,
            )
            for kind in (wrong, ~wrong)
        )
        self.calls += 1
        keep_hard = torch.minimum(num_hard, (self.max_views - num_easy).clamp_min(self.max_views // 2))
        keep_easy = torch.minimum(num_easy, self.max_views - keep_hard)
        # The misclassified first, then the correct; -1 beyond both.
        place = torch.arange(self.max_views, device=feats.device).expand_as(hard)
        correct = easy.gather(2, (place - keep_hard.unsqueeze(2)).clamp_min(0))
        pixels = torch.where(place < keep_hard.unsqueeze(2), hard, correct)
        pixels = torch.where(place < (keep_hard + keep_easy).unsqueeze(2), pixels, -1)
        classes = torch.arange(self.num_classes, device=feats.device).view(1, -1, 1)
        anchor_labels = torch.where(pixels >= 0, classes, -1).flatten()
        rows = pixels.flatten(1).clamp_min(0).unsqueeze(1).expand(-1, dim, -1)
        embeddings = feats.flatten(2).gather(2, rows).transpose(1, 2).flatten(0, 1)
        own = torch.arange(len(anchor_labels), device=feats.device)
        loss = pixel_infonce(
            embeddings,
            embeddings,
            anchor_labels,
            anchor_labels,
            temperature=self.temperature,
            variant="per_positive",
            self_index=own,
            reduction="mean",
            impl=self.impl,
        )
        return self.temperature / self.base_temperature * loss
