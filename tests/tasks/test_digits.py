from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from isthmus.errors import InputError
from isthmus.tasks.digits import Digits


def test_the_items_are_scikit_learns_digits() -> None:
    splits = Digits().synthesise(0)
    assert [len(part) for part in splits[:3]] == [1257, 180, 360]
    rows = torch.cat([part.columns["x"].reshape(len(part), -1) for part in splits[:3]])
    classes = torch.cat([part.columns["y"] for part in splits[:3]])
    x, y = load_digits(return_X_y=True)
    ours = sorted(map(tuple, torch.cat([rows * 16, classes[:, None]], 1).tolist()))
    assert ours == sorted(map(tuple, np.column_stack([x, y]).tolist()))
    assert splits.train.columns["x"].dtype == torch.float32


def test_writers_are_thirteen_blocks_of_lines() -> None:
    splits = Digits().synthesise(0)
    groups = [group for part in splits[:3] for group in part.group]
    sizes = [groups.count(group) for group in sorted(set(groups))]
    assert len(sizes) == 13 and set(sizes) == {138, 139}
    parts = Digits().partition(splits.train, 13, "natural")
    assert all(len({splits.train.group[i] for i in part}) == 1 for part in parts)


def test_tiny_is_a_third() -> None:
    assert sum(len(part) for part in Digits().synthesise(0, "tiny")[:3]) == 600


def test_the_larger_file_joins_when_it_is_there(tmp_path) -> None:
    task = Digits()
    path = task.export_real(tmp_path)
    assert path == tmp_path / "digits" / "optdigits.tes"
    assert len(path.read_text().splitlines()[0].split(",")) == 65
    (tmp_path / "digits" / "optdigits.tra").write_bytes(path.read_bytes())
    splits = task.load(tmp_path)
    groups = {group for part in splits[:3] for group in part.group}
    assert sum(len(part) for part in splits[:3]) == 2 * 1797 and len(groups) == 43


def test_bad_files_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"a folder that holds digits/optdigits\.tes"):
        Digits().load(tmp_path)
    file = Digits().export_real(tmp_path)
    file.write_text("1,2,3\n")
    with pytest.raises(InputError, match=r"optdigits\.tes: 3 columns given, allowed: lines of 65"):
        Digits().load(tmp_path)
    file.write_text("1,2,x\n")
    with pytest.raises(InputError, match=r"optdigits\.tes: .*allowed: lines of 65 integers"):
        Digits().load(tmp_path)


def test_the_convolution_net_takes_the_same_items() -> None:
    task = Digits()
    inputs = task.inputs(task.synthesise(0, "tiny").test.take(range(3)).columns)
    assert task.predict(task.build("paper"), inputs).shape == (3, 10)
