"""An agent that reads an instruction and looks for the next step among the views around it.

The words pass a GRU; a decoder GRU takes in the step just made and what it looks at, attends to
the words and scores each neighbouring viewpoint by the view towards it. Recurrent encoder,
attention to views and words, bilinear scores: Fried et al., "Speaker-follower models for
vision-and-language navigation", NeurIPS 2018, arXiv:1806.02724 (widths and GRU: reconstructed).

All loops have fixed lengths, masks are added or multiplied, and the cells are linear layers, so
that the agent runs under `torch.vmap` and `torch.func.grad` with one set of weights per client.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus import seeds
from isthmus.models.nets import initialise
from isthmus.tasks.navigation.paths import pick

NEVER = -1e9
"""The score of what cannot be chosen."""

ANGLES = 5
"""Numbers beside the view: sine and cosine of the turn, sine of the slope, metres / 5, stop."""


class Cell(nn.Module):
    """A gated recurrent unit (Cho et al., EMNLP 2014) as two linear layers."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs, self.hidden = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, given: Tensor, h: Tensor) -> Tensor:
        """The next state `[b, H]`, from `given = self.inputs(x)` and the state before."""
        wide = h.shape[-1]
        gates, new = given.split([2 * wide, wide], -1)
        held, kept = self.hidden(h).split([2 * wide, wide], -1)
        reset, keep = torch.sigmoid(gates + held).chunk(2, -1)
        new = torch.tanh(new + reset * kept)
        return new + keep * (h - new)


class Agent(nn.Module):
    """`[b]` episodes -> scores `[b, steps, V]` of the next viewpoint along the agent's own walk.

    Layers: `words`, `encoder`, `bridge` (from the read instruction to the decoder's first state),
    `look` (attention to views), `decoder`, `attend` (attention to words), `join`, `head`.
    """

    def __init__(self, words: int, width: int, hidden: int, steps: int) -> None:
        super().__init__()
        word, view = hidden // 2, width + ANGLES
        self.steps = steps
        self.words = nn.Embedding(words, word)
        self.encoder = Cell(word, hidden)
        self.bridge = nn.Linear(hidden, hidden)
        self.look = nn.Linear(hidden, view)
        self.decoder = Cell(2 * view, hidden)
        self.attend = nn.Linear(hidden, hidden + word)
        self.join = nn.Linear(2 * hidden + word, hidden)
        self.head = nn.Linear(hidden, view)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each word in its place `[b, L, H + E]`, the mask `[b, L]`, the first state `[b, H]`."""
        embedded = self.words(tokens)
        given = self.encoder.inputs(embedded)
        h = torch.zeros_like(given[:, 0, : self.bridge.in_features])
        states = []
        for each in given.unbind(1):
            h = self.encoder(each, h)
            states.append(h)
        memory = torch.cat([torch.stack(states, 1), embedded], -1)
        real = (tokens > 0).to(embedded.dtype)
        last = pick(memory, ((tokens > 0).sum(1) - 1).clamp_min(0))[:, : h.shape[-1]]
        return memory, (1 - real) * NEVER, torch.tanh(self.bridge(last))

    def step(
        self, memory: Tensor, mask: Tensor, h: Tensor, taken: Tensor, around: Tensor, shut: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores `[b, C + 1]` of the candidates and the next state.

        `taken` `[b, F]` is the candidate chosen before (zeros at first), `around` `[b, C + 1, F]`
        the candidates, staying last, `shut` what is added to the scores of those that are none.
        """
        seen = _attended(self.look(h), around, shut)
        h = self.decoder(self.decoder.inputs(torch.cat([taken, seen], -1)), h)
        told = _attended(self.attend(h), memory, mask)
        joined = torch.tanh(self.join(torch.cat([told, h], -1)))
        return (around * self.head(joined)[:, None]).sum(-1) + shut, h

    def follow(self, tokens: Tensor, around: Tensor, shut: Tensor, action: Tensor) -> Tensor:
        """Scores `[b, P, C + 1]` along a given path: candidates `[b, P, C + 1, F]`, actions
        int64 `[b, P]` (any number where there is none)."""
        memory, mask, h = self.read(tokens)
        around = around.to(memory.dtype)
        chosen = action.clamp(0, around.shape[2] - 1)
        taken, scores = torch.zeros_like(around[:, 0, 0]), []
        for t in range(around.shape[1]):
            score, h = self.step(memory, mask, h, taken, around[:, t], shut[:, t])
            scores.append(score)
            taken = pick(around[:, t], chosen[:, t])
        return torch.stack(scores, 1)

    def forward(
        self,
        tokens: Tensor,
        start: Tensor,
        heading: Tensor,
        positions: Tensor,
        neighbours: Tensor,
        views: Tensor,
    ) -> Tensor:
        """Walk greedily for `steps` steps; once the agent stays, it stays."""
        memory, mask, h = self.read(tokens)
        place, ended, rows = start, torch.zeros_like(mask[:, :1]), []
        taken = torch.zeros_like(memory[:, 0, :1]).expand(-1, views.shape[-1] + ANGLES)
        spare = positions.shape[1]
        for _ in range(self.steps):
            around, shut = candidates(place, heading, positions, neighbours, views)
            around = around.to(memory.dtype)
            score, h = self.step(memory, mask, h, taken, around, shut.to(memory.dtype))
            doors = pick(neighbours, place)
            score = torch.cat([score[:, :-1] + ended * NEVER, score[:, -1:]], 1)
            where = torch.cat([torch.where(doors < 0, spare, doors), place[:, None]], 1)
            row = torch.full_like(score[:, :1], NEVER).expand(-1, spare + 1)
            row = row.scatter(1, where, score)[:, :spare]
            after = row.argmax(-1)
            ended = torch.maximum(ended, (after == place)[:, None].to(ended.dtype))
            taken = pick(around, (where == after[:, None]).int().argmax(1))
            heading = torch.where(after == place, heading, bearing(positions, place, after))
            place = after
            rows.append(row)
        return torch.stack(rows, 1)


def _attended(query: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """The mean of `memory` `[b, n, k]` under softmax(memory . query / sqrt k + mask): `[b, k]`."""
    score = (memory * query[:, None]).sum(-1) / memory.shape[-1] ** 0.5 + mask
    return (torch.softmax(score, -1)[..., None] * memory).sum(1)


def bearing(positions: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The headings `[b]` from viewpoints a to viewpoints b (int64 `[b]`)."""
    way = pick(positions, b) - pick(positions, a)
    return torch.atan2(way[:, 0], way[:, 1])


def candidates(
    place: Tensor, heading: Tensor, positions: Tensor, neighbours: Tensor, views: Tensor
) -> tuple[Tensor, Tensor]:
    """What can be chosen at `place` `[b]` under `heading` `[b]`: staying is the last candidate.

    Gives features `[b, C + 1, F]` and what to add to their scores `[b, C + 1]` (0 or `NEVER`).
    `positions` `[b, V, 3]`, `neighbours` int64 `[b, V, C]` (-1: none), `views` `[b, V, C, W]`.
    """
    doors = pick(neighbours, place)
    there = torch.take_along_dim(positions, doors.clamp_min(0)[..., None], 1)
    x, y, z = (there - pick(positions, place)[:, None]).unbind(-1)
    flat = torch.hypot(x, y)
    turn = torch.atan2(x, y) - heading[:, None]
    angles = [turn.sin(), turn.cos(), torch.atan2(z, flat).sin(), flat / 5, torch.zeros_like(x)]
    real = (doors >= 0).to(views.dtype)[..., None]
    around = torch.cat([pick(views, place), torch.stack(angles, -1)], -1) * real
    stay = torch.zeros_like(around[:, :1])
    stay = torch.cat([stay[..., 1:], torch.ones_like(stay[..., :1])], -1)
    shut = torch.cat([(1 - real[..., 0]) * NEVER, torch.zeros_like(real[:, :1, 0])], 1)
    return torch.cat([around, stay], 1), shut


def new_agent(words: int, width: int, hidden: int, steps: int, seed: int) -> Agent:
    """A new agent whose weights come from `seed` (embeddings: standard normal)."""
    with torch.device("meta"):
        made = Agent(words, width, hidden, steps)
    made.to_empty(device="cpu")
    for name, layer in made.named_children():
        if isinstance(layer, nn.Embedding):
            with torch.no_grad():
                layer.weight.normal_(generator=seeds.generator(seed, "init", name))
        else:
            initialise(layer, seeds.key(seed, name))
    return made
