"""A task of your own: a module and data, here a spiral of three arms.

isthmus check examples/own_task.py:spiral
isthmus train --task examples/own_task.py:spiral --partition dirichlet:0.5
"""

import torch
from torch import nn

from isthmus.tasks import Task


def spiral() -> Task:
    """Points `[2]` and the arm each lies on, in turn; the last 150 of 900 are for testing."""
    y = torch.arange(900) % 3
    radius = torch.linspace(0.1, 1.0, 900)
    angle = 4.0 * radius + 2.1 * y
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Task.of(
        lambda: nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3)),
        train=(x[:750], y[:750]),
        test=(x[750:], y[750:]),
        lr=0.5,
        name="spiral",
    )
