"""One model at one party: what its sessions ask for waits, and is computed together.

Asking gives a `Pending` at once; the first `get()` of any of them computes all that was asked
until then, in as few forwards as possible. A row of logits or a drafted token is what it would
be for its session alone (up to the rounding of a batched matrix product).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isthmus.errors import InputError
from isthmus.inference.cost import shape_of
from isthmus.models.decode import Law, draw
from isthmus.models.kv import memory_of
from isthmus.models.memory import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Rows = Callable[[Tensor], Tensor]

FIXED = 64  # columns (tokens of the batch) that take as long as a forward's fixed costs, roughly


class Proposal(NamedTuple):
    """Drafted `ids` (int64 `[g]`) and the `rows` they were drawn from (float64 `[g, V]`)."""

    ids: Tensor
    rows: Tensor


class Pending(Generic[T]):
    """A value that is computed, with all else that waits, when it is first wanted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._value: Any = None
        self._error: Exception | None = RuntimeError("interrupted before it was computed")
        self.done = False

    def get(self) -> T:
        """The value. Raises the `InputError` of a request that could not be met."""
        if not self.done:
            self._engine.compute()
        if self._error is not None:
            raise self._error
        return self._value

    def settle(self, value: Any = None, error: Exception | None = None) -> None:
        """Set the value, or the error that `get` raises."""
        self._value, self._error, self.done = value, error, True


class _Asked(NamedTuple):
    """A request: ids to feed, and then `last` rows of logits, or `draws` drawn tokens."""

    pending: Pending[Any]
    slot: int
    ids: list[int]
    last: int = 1
    draws: int = 0
    law: Rows = Law()
    u: Tensor = torch.empty(0)


class Engine:
    """A model and its memory of many texts; texts live in slots as in `models.memory.Memory`.

    `vocab` and `context`: tokens there are, tokens a text may have; `shape`: what a forward costs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.memory = memory_of(model)
        self.vocab = int(model.config.get_text_config(decoder=True).vocab_size)
        self.context = self.memory.context
        self.shape = shape_of(model)
        self._asked: list[_Asked] = []
        self._held: dict[int, int] = {}  # lengths before what is being computed

    def open(self) -> int:
        """A slot for a new text."""
        return self.memory.open()

    def close(self, slot: int) -> None:
        """Give a slot back; what was asked for it is dropped (its `get` raises `InputError`)."""
        for asked in self._asked:
            if asked.slot == slot:
                asked.pending.settle(error=InputError("slot", slot, "an open one"))
        self._asked = [asked for asked in self._asked if asked.slot != slot]
        self.memory.close(slot)

    def length(self, slot: int) -> int:
        """How many tokens a slot holds, after what was asked for it."""
        self._catch_up(slot)
        return self.memory.length(slot)

    def crop(self, slot: int, length: int) -> None:
        """Forget what stands at position `length` and after, once what was asked is computed."""
        self._catch_up(slot)
        self.memory.crop(slot, length)

    def rows(self, slot: int, ids: Sequence[int], last: int) -> Pending[Tensor]:
        """Feed ids; the logits after the last `last` of them (`[last, V]`, as the model gives
        them, so that a law makes of them what it makes in plain decoding)."""
        return self._ask(slot, ids, last)

    def propose(
        self, slot: int, ids: Sequence[int], count: int, law: Rows, u: Tensor
    ) -> Pending[Proposal]:
        """Feed ids, then draw `count` tokens one after another, by `law` and u (float64 `[count]`).

        The memory then holds ids and the tokens drawn but the last. `law` turns logits `[n, V]`
        into probabilities and is asked once for all sessions whose laws are equal.
        """
        if len(u) != count or not count:
            raise InputError("u", f"{len(u)} numbers", f"{count or 1}, one for each token")
        hash(law)  # equal laws are found by it: a law without one fails here, alone
        return self._ask(slot, ids, 1, count, law, u.double())

    def compute(self) -> None:
        """Compute all that was asked; two requests for one slot one after the other."""
        while self._asked:
            wave: dict[int, _Asked] = {}
            for asked in self._asked:
                wave.setdefault(asked.slot, asked)
            taken = {id(asked) for asked in wave.values()}
            self._asked = [asked for asked in self._asked if id(asked) not in taken]
            # Neighbouring slots are read in place, so they stand side by side.
            checked = [asked for _, asked in sorted(wave.items()) if self._checked(asked)]
            try:
                self._wave(checked)
            except Exception as error:  # told to all who asked, not only to who came first
                for asked in checked:
                    if not asked.pending.done:
                        self._undo(asked, error)

    def _ask(self, slot: int, ids: Sequence[int], last: int, *more: Any) -> Pending[Any]:
        tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        asked = _Asked(Pending(self), slot, tokens, last, *more)
        self._asked.append(asked)
        return asked.pending

    def _catch_up(self, slot: int) -> None:
        if any(asked.slot == slot for asked in self._asked):
            self.compute()

    def _checked(self, asked: _Asked) -> bool:
        """Whether a request can be met; if not, it is settled with what is wrong."""
        try:
            n, held = len(asked.ids), self.memory.length(asked.slot)
            if asked.last < 1:
                raise InputError("last", asked.last, "1 or more")
            if n < asked.last:
                raise InputError("ids", f"{n} ids", f"{asked.last} or more")
            if min(asked.ids) < 0 or max(asked.ids) >= self.vocab:
                raise InputError("ids", asked.ids, f"0 to {self.vocab - 1}")
            stop = held + n + max(asked.draws - 1, 0)
            if stop > self.context:
                allowed = f"at most {self.context}, the model's context"
                raise InputError("text", f"{stop} tokens", allowed)
            self._held[asked.slot] = held
        except InputError as error:
            asked.pending.settle(error=error)
            return False
        return True

    def _wave(self, wave: list[_Asked]) -> None:
        """Compute checked requests, one for each slot, in the order of slots."""
        drafts: list[_Asked] = []
        logits: list[Tensor] = []
        for group in _grouped(wave):
            ids, lengths = left_padded([asked.ids for asked in group])
            last = max(asked.last for asked in group)
            found = self._fed([asked.slot for asked in group], ids, lengths, last)
            rows = found.clone()  # outside of inference mode
            for i, asked in enumerate(group):
                if not asked.draws:
                    asked.pending.settle(rows[i, -asked.last :])
                else:
                    drafts.append(asked)
                    logits.append(found[i, -1])
        if drafts:
            self._draft(drafts, torch.stack(logits))

    def _draft(self, asked: list[_Asked], logits: Tensor) -> None:
        """Draw token after token for all, from the logits `[b, V]` after their ids."""
        counts = [each.draws for each in asked]
        laws: dict[Rows, list[int]] = {}
        for i, each in enumerate(asked):
            laws.setdefault(each.law, []).append(i)
        u = pad_sequence([each.u for each in asked], batch_first=True)
        ids = torch.zeros(u.shape, dtype=torch.int64)
        rows = torch.zeros((*u.shape, self.vocab), dtype=torch.float64)
        live = list(range(len(asked)))
        with torch.inference_mode():
            for step in range(max(counts)):
                for law, who in list(laws.items()):
                    at = _index(who, len(asked))
                    try:
                        ids[at, step], rows[at, step] = _drawn(law, logits[at], u[at, step])
                    except Exception as error:  # a law is the asker's own: its failure too
                        del laws[law]
                        live = [i for i in live if i not in who]
                        for i in who:
                            self._undo(asked[i], error)
                live = [i for i in live if step + 1 < counts[i]]
                if not live:
                    break
                at = _index(live, len(asked))
                slots = [asked[i].slot for i in live]
                found = self._fed(slots, ids[at, step, None], [1] * len(live), 1)
                if len(live) == len(asked):
                    logits = found[:, -1]
                else:  # the others have drawn all they want; their rows are written beyond it
                    logits[at] = found[:, -1]
        for each, token, row, count in zip(asked, ids, rows, counts, strict=True):
            if not each.pending.done:
                each.pending.settle(Proposal(token[:count], row[:count]))

    def _fed(self, slots: list[int], ids: Tensor, counts: list[int], last: int) -> Tensor:
        """`Memory.extend`, its logits where chances and messages are: on the CPU."""
        return self.memory.extend(slots, ids, counts, last).cpu()

    def _undo(self, asked: _Asked, error: Exception) -> None:
        """Settle a request with an error, its text as it was before."""
        self.memory.crop(asked.slot, self._held[asked.slot])
        asked.pending.settle(error=error)


def _index(who: list[int], of: int) -> slice | Tensor:
    """Rows of a batch: all of them without a copy."""
    return slice(None) if len(who) == of else torch.tensor(who)


def _drawn(law: Rows, logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (int64 `[b]`) and the rows `[b, V]` they were drawn from."""
    if isinstance(law, Law) and law.greedy:
        tokens = logits.argmax(-1)
        rows = torch.zeros_like(logits, dtype=torch.float64)
        return tokens, rows.scatter_(-1, tokens[:, None], 1)
    rows = law(logits).double()
    return draw(rows, u), rows


def _grouped(wave: list[_Asked]) -> list[list[_Asked]]:
    """Requests that share a forward: the split that computes least, each forward costing `FIXED`
    columns besides its own, padding included."""
    longest = max((len(each.ids) for each in wave), default=0)
    if longest * len(wave) - sum(len(each.ids) for each in wave) <= FIXED:
        return [wave] if wave else []
    order = sorted(wave, key=lambda each: -len(each.ids))
    # least[i]: the columns of the first i, and where their last group begins.
    least = [(0, 0)]
    for i in range(1, len(order) + 1):
        least.append(min((least[j][0] + FIXED + len(order[j].ids) * (i - j), j) for j in range(i)))
    groups: list[list[_Asked]] = []
    end = len(order)
    while end:
        start = least[end][1]
        groups.append(sorted(order[start:end], key=lambda each: each.slot))
        end = start
    return groups
