"""CUDA graphs of a function of tensors: the launches of a shape are recorded once and replayed with one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP_CALLS = 3


class CudaGraphs:
    """A function of CUDA tensors, captured once for every combination of shapes, dtypes and device that it meets.

    function: returns tensors, makes no host synchronisation, and does the same for all inputs of a shape. Other tensors
    that it reads (parameters) are read where they lay at capture, in their present value.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self._replays: dict[tuple[Any, ...], Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        with torch.cuda.device(inputs[0].device):
            if key not in self._replays:
                self._replays[key] = _capture(self.function, inputs)
            return self._replays[key](*inputs)


def _capture(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    static_inputs = tuple(tensor.detach().clone() for tensor in inputs)
    # What libraries set up at their first calls (handles, workspaces, plans) can't be captured; nor can the default
    # stream, where a backward pass would wait for it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            function(*static_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Its own default is one stream for all devices, on which another device's work would be executed and not captured.
    with torch.cuda.graph(graph, stream=stream):
        static_outputs = function(*static_inputs)

    def replay(*fresh: Tensor) -> tuple[Tensor, ...]:
        for static, tensor in zip(static_inputs, fresh, strict=True):
            static.copy_(tensor)
        graph.replay()
        # The next replay overwrites them.
        return tuple(output.clone() for output in static_outputs)

    return replay
