"""What is exported, as modules of tensors alone: normalised images and their noise in, probabilities out.

Noise levels are fixed, so that embeddings of time, and of the null condition, become constants. Gradients do not
export: what `segmentation.evidence_weight` adds stays in torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import ConfigError
from cldf_fast.features import DiffusionFeatures
from cldf_fast.models.adopted import AdoptedClassifier, AdoptedUNet
from cldf_fast.models.conditions import label_condition, null_condition
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.models.layers import ResBlock
from cldf_fast.models.reading import UNetReader
from cldf_fast.pipeline import CLDF
from cldf_fast.segmentation import Prototypes, second_view

Network = TypeVar("Network", bound=nn.Module)


class SegmentationGraph(nn.Module):
    """Class probabilities as `CLDF.segment` gives them, before absent classes are ruled out, and the mask after.

    num_views, num_levels: V and T of the noise that forward wants.
    """

    def __init__(self, cldf: CLDF) -> None:
        super().__init__()
        if cldf.decoder is None or cldf.prototypes is None:
            raise ConfigError("run: expected a trained decoder, got none; train the decoder first")
        weight = cldf.config.segmentation.evidence_weight
        if weight:
            raise ConfigError(
                f"segmentation.evidence_weight: expected 0, because gradients do not export, got {weight}; export with "
                f"--without-evidence, which decides without the image's own gradient map"
            )
        assert isinstance(cldf.features, DiffusionFeatures)
        reader = cldf.features.reader
        assert isinstance(reader, UNetReader)
        self.views = _Views(cldf, average=cldf.config.segmentation.average_views, alpha_bar=cldf.features.alpha_bar)
        self.num_views, self.num_levels = self.views.count, len(cldf.features.steps)
        self.num_classes = cldf.num_classes
        self.blocks, self.prediction = reader.blocks, reader.prediction
        self.with_condition = cldf.config.features.condition == "label"
        times = cldf.features.times
        adopted = cldf.unet if isinstance(cldf.unet, AdoptedUNet) else None
        unet = cldf.unet.network if isinstance(cldf.unet, AdoptedUNet) else cldf.unet
        self.trained_input = _TrainedInput(adopted, times)
        if self.with_condition:
            self.unet = _copied(unet)
            self.register_buffer("times", times)
            self.register_buffer("rows", None if adopted is None else adopted.rows)
        else:
            null = null_condition(len(times), cldf.num_classes)
            self.unet = _folded(unet, cldf.unet.embed(times, null))
        size = cldf.config.data.size
        factors = [self.unet.output_downsample[block] for block in self.blocks] + [1] * self.prediction
        self.decoder = _Decoder(cldf.decoder, size, [size // factor for factor in factors])
        self.prototypes = _Prototypes(cldf.prototypes)

    def forward(self, image: Tensor, noise: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities float32 [B, K + 1, S, S], background first, and the mask int32 [B, S, S].

        image: float32 [B, C, S, S] in [-1, 1]. noise: float32 [B, V, T, C, S, S], standard normal, see `deploy.noise`.
        present: float32 [B, K], 1 where a class is present by the image-level label, 0 elsewhere.
        """
        noised = self.views(image, noise)
        embedding = self._condition(present) if self.with_condition else noised[:, 0, 0, :1]
        last = len(self.unet.output_blocks) - 1
        read = self.unet.blocks_of(self.trained_input(noised), embedding, [*self.blocks, *[last] * self.prediction])
        maps = [read[block] for block in self.blocks]
        if self.prediction:
            channels = image.shape[1]
            maps.append(self.views.clean(noised, self.unet.read_out(read[last])[:, :channels]))
        # Rows are view after view of an image, and level after level of a view.
        maps = [each.reshape(-1, self.num_levels * each.shape[1], *each.shape[2:]) for each in maps]
        probability = self.views.average(self.prototypes(self.decoder(maps)).permute(0, 3, 1, 2))
        absent = torch.cat([torch.zeros_like(present[:, :1]), 1 - present], dim=1)[:, :, None, None]
        return probability, (probability - 2 * absent).argmax(dim=1).to(torch.int32)

    def _condition(self, present: Tensor) -> Tensor:
        """Embeddings [B * V * T, E] of all rows."""
        rows = self.num_views * self.num_levels
        condition = label_condition(present > 0.5).repeat_interleave(rows, dim=0)
        if self._buffers["rows"] is not None:
            condition = condition @ self.get_buffer("rows")
        return self.unet.embed(self.get_buffer("times").repeat(condition.shape[0] // self.num_levels), condition)


class LabelGraph(nn.Module):
    """Image-level probabilities as `CLDF.label_probability` gives them.

    num_views, num_levels: V and T of the noise that forward wants; T counts the draws of a level too.
    """

    def __init__(self, cldf: CLDF) -> None:
        super().__init__()
        alpha_bar, times = cldf.saliency.levels
        self.views = _Views(cldf, average=cldf.config.evidence.average_views, alpha_bar=alpha_bar)
        self.num_views, self.num_levels = self.views.count, len(times)
        adopted = cldf.classifier if isinstance(cldf.classifier, AdoptedClassifier) else None
        classifier = cldf.classifier.network if isinstance(cldf.classifier, AdoptedClassifier) else cldf.classifier
        self.trained_input = _TrainedInput(adopted, times)
        self.multi_label = adopted is None or adopted.multi_label
        self.numbers = None if adopted is None else adopted.numbers.tolist()
        self.classifier = _folded(classifier, classifier.embed(times))

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Probabilities float32 [B, K]; image and noise as in `SegmentationGraph`."""
        noised = self.views(image, noise)
        logits = self.classifier.logits(self.trained_input(noised), noised[:, 0, 0, :1])
        # The same as float32's logsigmoid and exp, without either.
        probability = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        if self.numbers is not None:
            probability = probability[:, self.numbers]
        return probability.reshape(-1, self.num_views * self.num_levels, probability.shape[1]).mean(dim=1)


class BottleneckGraph(nn.Module):
    """The CDM's deepest feature, averaged over pixels: by it a study is told that is unlike the training images.

    At the first of the features' noise levels, without a condition, of every slice alike, whatever its label is. On its
    own, because the segmentation graph sees but slices that have a label; it is the encoder alone, once.
    num_views, num_levels: V and T of the noise that forward wants, both 1.
    """

    num_views = num_levels = 1

    def __init__(self, cldf: CLDF) -> None:
        super().__init__()
        assert isinstance(cldf.features, DiffusionFeatures)
        self.views = _Views(cldf, average=False, alpha_bar=cldf.features.alpha_bar[:1])
        times = cldf.features.times[:1]
        adopted = cldf.unet if isinstance(cldf.unet, AdoptedUNet) else None
        unet = cldf.unet.network if isinstance(cldf.unet, AdoptedUNet) else cldf.unet
        self.trained_input = _TrainedInput(adopted, times)
        self.patch_size = unet.patch_size
        folded = _folded(unet, cldf.unet.embed(times, null_condition(1, cldf.num_classes)))
        self.blocks = nn.ModuleList([*folded.input_blocks, folded.middle_block])

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Features float32 [B, F]; image and noise as in `SegmentationGraph`."""
        noised = self.views(image, noise)
        hidden = F.pixel_unshuffle(self.trained_input(noised), self.patch_size)
        for block in self.blocks:
            hidden = block(hidden, noised[:, 0, 0, :1])
        return hidden.mean(dim=(2, 3))


class _Views(nn.Module):
    """Images as they are and, where views are averaged, as a second view; each at all noise levels."""

    def __init__(self, cldf: CLDF, *, average: bool, alpha_bar: Tensor) -> None:
        super().__init__()
        self.count = 1 + average
        self.mirror = cldf.config.data.mirror
        level = alpha_bar.view(-1, 1, 1, 1)
        self.register_buffer("signal_scale", level.sqrt())
        self.register_buffer("noise_scale", (1 - level).sqrt())

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """x_t [B * V * T, C, S, S] of images [B, C, S, S] and noise [B, V, T, C, S, S]."""
        views = [image, second_view(image, mirror=self.mirror)][: self.count]
        stacked = torch.stack(views, dim=1).unsqueeze(2)
        noised = self.get_buffer("signal_scale") * stacked + self.get_buffer("noise_scale") * noise
        return noised.flatten(0, 2)

    def clean(self, noised: Tensor, noise: Tensor) -> Tensor:
        """The clean images that x_t and predicted noise imply, all [B * V * T, C, S, S]."""
        rows = (-1, len(self.get_buffer("signal_scale")), *noised.shape[1:])
        clean = noised.reshape(rows) - self.get_buffer("noise_scale") * noise.reshape(rows)
        return (clean / self.get_buffer("signal_scale")).flatten(0, 1)

    def average(self, maps: Tensor) -> Tensor:
        """[B, ..., S, S] of maps [B * V, ..., S, S] of all views."""
        if self.count == 1:
            return maps
        first, second = maps.reshape(-1, 2, *maps.shape[1:]).unbind(1)
        return (first + second_view(second, mirror=self.mirror, back=True)) / 2


class _TrainedInput(nn.Module):
    """x_t of rows as a converted network was trained on them, row r at noise level r mod T; None: as they are."""

    def __init__(self, network: AdoptedUNet | AdoptedClassifier | None, times: Tensor) -> None:
        super().__init__()
        scale, shift = (None if network is None else network.trained_input.at(times)) or (None, None)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, noised: Tensor) -> Tensor:
        if self._buffers["scale"] is None:
            return noised
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        return (noised.reshape(-1, len(scale), *noised.shape[1:]) * scale + shift).flatten(0, 1)


class _Decoder(nn.Module):
    """`PixelDecoder.dense` for one size: standardising is folded into the first layer, and resizing is two products
    with constant matrices, which ONNX Runtime does several times faster on a CPU."""

    def __init__(self, decoder: PixelDecoder, size: int, native: Sequence[int]) -> None:
        super().__init__()
        with torch.no_grad():
            weight = decoder.first.weight / decoder.deviation
            self.register_buffer("bias", (decoder.first.bias - weight @ decoder.mean).view(1, -1, 1, 1))
            for i, columns in enumerate(weight.split(decoder.channels, dim=1)):
                self.register_buffer(f"first_{i}", columns[:, :, None, None].clone())
            for pixels in set(native):
                spread = F.interpolate(torch.eye(pixels)[None], size, mode="linear", align_corners=False)[0]
                self.register_buffer(f"spread_{pixels}", None if pixels == size else spread)
        self.native = list(native)
        self.rest = copy.deepcopy(decoder.rest)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Embeddings [R, S, S, D] of unit length of maps [R, C_i, S / f_i, S / f_i]."""
        by_size: dict[int, Tensor] = {}
        for i, (block, pixels) in enumerate(zip(maps, self.native, strict=True)):
            projected = F.conv2d(block, self.get_buffer(f"first_{i}"))
            by_size[pixels] = by_size[pixels] + projected if pixels in by_size else projected
        hidden = self.get_buffer("bias")
        for pixels, native in by_size.items():
            spread = self._buffers[f"spread_{pixels}"]
            hidden = hidden + (native if spread is None else spread.T @ (native @ spread))
        return F.normalize(self.rest(hidden.permute(0, 2, 3, 1)), dim=-1)


class _Prototypes(nn.Module):
    """`Prototypes.probability`, as a module whose tensors are weights of the graph."""

    def __init__(self, prototypes: Prototypes) -> None:
        super().__init__()
        self.register_buffer("vectors", prototypes.vectors)
        self.register_buffer("bias", prototypes.bias)
        self.temperature = prototypes.temperature

    def forward(self, embeddings: Tensor) -> Tensor:
        prototypes = Prototypes(self.get_buffer("vectors"), self.get_buffer("bias"), self.temperature)
        return prototypes.probability(embeddings)


class _GroupNorm(nn.Module):
    """A group norm as a layer norm over each group's pixels: ONNX Runtime takes the operator itself apart into dozens
    of small steps on a CPU, and every other runtime has a kernel for this one too."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        normed = F.layer_norm(grouped, grouped.shape[2:], eps=self.eps).reshape(x.shape)
        affine = (-1, *[1] * (x.ndim - 2))
        return normed * self.get_buffer("weight").view(affine) + self.get_buffer("bias").view(affine)


class _Constant(nn.Module):
    """In place of `ResBlock.emb_layers`, where the embeddings of all rows are known: row r has number r mod T."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, rows: Tensor) -> Tensor:
        values = self.get_buffer("values")
        return values if len(values) == 1 else values.repeat(rows.shape[0] // len(values), 1)


def _copied(network: Network) -> Network:
    """A copy without the operators that runtimes are slow at."""
    copied = copy.deepcopy(network)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, _GroupNorm(child))
    return copied


def _folded(network: Network, embedding: Tensor) -> Network:
    """A copy whose residual blocks know their embedding [T, E], and read but the number of rows of what they get."""
    copied = _copied(network)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, ResBlock):
                module.emb_layers = _Constant(module.emb_layers(embedding))  # type: ignore[assignment]
    return copied
