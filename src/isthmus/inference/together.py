"""Device and edge in one process, on the virtual clock.

Every message is really encoded, crosses a link, is decoded on the far side and entered in the
ledger; what takes time is the link and the declared devices, not this machine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isthmus import seeds
from isthmus.errors import InputError
from isthmus.inference.drafting import PLAIN, Drafting
from isthmus.inference.edge import Edge, Limits
from isthmus.inference.engine import Engine
from isthmus.inference.messages import fingerprint
from isthmus.inference.method import Costs, Method, method_of
from isthmus.inference.rehearsal import Played, Rehearsal
from isthmus.inference.session import Fallback, Finish, Round, Session, Token
from isthmus.inference.work import declared
from isthmus.models.decode import Law
from isthmus.models.language import Language
from isthmus.wire.clock import Clock, Event
from isthmus.wire.device import Device
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

Listen = Callable[[int, Token], None]


@dataclass(frozen=True)
class Reply:
    """What one prompt was answered: tokens and rounds, the seconds until the last token was
    there, why it ended (`stop`, `length` or `error`) and what went wrong, if anything did."""

    prompt: list[int]
    tokens: list[Token]
    rounds: list[Round]
    seconds: float
    finished: Finish
    problem: str

    @property
    def ids(self) -> list[int]:
        """The new tokens."""
        return [token.id for token in self.tokens]

    @classmethod
    def of(cls, session: Session, began: float = 0.0) -> Reply:
        """What a session has come to, its times counted from when it began."""
        tokens = [token._replace(t=token.t - began) for token in session.tokens]
        rounds = [round._replace(t=round.t - began) for round in session.rounds]
        seconds = session.seconds - began
        return cls(session.prompt, tokens, rounds, seconds, session.finished, session.problem)


def decode(
    target: Language | None,
    draft: Language | None,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    method: Method | type[Method] | str = "dssd",
    settings: Mapping[str, Any] | None = None,
    law: Law = PLAIN,
    max_new_tokens: int = 64,
    seed: int = 0,
    link: Link | str | None = None,
    device: Device | str = "phone",
    edge: Device | str = "edge-server",
    stop: Sequence[int] | None = None,
    fallback: Fallback = "none",
    ledger: Ledger | None = None,
    listen: Listen | None = None,
) -> list[Reply]:
    """Answer prompts (ids) by `target` at an edge and `draft` on devices, one session each.

    Device i is the party `device/i` with session i + 1, the key `seeds.keys(seeds.key(seed), [i])`
    and its own copy of `link` (a profile's name or settings; ideal without one). `stop` are the
    tokens that end a text, the target's own unless given. `listen(i, token)` hears every token
    when its device has it. Raises `InputError` for what cannot be decoded.
    """
    drafting = Engine(draft.model) if draft is not None else None
    judging = Engine(target.model) if target is not None else None
    ours, engine = target or draft, judging or drafting
    if ours is None or engine is None:
        raise InputError("target", "none", "a model at the edge, on the device, or both")
    vocab = engine.vocab
    method = method_of(method, vocab, settings)
    if method.edge and judging is None:
        raise InputError("target", "none", f"a model at the edge, for {method.catalogue_name}")
    if drafting is not None and drafting.vocab != vocab:
        raise InputError("draft", f"{drafting.vocab} words", f"{vocab}, as the target has")
    link = Link.parse(link) if isinstance(link, str) else link or Link()
    weak = Device.named(device) if isinstance(device, str) else device
    keys = keys_of(seed, len(prompts))
    mark = fingerprint((draft or ours).tokenizer, vocab)
    clock = Clock(ledger)
    rehearsal = None
    if judging is not None and drafting is not None and method.drafts and method.edge:
        rehearsal = Rehearsal(judging, method)
    sessions: list[Session] = []
    for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        name, number, half = f"device/{i}", i + 1, Drafting
        costs = declared(drafting, weak, link, len(prompt))
        if rehearsal is not None:
            half = partial(Played, rehearsal=rehearsal, who=(name, number))
        sessions.append(
            Session(
                method, prompt, draft=drafting, name=name, number=number, law=law, key=key,
                max_new_tokens=max_new_tokens, stop=ours.stop if stop is None else stop,
                fingerprint=mark, costs=costs, fallback=fallback,
                timeout=_patience(method, link, costs), listen=heard_by(listen, i), half=half,
            )
        )  # fmt: skip
    if judging is not None and method.edge:
        strong = Edge(
            judging, device=edge, fingerprint=fingerprint(ours.tokenizer, vocab),
            methods={method.catalogue_name: type(method)}, judging=rehearsal,
            limits=Limits(len(sessions), 1, math.inf),
        )  # fmt: skip
        clock.join(strong, strong.device)
    for i, session in enumerate(sessions):
        clock.join(session, weak)
        clock.connect(session.name, "edge", copied(link, i))
        clock.at(0.0, session, Event("begin"))
    with torch.inference_mode():
        clock.run()
    return [Reply.of(session) for session in sessions]


def _patience(method: Method, link: Link, costs: Costs) -> float | None:
    """Seconds after which a device asks again: more than any message takes, a minute for the
    edge included. Without losses there is nothing to wait for in vain."""
    if not link.loss or not method.edge:
        return None
    bytes = method.up.max_bytes * costs.up + method.down.max_bytes * costs.down
    return 60.0 + costs.round + bytes


def keys_of(seed: int, count: int) -> list[int]:
    """The keys of `count` sessions of a seed, those of `isthmus.models.decode`."""
    return seeds.keys(seeds.key(seed), range(count)).tolist()


def heard_by(listen: Listen | None, index: int) -> Callable[[Token], None] | None:
    """The listener of one session of several."""
    return None if listen is None else lambda token: listen(index, token)


def copied(link: Link, index: int) -> Link:
    """A link of the same profile with queues and losses of its own."""
    own = copy.deepcopy(link)
    own.seed = link.seed + index
    own.restore({"free": {"up": 0.0, "down": 0.0}, "count": {"up": 0, "down": 0}})
    return own
