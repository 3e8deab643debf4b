"""One border for the whole batch: A's first layers work on the window that differs.

All rows of a prompted batch share their border; only the image in the middle differs.  Around the
image's receptive field every row's activations are therefore equal, through convolutions,
BatchNorm (also with batch statistics), pointwise layers and pools.  :class:`Windowed` carries
such a batch as one surround, computed once, and a window a row, until the window has grown to
most of the map.  The numbers are those of the whole canvas up to rounding; in the backward pass
the surround's gradient is summed over the batch before the first convolution's input gradient.

ResNet-18 on 32 → 128: the window is 19 of 64 pixels wide after the first convolution and 19 of 32
after layer 1, a tenth to a third of the area.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from kiop_fast.prompt.window_grads import Paste, WindowedBatchNorm

# Part of a map from which the whole of it is as quick: the window is copied with its halo for
# every layer.  Measured: see docs/engine.md.
WHOLE = 0.3

# Where windows were measured to pay.  On a GPU each of their many small operations is a kernel of
# its own; not measured there yet: row "prompt step, windowed" of the benchmarks.
DEVICES = ["cpu"]


class Windowed(Tensor):
    """(N, C, H, W) whose rows are equal outside a window.

    A tensor to the model that it passes through: known layers keep the window, everything else
    gets the whole tensor (:meth:`whole`).

    Args:
        surround: (1, C, H, W); what it holds where the window lies is never read.
        window: (N, C, h, w).
        top, left: of the window, pixels.
    """

    surround: Tensor
    window: Tensor
    corner: tuple[int, int]

    @staticmethod
    def __new__(cls, surround: Tensor, window: Tensor, top: int, left: int) -> Windowed:
        self = surround.detach().expand(len(window), -1, -1, -1).as_subclass(cls)
        self.surround, self.window, self.corner = surround, window, (top, left)
        return self

    @property
    def box(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and stop of the window's rows, then of its columns."""
        top, left = self.corner
        height, width = self.window.shape[2:]
        return (top, top + height), (left, left + width)

    def patch(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """(N, C, …) dense pixels ``rows`` × ``columns``."""
        (top, bottom), (left, right) = self.box
        first, last = max(top, rows[0]), min(bottom, rows[1])
        start, stop = max(left, columns[0]), min(right, columns[1])
        window = self.window[:, :, first - top : last - top, start - left : stop - left]
        if ((first, last), (start, stop)) == (rows, columns):
            return window
        around = self.surround[:, :, slice(*rows), slice(*columns)]
        return Paste.apply(around, window, first - rows[0], start - columns[0])

    def whole(self) -> Tensor:
        """The ordinary (N, C, H, W) tensor."""
        height, width = self.surround.shape[2:]
        return self.patch((0, height), (0, width))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        layer = _LAYERS.get(func)
        result = NotImplemented if layer is None else layer(*args, **kwargs)
        if result is not NotImplemented:
            return result
        dense = tree_map(lambda x: x.whole() if isinstance(x, Windowed) else x, (args, kwargs))
        return func(*dense[0], **dense[1])


def pays(images: Tensor, canvas: int, most: float = WHOLE) -> bool:
    """Whether images (N, C, s, s) on a canvas of that side, pixels, are worth a window.

    Args:
        most: part of the canvas that an image may take.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    side = images.shape[-1]
    small = len(images) > 1 and side * side <= most * canvas * canvas
    return small and images.device.type in DEVICES


def windowed(surround: Tensor, images: Tensor, corner: int) -> Tensor:
    """Images (N, C, s, s) inside a border (1, C, S, S): windowed where that pays.

    Args:
        corner: the image's first row and column in the canvas, pixels.
    """
    return _smallest(Windowed(surround, images, corner, corner))


def _smallest(x: Windowed) -> Tensor:
    """``x`` itself while its window is small, else the whole tensor."""
    height, width = x.surround.shape[2:]
    small = x.window.shape[2] * x.window.shape[3] <= WHOLE * height * width
    return x if small and len(x.window) > 1 else x.whole()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _reach(
    span: tuple[int, int], size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Outputs that see any of the inputs ``span``, and the inputs that those see.

    None where these reach beyond the map, into the padding.
    """
    width = (kernel - 1) * dilation + 1
    outputs = (size + 2 * padding - width) // stride + 1
    first = max(0, -(-(span[0] + padding - width + 1) // stride))
    last = min(outputs - 1, (span[1] - 1 + padding) // stride)
    start, stop = first * stride - padding, last * stride - padding + width
    if start < 0 or stop > size or last < first:
        return None
    return (first, last + 1), (start, stop)


def _slid(
    x: Windowed, op: Callable[[Tensor, Any], Tensor], kernel: Any, stride: Any, padding: Any,
    dilation: Any,
) -> Any:  # fmt: skip
    """A sliding operation ``op(input, padding)`` on both parts."""
    geometry = zip(
        x.box, x.surround.shape[2:], *map(_pair, (kernel, stride, padding, dilation)), strict=True
    )
    down, across = (_reach(*axis) for axis in geometry)
    if down is None or across is None:
        return NotImplemented
    (outputs, rows), (places, columns) = down, across
    window = op(x.patch(rows, columns), 0)
    return _smallest(Windowed(op(x.surround, padding), window, outputs[0], places[0]))


def _conv2d(
    input: Any, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    if not isinstance(input, Windowed) or isinstance(padding, str):
        return NotImplemented

    def op(x: Tensor, around: Any) -> Tensor:
        return F.conv2d(x, weight, bias, stride, around, dilation, groups)

    return _slid(input, op, weight.shape[2:], stride, padding, dilation)


def _max_pool2d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    if ceil_mode or return_indices:
        return NotImplemented
    stride = stride or kernel_size

    def op(x: Tensor, around: Any) -> Tensor:
        return F.max_pool2d(x, kernel_size, stride, around, dilation)

    return _slid(input, op, kernel_size, stride, padding, dilation)


def _batch_norm(
    input: Any, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if not training:
        return _each(
            lambda x: F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps),
            input,
        )
    learns = any(p is not None and p.requires_grad for p in (weight, bias))
    if learns or running_mean is not None:
        return NotImplemented
    hole = (..., slice(*input.box[0]), slice(*input.box[1]))
    return Windowed(
        *WindowedBatchNorm.apply(input.surround, input.window, weight, bias, hole, eps),
        *input.corner,
    )


def _each(op: Callable[..., Tensor], x: Windowed) -> Windowed:
    return Windowed(op(x.surround), op(x.window), *x.corner)


def _pointwise(func: Callable[..., Tensor]) -> Callable[..., Any]:
    def layer(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Windowed) or any(isinstance(a, Tensor) for a in args):
            return NotImplemented
        return _each(lambda x: func(x, *args, **kwargs), input)

    return layer


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    if not (isinstance(a, Windowed) and isinstance(b, Windowed)) or a.shape != b.shape:
        return NotImplemented
    rows, columns = (
        (min(one[0], other[0]), max(one[1], other[1]))
        for one, other in zip(a.box, b.box, strict=True)
    )
    window = torch.add(a.patch(rows, columns), b.patch(rows, columns), alpha=alpha)
    surround = torch.add(a.surround, b.surround, alpha=alpha)
    return _smallest(Windowed(surround, window, rows[0], columns[0]))


_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_cuda", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point),
}
_LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    **{
        func: _pointwise(func)
        for func in (
            F.relu, F.relu6, F.hardtanh, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish,
            torch.relu, torch.sigmoid, torch.tanh, Tensor.relu, Tensor.sigmoid, Tensor.tanh,
        )
    },
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.add_), _add),
}  # fmt: skip
