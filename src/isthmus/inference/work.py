"""What computing is declared to cost: the pieces of work that a clock times and a ledger counts,
and the costs that a method adapts to. All of it is modelled (`isthmus.inference.cost`), so it is
the same on the virtual clock and between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.inference import cost
from isthmus.inference.engine import Engine
from isthmus.inference.method import Costs
from isthmus.wire.clock import Work
from isthmus.wire.compact import FRAMING
from isthmus.wire.device import Device
from isthmus.wire.link import Link
from isthmus.wire.rate import Rate, finish

HALF = ("float16", "bfloat16")
SAMPLE = 1000
"""Bytes over which a rate that changes is averaged."""


def forward(
    engine: Engine,
    kind: str,
    lengths: Sequence[tuple[int, int]],
    *,
    rows: int | None = None,
    phase: str = "decode",
    session: int = 0,
    round: int = 0,
) -> Work:
    """One forward of texts, each (new tokens, tokens before them), as in `cost.forward`."""
    spent = cost.forward(engine.shape, lengths, rows)
    dtype = "float16" if engine.shape.dtype in HALF else "float32"
    return Work(spent.flops, kind, dtype, phase, spent.bytes, round, session)


def drafting(
    engine: Engine, kind: str, held: int, fed: int, count: int, session: int, round: int
) -> list[Work]:
    """Feed `fed` tokens after `held`, then draw `count`, one forward each; the tokens of a
    prompt are work of their own."""
    steps = [(1, held + fed + i) for i in range(count - 1)]
    works: list[Work] = []
    if held:
        steps.insert(0, (fed, held))
    else:
        works.append(
            forward(
                engine, "prefill", [(fed, 0)], rows=1, phase="prefill",
                session=session, round=round,
            )
        )  # fmt: skip
    if steps:
        all = forward(engine, kind, steps, rows=1, session=session, round=round)
        again = (len(steps) - 1) * engine.shape.weights  # each forward reads them
        works.append(replace(all, bytes=all.bytes + again))
    return works


def judging_seconds(engine: Engine, device: Device, drafted: int, context: int) -> float:
    """Seconds of one forward that judges so many tokens after a context."""
    work = forward(engine, "verify", [(drafted + 1, context)])
    return float(device.spend(work.flops, work.dtype, work.phase, work.bytes).seconds)


def declared(draft: Engine | None, device: Device, link: Link, context: int) -> Costs:
    """What a device declares about itself and its link, for texts of this length."""
    seconds = 0.0
    if draft is not None:
        work = forward(draft, "draft", [(1, context)])
        seconds = float(device.spend(work.flops, work.dtype, work.phase, work.bytes).seconds)
    up, down = (_second_a_byte(link.rates[way]) for way in ("up", "down"))
    framing = (FRAMING.size + 4) * (up + down)  # the envelope and the field `at`
    round = 2 * (link.latency + link.per_message) + framing
    return Costs(draft=seconds, up=up, down=down, round=round)


def _second_a_byte(rate: Rate) -> float:
    if isinstance(rate, int | float):
        return 8 / rate
    return float(finish(rate, 8 * SAMPLE, 0.0)) / SAMPLE
