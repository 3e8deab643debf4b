"""NVIDIA DALI: image files to batches, on a GPU or (``device_id=None``) without one.

Every pipeline is built once and fed batch by batch over all epochs; what is random arrives with
the batch (crops, flips), so a DALI batch shows the same crops as a torch batch.  Pixels against
Pillow and torch: decoded RGB files equal, grey of colour files within 1 of 255, resized images
within 1 of 255, normalised values within 1e-5 (tests/test_dali.py).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kiop_fast.errors import DataError

INSTALL = "pip install nvidia-dali-cuda130"

Normaliser = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, std


def available() -> bool:
    """Whether DALI is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # there is not even a package nvidia
        return False


def chosen(loader: str) -> bool:
    """Whether ``loader`` (dali, torch, auto) means DALI here; auto says once that it is not.

    Raises:
        DataError: DALI was asked for and is not installed.
    """
    if loader == "torch" or available():
        return loader != "torch"
    if loader == "auto":
        _say_once()
        return False
    raise DataError(
        "DALI is not installed", got="loader dali", expected="nvidia-dali (Linux, x86-64)",
        fix=f"{INSTALL}, or choose loader torch or auto",
    )  # fmt: skip


@lru_cache(maxsize=1)
def _say_once() -> None:
    warnings.warn(f"DALI is not installed ({INSTALL}); images are read with Pillow and torch",
                  stacklevel=3)  # fmt: skip


def gpu_index(device: torch.device | str) -> int | None:
    """The number of a GPU; None for the CPU."""
    device = torch.device(device)
    return (device.index or 0) if device.type == "cuda" else None


class Runner:
    """A pipeline built once and kept busy: ``depth`` batches are under way while one is used.

    Args:
        define: adds the operators to the current pipeline and returns its output node.
        batch: most images in a batch.
        device_id: GPU; None computes on the CPU alone.
        threads: CPU threads of the pipeline.
        depth: batches ahead.  Fewer batches than that are no special case.
    """

    def __init__(
        self, define: Callable[[], Any], batch: int, *, device_id: int | None, threads: int,
        depth: int,
    ) -> None:  # fmt: skip
        self._define, self.batch = define, batch
        self.device_id, self.threads, self.depth = device_id, threads, depth
        self._pipeline: Any = None
        self._busy = False

    @property
    def pipeline(self) -> Any:
        """The built pipeline; made anew only after one of its batches failed.

        Raises:
            DataError: DALI cannot work here at all, whatever the data.
        """
        if self._pipeline is None:
            from nvidia.dali.pipeline import Pipeline

            # Not "pipelined": that one runs ``depth`` batches on the first call and fails where
            # an epoch has fewer ("peek ... doesn't exist").  Runs are queued all the same.
            made = Pipeline(
                batch_size=self.batch, num_threads=self.threads, device_id=self.device_id,
                prefetch_queue_depth=self.depth, exec_pipelined=False, exec_async=True,
                exec_dynamic=True,
            )  # fmt: skip
            with made:
                made.set_outputs(self._define())
            try:
                made.build()
            except RuntimeError as error:
                said = str(error).strip() or type(error).__name__
                raise DataError(
                    "DALI cannot start its pipeline",
                    got=said.splitlines()[0],
                    expected="a DALI that fits this machine: its driver, its memory",
                    fix="do without: loading.loader=torch (--loader torch) for image files, "
                    "storing.replay=kernel for banks",
                ) from error
            self._pipeline = made
        return self._pipeline

    def run(self, inputs: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
        """A tensor for every dict of named inputs, in order; no copy is made of it.

        Raises:
            RuntimeError: DALI's own, for a batch that fails.
        """
        if self._busy:
            raise DataError("two loops read one DALI pipeline", fix="finish the first loop, or "
                            "open another loader")  # fmt: skip
        self._busy = True
        waiting: deque[dict[str, Any]] = deque()  # keeps buffers alive that DALI has not copied
        try:
            for named in inputs:
                self._schedule(named)
                waiting.append(named)
                if len(waiting) == self.depth:
                    yield self._take(waiting)
            while waiting:
                yield self._take(waiting)
        except RuntimeError:
            self._pipeline = None
            waiting.clear()
            raise
        finally:
            while waiting:  # the loop was left early
                self._take(waiting)
            self._busy = False

    def _schedule(self, named: dict[str, Any]) -> None:
        for name, value in named.items():
            self.pipeline.feed_input(name, value)
        self.pipeline.schedule_run()

    def _take(self, waiting: deque[dict[str, Any]]) -> Tensor:
        stream = None if self.device_id is None else torch.cuda.current_stream(self.device_id)
        (made,) = self.pipeline.share_outputs(stream)
        result = torch.from_dlpack(made.as_tensor())
        self.pipeline.release_outputs()  # the tensor holds the memory on its own
        waiting.popleft()
        return result


def _decode(side: int, channels: int, device_id: int | None) -> Any:
    """From paths fed as ``path`` to (h, w, c) uint8 of the side wanted."""
    from nvidia.dali import fn, types

    encoded = fn.io.file.read(fn.external_source(name="path", batch=True))
    pixels = fn.decoders.image(
        encoded, device="cpu" if device_id is None else "mixed",
        output_type=types.RGB if channels == 3 else types.GRAY,
        adjust_orientation=False,  # as Pillow leaves it
    )  # fmt: skip
    return fn.resize(pixels, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)


def _path_arrays(paths: Sequence[Path]) -> list[np.ndarray[Any, Any]]:
    return [np.frombuffer(str(path).encode(), dtype=np.uint8) for path in paths]


class DaliDecoder:
    """Files to (n, C, s, s) uint8 on the CPU by DALI's reader, decoder and resize.

    Args:
        side: of the result, pixels.
        channels: 1 or 3.
        batch: most files at once.
        device_id: GPU whose decoder helps; None: CPU alone.
        threads: CPU threads.
    """

    kind = "dali"

    def __init__(
        self, side: int, channels: int, batch: int, *, device_id: int | None, threads: int
    ) -> None:
        self.runner = Runner(
            lambda: _decode(side, channels, device_id), batch,
            device_id=device_id, threads=threads, depth=2,
        )  # fmt: skip

    def decode(self, batches: Sequence[Sequence[Path]]) -> Iterator[Tensor]:
        """One result a batch of files.

        Raises:
            RuntimeError: a file that does not decode.
        """
        for made in self.runner.run({"path": _path_arrays(paths)} for paths in batches):
            yield made.permute(0, 3, 1, 2).cpu().contiguous()


class DaliFeed:
    """Batches of images by drawn tables: (decode, resize,) crop, flip, normalise in one pipeline.

    Args:
        gather: rows (n,) → (n, C, s, s) uint8, e.g. of a bank; or the paths of a file split.
        side: of the images, pixels.
        channels: 1 or 3 of the images.
        batch: most images in a batch.
        pad: width of the black frame that crops come from, pixels.
        normaliser: mean and std: the result is (n, 3, s, s) normalised, grey repeated.  None:
            (n, C, s, s) in [0, 1].
        device: of the result.
        threads: CPU threads of the pipeline.
        prefetch: batches prepared ahead.
    """

    kind = "dali"

    def __init__(
        self, gather: Callable[[Tensor], Tensor] | Sequence[Path], *, side: int, channels: int,
        batch: int, pad: int = 0, normaliser: Normaliser | None, device: torch.device,
        threads: int = 1, prefetch: int = 2,
    ) -> None:  # fmt: skip
        self.gather, self.pad, self.device = gather, pad, device
        self.side, self.channels, self.normaliser = side, channels, normaliser
        self._gpu = gpu_index(device)
        self.runner = Runner(self._define, batch, device_id=self._gpu, threads=threads,
                             depth=prefetch)  # fmt: skip

    def batches(
        self, index: Iterable[Tensor], crop: Iterable[Tensor] | None = None,
        flip: Iterable[Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """A batch for every row table; see :class:`kiop_fast.data.loader.Feed`."""
        for made in self.runner.run(self._inputs(index, crop, flip)):
            yield made.to(torch.get_default_dtype())

    def _inputs(
        self, index: Iterable[Tensor], crop: Iterable[Tensor] | None, flip: Iterable[Tensor] | None
    ) -> Iterator[dict[str, Any]]:
        crops = None if crop is None else iter(crop)
        flips = None if flip is None else iter(flip)
        for rows in index:
            count = len(rows)
            mirror = torch.zeros(count) if flips is None else next(flips)
            named: dict[str, Any] = {"flip": mirror.to("cpu", torch.int32).numpy()}
            if self.pad:
                start = torch.zeros(count, 2) if crops is None else next(crops) - self.pad
                named["start"] = start.to("cpu", torch.int32).numpy()
            if callable(self.gather):
                images = self.gather(rows)
                named["images"] = images.cpu().numpy() if self._gpu is None else images
            else:
                paths = self.gather
                named["path"] = _path_arrays([paths[row] for row in rows.tolist()])
            yield named

    def _define(self) -> Any:
        from nvidia.dali import fn, types

        device = "cpu" if self._gpu is None else "gpu"
        if callable(self.gather):
            x = fn.external_source(
                name="images", device=device, layout="CHW", batch=True, no_copy=True
            )
        else:
            x = _decode(self.side, self.channels, self._gpu)
        flip = fn.external_source(name="flip", batch=True)
        if self.pad:  # on bytes: black, whatever the normaliser
            start = fn.external_source(name="start", batch=True)
            x = fn.slice(x, start=start, shape=[self.side, self.side], axis_names="HW",
                         out_of_bounds_policy="pad", fill_values=0)  # fmt: skip
        channels, mean, std = self.channels, (0.0,) * self.channels, (1.0,) * self.channels
        if self.normaliser is not None:
            mean, std = self.normaliser
            if channels == 1:
                x = fn.cat(x, x, x, axis_name="C")
        return fn.crop_mirror_normalize(
            x, mirror=flip, mean=[255 * m for m in mean], std=[255 * s for s in std],
            output_layout="CHW", dtype=types.FLOAT,
        )  # fmt: skip
