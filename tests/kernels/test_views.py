"""views against torchvision's and kornia's geometry, ``F.interpolate`` and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    capture,
    draw,
    needs_gpu,
    results,
    runs_kernels,
)
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as tv

from kiop_fast.errors import KernelError
from kiop_fast.kernels import launches, reset_launches, views, views_eager

# name: images, channels, side, pad, channels out, channels-last images and result
CASES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "power of two": (5, 3, 16, 4, 3, False),
    "one grey image of 31 pixels": (1, 1, 31, 4, 1, False),
    "33 pixels, channels-last": (1, 3, 33, 1, 3, True),
    "grey repeated": (4, 1, 8, 2, 3, False),
    "grey repeated, channels-last": (2, 1, 9, 2, 3, True),
    "five channels, no frame": (3, 5, 7, 0, 5, False),
    "one pixel": (2, 3, 1, 1, 3, False),
    "a frame wider than the image": (3, 3, 4, 6, 3, False),
}


def make(
    case: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, dict[str, Any]]:
    """Images and the keywords of a case; the first box is the whole image, the last one pixel."""
    n, channels, side, pad, out, channels_last = CASES[case]
    generator = torch.Generator().manual_seed(sum(map(ord, case)))

    def integers(high: Tensor | int) -> Tensor:
        return (torch.rand(n, generator=generator) * high).long()

    images = torch.rand(n, channels, side, side, generator=generator, dtype=torch.float64)
    height, width = 1 + integers(side), 1 + integers(side)
    height[-1] = width[-1] = 1
    height[0] = width[0] = side
    top, left = integers(side - height + 1), integers(side - width + 1)
    options = {
        "crop": torch.stack([integers(2 * pad + 1), integers(2 * pad + 1)], dim=1),
        "crop_flip": integers(2).bool(),
        "box": torch.stack([top, left, height, width], dim=1),
        "box_flip": integers(2).bool(),
        "mean": torch.rand(out, generator=generator, dtype=torch.float64).to(dtype),
        "std": torch.rand(out, generator=generator, dtype=torch.float64).to(dtype) + 0.25,
    }
    options = {name: value.to(device) for name, value in options.items()}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(dtype).to(device).contiguous(memory_format=layout)
    return images, options | {"pad": pad, "channels_last": channels_last}


def image_by_image(
    images: Tensor,
    crop: Tensor,
    crop_flip: Tensor,
    box: Tensor,
    box_flip: Tensor,
    *,
    pad: int,
    mean: Tensor,
    std: Tensor,
    **_: Any,
) -> Tensor:
    """torch's and torchvision's own functions, one image at a time."""
    side = images.shape[-1]
    both: list[Tensor] = []
    for image, (top, left), flip in zip(images, crop.tolist(), crop_flip, strict=True):
        view = tv.crop(F.pad(image, [pad] * 4), top, left, side, side)
        both.append(tv.hflip(view) if flip else view)
    for image, (top, left, height, width), flip in zip(images, box.tolist(), box_flip, strict=True):
        cut = tv.crop(image, top, left, height, width)[None]
        view = F.interpolate(cut, (side, side), mode="bilinear", align_corners=True)[0]
        both.append(tv.hflip(view) if flip else view)
    grey = len(mean) // images.shape[1]
    views = torch.stack(both).repeat(1, grey, 1, 1)
    return tv.normalize(views, mean.tolist(), std.tolist())


def operator(images: Tensor, crop: Tensor, crop_flip: Tensor, *args: Any, **options: Any) -> Tensor:
    """The registered operator itself, on the eager twin where there is no GPU."""
    ordered = [options[name] for name in ("pad", "mean", "std")]
    ordered += [images.dtype, options["channels_last"]]
    tables = [*args, *(options[name] for name in ("box", "box_flip") if name in options)]
    return torch.ops.kiop_fast.views(images, crop, crop_flip, *tables, *ordered)


def with_gradient(function: Any, images: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Both views and the images' gradient for fixed random cotangents."""
    images = images.detach().requires_grad_()
    result = function(images, **options)
    cotangent = draw(7, *result.shape, dtype=result.dtype).to(result.device)
    return [result.detach(), *torch.autograd.grad(result, images, cotangent)]


@pytest.mark.parametrize("function", [views, operator])
@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision_and_interpolate(case: str, function: Any) -> None:
    images, options = make(case)
    got = with_gradient(function, images, options)
    expected = with_gradient(image_by_image, images, options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    assert got[0].is_contiguous(memory_format=layout)


def test_local_view_is_kornias_random_resized_crop() -> None:
    kornia = pytest.importorskip("kornia")
    images, options = make("power of two")
    side = images.shape[-1]
    transform = kornia.augmentation.RandomResizedCrop(
        (side, side), scale=(0.25, 1.0), ratio=(0.75, 4 / 3), cropping_mode="slice"
    )
    torch.manual_seed(0)
    drawn = transform.forward_parameters(images.shape)
    expected = transform(images, params=drawn)
    (left, top), (right, bottom) = drawn["src"][:, 0].T.long(), drawn["src"][:, 2].T.long()
    box = torch.stack([top, left, bottom - top + 1, right - left + 1], dim=1)
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3, "box_flip": torch.zeros(len(images)).bool()}
    local = views(images, **options | plain | {"box": box})[len(images) :]
    torch.testing.assert_close(local, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["one pixel", "grey repeated", "five channels, no frame"])
def test_gradcheck(case: str) -> None:
    images, options = make(case)
    assert torch.autograd.gradcheck(lambda x: views(x, **options), (images.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_lower_precision_is_rounded_once(case: str, dtype: torch.dtype) -> None:
    images, options = make(case, dtype)
    exact = options | {name: options[name].double() for name in ("mean", "std")}
    got = with_gradient(views, images, options)
    expected = with_gradient(image_by_image, images.double(), exact)
    assert [t.dtype for t in got] == [dtype, dtype]
    ulp = torch.finfo(dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        atol = max(ulp, 4e-6) * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=ulp, atol=atol)


def test_result_dtype_and_plain_numbers() -> None:
    images, options = make("grey repeated", torch.float32)
    numbers = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    got = views(images, **options | numbers, dtype=torch.bfloat16)
    expected = views(images, **options | tensors)
    assert torch.equal(got, expected.bfloat16())


def test_int32_tables_and_strided_images_change_nothing() -> None:
    images, options = make("power of two")
    short = {name: options[name].int() for name in ("crop", "box")}
    strided = images.repeat_interleave(2, dim=0)[::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(views(strided, **options | short), views(images, **options))


@pytest.mark.parametrize("case", ["power of two", "grey repeated, channels-last"])
def test_operator_passes_opcheck(case: str) -> None:
    images, options = make(case, torch.float32)
    tables = [options[name] for name in ("crop", "crop_flip", "box", "box_flip", "pad")]
    arguments = (images.requires_grad_(), *tables, options["mean"], options["std"])
    arguments += (torch.float32, options["channels_last"])
    torch.library.opcheck(torch.ops.kiop_fast.views.default, arguments)


@pytest.mark.parametrize("function", [views, operator])
def test_compiles_into_one_graph(function: Any) -> None:
    images, options = make("grey repeated, channels-last", torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = with_gradient(compiled, images, options)
    expected = with_gradient(views_eager, images, options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "oblong images": ({"images": torch.zeros(2, 3, 4, 5)}, "square images"),
    "integers": ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "floating point"),
    "a crop too many": ({"crop": torch.zeros(3, 2).long()}, r"crop does not fit"),
    "a crop in floats": ({"crop": torch.zeros(2, 2)}, r"crop does not fit"),
    "a crop outside": ({"crop": table([0, 0], [0, 3])}, r"row 1 of crop"),
    "flips in numbers": ({"crop_flip": torch.zeros(2)}, "crop_flip"),
    "a box of three": ({"box": torch.zeros(2, 3).long()}, "box does not fit"),
    "an empty box": ({"box": table([0, 0, 4, 4], [0, 0, 0, 1])}, "row 1 of box"),
    "a box outside": ({"box": table([1, 0, 4, 4], [0, 0, 1, 1])}, "row 0 of box"),
    "a negative pad": ({"pad": -1}, "pad must not be negative"),
    "two means": ({"mean": [0.0, 0.0], "std": [1.0, 1.0]}, "normaliser does not fit"),
    "an integer result": ({"dtype": torch.int32}, "result must be floating point"),
    "another device": ({"box_flip": torch.zeros(2, device="meta").bool()}, "different devices"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    flips = torch.zeros(2).bool()
    good = {"images": torch.zeros(2, 3, 4, 4), "crop": table([0, 0], [2, 2]), "crop_flip": flips}
    good |= {"box": table([0, 0, 4, 4], [1, 2, 3, 2]), "box_flip": flips, "pad": 1}
    good |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    views(**good)
    changes, message = BAD[name]
    with pytest.raises(KernelError, match=message):
        views(**good | changes)


def run(function: Any, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both views and the images' gradient, on the device the kernels run on."""
    images, options = make(case, device=DEVICE)
    normaliser = [options.pop("mean"), options.pop("std")]

    def shown(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return function(images, mean=mean, std=std, **options)

    return results(shown, [images, *normaliser], dtype, differentiable=[0])


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_against_twin(case: str, dtype: torch.dtype) -> None:
    reset_launches()
    ours = run(views, case, dtype)
    assert launches() == {"_views_fwd_kernel": 1, "_views_bwd_kernel": 1}
    eager, exact = run(views_eager, case, dtype), run(views_eager, case, torch.float64)
    assert_as_good_as_eager(ours, [eager], exact, dtype)


@runs_kernels
def test_kernel_takes_int32_tables_strided_images_and_another_dtype() -> None:
    images, options = make("power of two", torch.float32, DEVICE)
    short = {name: options[name].int() for name in ("crop", "box")}
    strided = images.repeat_interleave(2, dim=0)[::2].transpose(2, 3).contiguous().transpose(2, 3)
    plain = views(images, **options)
    assert torch.equal(views(strided, **options | short), plain)
    # Not bf16: the interpreter's cast to it truncates.
    half = views(images, **options, dtype=torch.float16)
    assert torch.equal(half, plain.half())


@runs_kernels
def test_kernel_compiles_whole() -> None:
    images, options = make("grey repeated, channels-last", torch.float32, DEVICE)
    compiled = torch.compile(views, fullgraph=True, backend="aot_eager")
    got, expected = (with_gradient(f, images, options) for f in (compiled, views))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    tables = [options[name] for name in ("crop", "crop_flip", "box", "box_flip", "pad")]
    arguments = (images.requires_grad_(), *tables, options["mean"], options["std"])
    torch.library.opcheck(torch.ops.kiop_fast.views.default, (*arguments, torch.float32, True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replay_equals_eager(dtype: torch.dtype) -> None:
    images, options = make("power of two", dtype, DEVICE)
    images.requires_grad_()
    weights = draw(1, 2 * len(images), *images.shape[1:], dtype=dtype)

    def step() -> list[Tensor]:
        shown = views(images, **options)
        return [shown, *torch.autograd.grad((shown * weights).sum(), images)]

    graph, captured = capture(step)
    images.detach().copy_(draw(9, *images.shape))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
