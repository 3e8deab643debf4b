"""Loading that cannot work says why; without DALI everything else still does."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from loading_data import BOTH, DALI, INFO, TORCH, waves

from kiop_fast.config import LoadingConfig
from kiop_fast.data import DatasetInfo, FileBank, FileSplit, dali, open_loader
from kiop_fast.data.files import undecodable
from kiop_fast.data.loader import uses_dali
from kiop_fast.errors import DataError

pytest.importorskip("nvidia.dali")


@BOTH
def test_a_file_that_breaks_later_is_named(files: FileSplit, loading: LoadingConfig) -> None:
    from dataclasses import replace

    loader = open_loader(files, INFO, batch=4, loading=replace(loading, memory_gb=0))
    assert len(list(loader.epoch(0))) == 3
    whole = files.paths[7].read_bytes()
    files.paths[7].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1 image file does not decode(.|\n)*07\.png"):
        list(loader.epoch(0))
    files.paths[7].write_bytes(whole)
    assert len(list(loader.epoch(1))) == 3  # the loader goes on
    files.paths[7].unlink()
    skip = replace(loading, memory_gb=0, undecodable="skip")
    with pytest.warns(UserWarning, match=r"skipped 1 image files .*07\.png"):
        rest = open_loader(files, INFO, batch=4, last="keep", loading=skip)
    assert rest.size == 11
    assert sum(len(x) for x, _ in rest.epoch(0)) == 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="here DALI can start on a GPU")
def test_files_are_not_blamed_where_dali_cannot_start(files: FileSplit) -> None:
    decoder = dali.DaliDecoder(24, 3, 12, device_id=0, threads=1)
    with pytest.raises(DataError, match="DALI cannot start") as error:
        undecodable(decoder, list(files.paths))
    assert "loader=torch" in str(error.value)
    assert re.search(r"got: .*CUDA", str(error.value))


def test_bank_of_files_reads_only_what_is_asked(files: FileSplit) -> None:
    bank = FileBank(files, TORCH)
    everything = files.decoded(TORCH).images
    assert torch.equal(bank.spread(4), everything[[0, 3, 6, 9]])
    assert torch.equal(bank.spread(100), everything)
    assert len(bank) == 12


def test_arguments_that_are_refused() -> None:
    with pytest.raises(DataError, match="no batch"):
        open_loader(waves(3), INFO, batch=4, loading=TORCH)
    for wrong in ({"last": "repeat"}, {"shard": (2, 2)}, {"shard": (-1, 2)}):
        with pytest.raises(DataError, match="last batch or shard"):
            open_loader(waves(3), INFO, batch=2, loading=TORCH, **wrong)  # type: ignore[arg-type]


def test_auto_takes_dali_for_what_lies_on_disk(files: FileSplit) -> None:
    auto, cifar = LoadingConfig(), DatasetInfo("cifar10", 32, 3, ("a",))
    assert uses_dali(auto, cifar, waves(1))
    assert uses_dali(auto, INFO, files)
    assert not uses_dali(auto, INFO, waves(1))
    assert uses_dali(DALI, INFO, waves(1))
    assert not uses_dali(TORCH, cifar, files)


WITHOUT_DALI = """
    import sys, warnings
    from pathlib import Path

    class NoDali:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("nvidia.dali"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, NoDali())
    from PIL import Image
    import kiop_fast.pipeline
    from kiop_fast.config import LoadingConfig, PretrainConfig
    from kiop_fast.data import dataset, open_loader
    from kiop_fast.errors import DataError
    from kiop_fast.pretrain import pretrain

    root = Path(sys.argv[1])
    for i in range(20):
        (root / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        file = root / "pictures" / "ab"[i % 2] / f"{i}.png"
        Image.new("RGB", (20, 17), (200 * (i % 2), 5 * i, 90)).save(file)
    data = f"folder:{root / 'pictures'}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = PretrainConfig(data=data, side=16, epochs=1, batch=4)
        pretrain(config, root / "m.safetensors")
        train = dataset(data).train(16)
        loader = open_loader(train, dataset(data).info, batch=2)
        assert loader.kind == "torch" and len(list(loader.epoch(0))) == 8
    assert ["DALI is not installed" in str(w.message) for w in said] == [True], said
    try:
        open_loader(train, dataset(data).info, batch=2, loading=LoadingConfig(loader="dali"))
    except DataError as error:
        assert "pip install nvidia-dali" in str(error), error
    else:
        raise SystemExit("no error")
"""


def test_without_dali_everything_imports_trains_and_reads(tmp_path: Path) -> None:
    """What is missing is said once, and asking for it by name is an error."""
    program = textwrap.dedent(WITHOUT_DALI)
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
