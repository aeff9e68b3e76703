from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.errors import InputError
from isthmus.tasks import metrics
from isthmus.tasks.own import find

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4))
Y = np.array(["cat", "dog", "eel"])[np.arange(30) % 3]


def test_npz_with_given_halves(tmp_path) -> None:
    path = tmp_path / "two.npz"
    pictures = RNG.integers(0, 256, (10, 5, 5), dtype=np.uint8)
    np.savez(
        path,
        x_train=pictures,
        y_train=np.array([3, 5] * 5),
        x_test=pictures[:2],
        y_test=np.array([5, 9]),
        group_train=np.array(["a", "b"] * 5),
    )
    task = find(str(path), hidden=7)
    splits = task.synthesise()
    assert splits.train.columns["x"].max() <= 1.0 and splits.test.columns["y"].tolist() == [1, 2]
    np.testing.assert_allclose(splits.test.columns["x"], pictures[:2] / 255.0, rtol=1e-6)
    model = task.build(seed=1)
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 25), (7,), (3, 7), (3,)]
    assert set(splits.train.group) == {"a", "b"} and task.card.name == "two"
    outputs = task.predict(model, task.probe())
    assert outputs.shape == (1, 3)


def test_npz_without_halves_holds_out_a_fifth(tmp_path) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, x=X, y=Y, group=np.arange(30))
    splits = find(str(path)).synthesise()
    assert [len(part) for part in splits[:3]] == [22, 2, 6]
    rows = torch.cat([part.columns["x"] for part in splits[:3]])
    np.testing.assert_allclose(np.sort(rows.numpy(), axis=0), np.sort(X, axis=0), rtol=1e-6)
    where = {float(np.float32(X[i, 0])): i for i in range(30)}
    for part in (splits.train, splits.val):
        for i in range(len(part)):
            origin = where[float(part[i]["x"][0])]
            assert part[i]["y"] == origin % 3 and part[i]["group"] == str(origin)


def test_csv_of_classes_and_of_numbers(tmp_path) -> None:
    path = tmp_path / "table.csv"
    lines = [
        f"{a},{y},{b},h{i % 2}" for i, (a, b, y) in enumerate(zip(X[:, 0], X[:, 1], Y, strict=True))
    ]
    path.write_text("\n".join(["age,label,size,owner", *lines]) + "\n")
    task = find(str(path))
    splits = task.synthesise()
    train = torch.cat([splits.train.columns["x"], splits.val.columns["x"]])
    assert train.shape == (24, 2) and set(splits.train.group) == {"h0", "h1"}
    torch.testing.assert_close(train.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(2))
    assert isinstance(task.metric, metrics.Accuracy)

    path.write_text("\n".join(["a,b", *(f"{i},{i / 2 + 0.25}" for i in range(20))]))
    numbers = find(str(path))
    assert isinstance(numbers.metric, metrics.Regression)
    assert numbers.predict(numbers.build(), numbers.probe()).shape == (1, 1)
    assert set((numbers.synthesise().test.columns["y"] * 4 % 2).tolist()) == {1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "bad.csv line 3: 1 cells given, allowed: 2 cells"),
        ("a,b,y\n1,2,0\n3,x,1\n", "bad.csv line 3, column b: x given, allowed: a number"),
        ("a,b\n", "2 columns, 0 rows given"),
    ],
)
def test_bad_tables(tmp_path, text, message) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        find(str(path))


def test_bad_archives(tmp_path) -> None:
    with pytest.raises(InputError, match="an existing"):
        find(str(tmp_path / "none.npz"))
    path = tmp_path / "bad.npz"
    np.savez(path, x_train=X, y_train=Y, x_test=X)
    with pytest.raises(InputError, match="no array y_test given"):
        find(str(path))
    np.savez(path, z=X)
    with pytest.raises(InputError, match="z given, allowed: x and y"):
        find(str(path))
    np.savez(path, x=X, y=np.array([{}] * 30, dtype=object))
    with pytest.raises(InputError, match="arrays without objects"):
        find(str(path))
