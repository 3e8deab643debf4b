"""A CUDA device where there is none: its tensors lie in host memory and say ``cuda:0``.

Code written for a GPU takes its GPU paths on such tensors and gets the right numbers: capturable
optimisers, Triton kernels (in Triton's interpreter), streams, graphs that are captured and
replayed.  What a GPU refuses is refused: mixing devices; waiting for the GPU, or copying from
pageable memory, while a graph is captured.  A replay that would read memory that was given back
since is an error.  Memory is counted, by pool.

It tells nothing about speed, about how a GPU rounds, or about what several streams do at once; and
a module moved to it gets new parameters, where on a GPU they stay the same objects.

``pytest -p emulated_cuda`` puts it in the place of torch's CUDA for the whole process.
"""

from emulated_cuda.calls import PythonCalls
from emulated_cuda.card import CARD, CudaTensor
from emulated_cuda.names import install

__all__ = ["CARD", "CudaTensor", "PythonCalls", "install"]


def pytest_configure() -> None:
    """As a plugin: before any test module asks whether there is a GPU."""
    install()
