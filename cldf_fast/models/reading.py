"""Outputs of blocks inside a noise predictor: of the project's UNet, or of any other network by its modules' names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cldf_fast.errors import ConfigError, DataError
from cldf_fast.models.adopted import AdoptedUNet
from cldf_fast.models.unet import UNet, Visit
from cldf_fast.ops._arguments import check_tensor

Call = Callable[[Tensor, Tensor, Tensor | None], Any]
"""(x_t, timesteps, condition) -> the network's prediction, or an object that has it as `sample`."""


class BlockReader(Protocol):
    """Reads the same blocks of a network at every call, and computes nothing after the last of them.

    names: of the blocks. widths: channels of each block. prediction: whether the network's prediction is read too.
    channels: of an image.
    """

    names: list[str]
    widths: list[int]
    prediction: bool
    channels: int

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Tensor | None, visit: Visit) -> Tensor | None:
        """Calls visit(i, what the i-th of the blocks returned, [R, C_i, h_i, w_i]) as soon as each is there.

        x: [R, C, H, W] at noise levels timesteps [R], in the network's own units. Returns the network's prediction
        [R, C, H, W], or None where not asked for. Nothing else is held.
        """


class UNetReader:
    """Reads blocks of the project's UNet by their downsampling factors, or by names output_blocks.<i>."""

    def __init__(
        self,
        unet: UNet | AdoptedUNet,
        *,
        downsample: Sequence[int] | None,
        blocks: Sequence[str] | None,
        prediction: bool,
    ) -> None:
        self.unet = unet
        if blocks is None:
            self.blocks = _with_factor(list(enumerate(unet.output_downsample)), downsample or ())
        else:
            names = {f"output_blocks.{i}": i for i in range(len(unet.output_blocks))}
            _check_known("blocks", blocks, names)
            self.blocks = [names[name] for name in blocks]
        self.names = [f"output_blocks.{block}" for block in self.blocks]
        self.widths = [unet.output_widths[block] for block in self.blocks]
        self.prediction = prediction
        self.channels = unet.in_channels

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Tensor | None, visit: Visit) -> Tensor | None:
        places = {block: place for place, block in enumerate(self.blocks)}
        last = len(self.unet.output_blocks) - 1
        prediction: Tensor | None = None

        def read(block: int, output: Tensor) -> None:
            nonlocal prediction
            if block in places:
                visit(places[block], output)
            if self.prediction and block == last:
                prediction = self.unet.read_out(output)

        self.unet.decoder_features(x, timesteps, condition, [*self.blocks, *[last] * self.prediction], read)
        return prediction


class ModuleReader:
    """Reads what named modules of any network return, and stops the network once it has them all.

    The modules are hooked during a call, so that one network serves one call at a time.

    network: called as `call` says, by default network(x, timesteps), with a condition network(x, timesteps,
        class_labels=condition) where it has such an argument (MONAI's DiffusionModelUNet, diffusers' UNet2DModel) and
        network(x, timesteps, condition) otherwise.
    downsample: reads the children of network.up_blocks whose outputs are smaller than the image by these factors.
    blocks: reads the modules of these names instead.
    example: (x [B, C, H, W], condition) of a later call: one pass over the first of them tells what the modules return.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        downsample: Sequence[int] | None,
        blocks: Sequence[str] | None,
        prediction: bool,
        example: tuple[Tensor, Tensor | None],
        call: Call | None = None,
    ) -> None:
        self.call = call or _calling(network)
        self.prediction = prediction
        x, condition = example
        check_tensor("example[0]", x, "floating", ("B", "C", "H", "W"))
        self.channels = x.shape[1]
        modules = dict(network.named_modules())
        if blocks is None:
            up_blocks = modules.get("up_blocks")
            if not isinstance(up_blocks, nn.ModuleList) or not len(up_blocks):
                raise ConfigError(
                    f"blocks: expected names of modules, because {type(network).__name__} has no list up_blocks that "
                    f"downsample could choose from, got None"
                )
            candidates = [f"up_blocks.{i}" for i in range(len(up_blocks))]
        else:
            _check_known("blocks", blocks, modules)
            candidates = list(blocks)
        self.modules = {name: modules[name] for name in candidates}
        read: dict[int, Tensor] = {}
        self(x[:1], x.new_zeros(1), None if condition is None else condition[:1], read.__setitem__)
        seen = [read[i] for i in range(len(candidates))]
        if blocks is None:
            factors = [x.shape[2] // block.shape[2] for block in seen]
            chosen = _with_factor(list(enumerate(factors)), downsample or ())
            self.modules = {candidates[i]: modules[candidates[i]] for i in chosen}
            seen = [seen[i] for i in chosen]
        self.names = list(self.modules)
        self.widths = [block.shape[1] for block in seen]

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Tensor | None, visit: Visit) -> Tensor | None:
        read: set[str] = set()
        output: Any = None
        with torch.no_grad(), self._hooked(read, len(x), visit):
            try:
                output = self.call(x, timesteps, condition)
            except _AllRead:
                return None
        missing = [name for name in self.modules if name not in read]
        if missing:
            raise ConfigError(f"blocks: expected modules that the network calls, got {missing[0]}, which it does not")
        prediction: Any = output if isinstance(output, Tensor) else getattr(output, "sample", None)
        check_tensor("the network's prediction", prediction, "floating", (len(x), "C", *x.shape[2:]))
        return prediction if self.prediction else None

    @contextmanager
    def _hooked(self, read: set[str], rows: int, visit: Visit) -> Iterator[None]:
        def found(place: int, name: str, output: Any) -> None:
            if name in read:
                raise ConfigError(f"blocks: expected modules that the network calls once, got {name}, called again")
            if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != rows:
                found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise DataError(f"blocks: expected modules that return [{rows}, C, h, w], got {found} from {name}")
            read.add(name)
            visit(place, output)
            if not self.prediction and len(read) == len(self.modules):
                raise _AllRead

        with ExitStack() as hooks:
            for place, (name, module) in enumerate(self.modules.items()):
                handle = module.register_forward_hook(
                    lambda _module, _args, output, place=place, name=name: found(place, name, output)
                )
                hooks.callback(handle.remove)
            yield


class _AllRead(Exception):  # noqa: N818 - it is no error
    """Ends a network's forward pass from inside."""


def _calling(network: nn.Module) -> Call:
    parameters = inspect.signature(network.forward).parameters

    def call(x: Tensor, timesteps: Tensor, condition: Tensor | None) -> Any:
        if condition is None:
            return network(x, timesteps)
        if "class_labels" in parameters:
            return network(x, timesteps, class_labels=condition)
        return network(x, timesteps, condition)

    return call


def _with_factor(factors: list[tuple[int, int]], downsample: Sequence[int]) -> list[int]:
    """Of (block, factor), the blocks with one of the factors."""
    available = {factor for _, factor in factors}
    missing = [factor for factor in downsample if factor not in available]
    if missing:
        raise ConfigError(f"downsample: the network has blocks at factors {sorted(available)}, got {missing[0]}")
    return [block for block, factor in factors if factor in downsample]


def _check_known(argument: str, names: Sequence[str], known: dict[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"{argument}: expected names of the network's modules, such as {list(known)[-1]!r}, got {unknown[0]!r}"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"{argument}: expected every name once, got {list(names)}")
