"""bank_replay against torchvision's pad, crop, flip and normalise, one image at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import DEVICE, DTYPES, assert_as_good_as_eager, capture, needs_gpu, runs_kernels
from torch import Tensor
from torchvision.transforms import functional as tv

from kiop_fast.errors import KernelError
from kiop_fast.kernels import bank_replay, bank_replay_eager, launches, reset_launches

# name: rows of the bank, channels, side, pad, channels out, batch, crop, flip, channels-last
Case = tuple[int, int, int, int, int, int, bool, bool, bool]
CASES: dict[str, Case] = {
    "power of two": (16, 3, 32, 4, 3, 8, True, True, False),
    "one image of 31 pixels": (1, 1, 31, 4, 1, 1, True, True, False),
    "33 pixels, channels-last": (5, 3, 33, 1, 3, 7, True, True, True),
    "grey repeated": (9, 1, 8, 2, 3, 20, True, True, False),
    "grey repeated, channels-last": (4, 1, 9, 2, 3, 5, True, False, True),
    "five channels, plain": (6, 5, 7, 0, 5, 4, False, False, False),
    "only flips": (6, 3, 7, 0, 3, 4, False, True, False),
    "a frame wider than the image": (3, 3, 4, 6, 3, 3, True, True, False),
}


def make(
    case: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, dict[str, Any]]:
    """A bank of random bytes and the keywords of a case."""
    rows, channels, side, pad, out, n, crops, flips, channels_last = CASES[case]
    draw = torch.Generator().manual_seed(sum(map(ord, case)))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=draw)

    options = {
        "index": integers(rows, n),
        "crop": integers(2 * pad + 1, n, 2) if crops else None,
        "flip": integers(2, n).bool() if flips else None,
        "mean": torch.rand(out, generator=draw, dtype=torch.float64),
        "std": torch.rand(out, generator=draw, dtype=torch.float64) + 0.25,
    }
    fp64 = dtype == torch.float64
    for name in ("mean", "std"):
        options[name] = options[name] if fp64 else options[name].float()
    options = {name: None if t is None else t.to(device) for name, t in options.items()}
    bank = integers(256, rows, channels, side, side).to(torch.uint8).to(device)
    return bank, options | {"pad": pad, "dtype": dtype, "channels_last": channels_last}


def image_by_image(
    bank: Tensor,
    index: Tensor,
    *,
    crop: Tensor | None,
    flip: Tensor | None,
    pad: int,
    mean: Tensor,
    std: Tensor,
    **_: Any,
) -> Tensor:
    """torchvision's own transforms in fp64."""
    side = bank.shape[-1]
    batch = []
    for n, row in enumerate(index.tolist()):
        image = bank[row].double() / 255
        if crop is not None:
            top, left = crop[n].tolist()
            image = tv.crop(tv.pad(image, [pad] * 4), top, left, side, side)
        if flip is not None and flip[n]:
            image = tv.hflip(image)
        batch.append(image.repeat(len(mean) // bank.shape[1], 1, 1))
    return tv.normalize(torch.stack(batch), mean.tolist(), std.tolist())


def operator(bank: Tensor, index: Tensor, **options: Any) -> Tensor:
    """The registered operator itself, on the eager twin where there is no GPU."""
    names = ("crop", "flip", "pad", "mean", "std", "dtype", "channels_last")
    return torch.ops.kiop_fast.bank_replay(bank, index, *(options[name] for name in names))


@pytest.mark.parametrize("function", [bank_replay, operator])
@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision(case: str, function: Any) -> None:
    bank, options = make(case)
    got = function(bank, **options)
    torch.testing.assert_close(got, image_by_image(bank, **options), rtol=1e-12, atol=1e-13)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    assert got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_lower_precision_is_rounded_once(case: str, dtype: torch.dtype) -> None:
    bank, options = make(case, dtype)
    got, expected = bank_replay(bank, **options), image_by_image(bank, **options)
    assert got.dtype == dtype
    ulp = torch.finfo(dtype).eps
    atol = 2e-7 * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=ulp, atol=atol)


def test_every_byte_with_the_identity_normaliser() -> None:
    bank = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    got = bank_replay(bank, torch.tensor([0]), mean=[0.0], std=[1.0])
    expected = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16) / 255
    torch.testing.assert_close(got.double(), expected, rtol=2**-23, atol=0)


def test_int32_tables_and_a_strided_bank_change_nothing() -> None:
    bank, options = make("power of two")
    short = {name: options[name].int() for name in ("index", "crop")}
    strided = bank.repeat_interleave(2, dim=0)[::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(bank_replay(strided, **options | short), bank_replay(bank, **options))


@pytest.mark.parametrize("case", ["power of two", "grey repeated, channels-last", "only flips"])
def test_operator_passes_opcheck(case: str) -> None:
    bank, options = make(case, torch.float32)
    names = ("index", "crop", "flip", "pad", "mean", "std", "dtype", "channels_last")
    arguments = (bank, *(options[name] for name in names))
    torch.library.opcheck(torch.ops.kiop_fast.bank_replay.default, arguments)


@pytest.mark.parametrize("function", [bank_replay, operator])
def test_compiles_into_one_graph(function: Any) -> None:
    bank, options = make("grey repeated, channels-last", torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(bank, **options), bank_replay_eager(bank, **options))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a bank of floats": ({"bank": torch.zeros(5, 3, 4, 4)}, "bank of bytes"),
    "an oblong bank": ({"bank": torch.zeros(5, 3, 4, 5).byte()}, "square images"),
    "an empty bank": ({"bank": torch.zeros(0, 3, 4, 4).byte()}, "none of them 0"),
    "an empty batch": ({"index": torch.zeros(0).long(), "crop": None}, "batch is empty"),
    "an index of two axes": ({"index": torch.zeros(2, 1).long()}, "index does not fit"),
    "an index past the bank": ({"index": torch.tensor([0, 5])}, "row 1 of index"),
    "a negative index": ({"index": torch.tensor([-1, 0])}, "row 0 of index"),
    "a crop outside": ({"crop": torch.tensor([[0, 0], [0, 3]])}, "row 1 of crop"),
    "a flip too many": ({"flip": torch.zeros(3).bool()}, "flip does not fit"),
    "a negative pad": ({"pad": -1}, "pad must not be negative"),
    "two means": ({"mean": [0.0, 0.0], "std": [1.0, 1.0]}, "normaliser does not fit"),
    "an integer result": ({"dtype": torch.uint8}, "result must be floating point"),
    "another device": ({"index": torch.zeros(2, device="meta").long()}, "different devices"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    good = {"bank": torch.zeros(5, 3, 4, 4).byte(), "index": torch.tensor([0, 4])}
    good |= {"crop": torch.tensor([[0, 0], [2, 2]]), "flip": torch.zeros(2).bool(), "pad": 1}
    good |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    bank_replay(**good)
    changes, message = BAD[name]
    with pytest.raises(KernelError, match=message):
        bank_replay(**good | changes)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_against_twin(case: str, dtype: torch.dtype) -> None:
    bank, options = make(case, dtype, DEVICE)
    reset_launches()
    ours = bank_replay(bank, **options)
    assert launches() == {"_bank_replay_kernel": 1}
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    assert ours.is_contiguous(memory_format=layout)
    eager = bank_replay_eager(bank, **options)
    _, exact_options = make(case, torch.float64, DEVICE)
    exact = bank_replay_eager(bank, **exact_options)
    assert_as_good_as_eager(
        {"batch": ours.double()}, [{"batch": eager.double()}], {"batch": exact}, dtype
    )


@runs_kernels
def test_kernel_takes_int32_tables_and_a_strided_bank() -> None:
    bank, options = make("power of two", torch.float32, DEVICE)
    short = {name: options[name].int() for name in ("index", "crop")}
    strided = bank.repeat_interleave(2, dim=0)[::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(bank_replay(strided, **options | short), bank_replay(bank, **options))


@runs_kernels
def test_kernel_never_reads_outside_the_bank() -> None:
    """Where looking at the index would wait for the device: such a row is NaN, the others right."""
    bank, options = make("power of two", torch.float32, DEVICE)
    expected = bank_replay(bank, **options)
    index = options["index"].clone()
    index[1], index[4] = len(bank), -1
    got = operator(bank, **options | {"index": index})
    wrong = torch.tensor([1, 4], device=DEVICE)
    assert got[wrong].isnan().all()
    expected[wrong] = float("nan")
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@runs_kernels
def test_kernel_compiles_whole() -> None:
    bank, options = make("grey repeated, channels-last", torch.float32, DEVICE)
    compiled = torch.compile(bank_replay, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(bank, **options), bank_replay(bank, **options))
    names = ("index", "crop", "flip", "pad", "mean", "std", "dtype", "channels_last")
    arguments = (bank, *(options[name] for name in names))
    torch.library.opcheck(torch.ops.kiop_fast.bank_replay.default, arguments)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replay_equals_eager(dtype: torch.dtype) -> None:
    bank, options = make("power of two", dtype, DEVICE)
    graph, (captured,) = capture(lambda: [bank_replay(bank, **options)])
    options["index"].copy_(options["index"].flip(0))
    graph.replay()
    assert torch.equal(captured, bank_replay(bank, **options))
