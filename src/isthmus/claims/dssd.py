"""DSSD: verification is split, so that scalars go up and one row comes down.

Paper (arXiv 2507.12000): where speculative decoding between a device and an edge sends a row of
the vocabulary up for every drafted token, DSSD sends a scalar each and at most one row down. The
latency falls, the quality stays, and it does better than the methods before it (the abstract
gives no figure).

Here: the embedded pair (V = 2048), 64 tokens after 32 of held-out text, drafts of 4; uplink
1 Mbit/s, a tenth of the downlink, a round trip of 20 ms, temperature 0.7 and the 10 largest (the
defaults of the authors' code); devices slowed until a draft takes 0.5 ms and a verification
7.1 ms. With the 32,000 words of the paper's models the same holds at 16 times the rates.

Thresholds: over five seeds DSSD had 4.8 times the tokens per second of full rows, also at
temperature 1 without truncation (more than 2 asked, half of the gap would be 2.9); 8.5 at 0.5 and
1.7 at 5 Mbit/s. A round took the time of the formula to within 1 % (5 % asked). A sampler is
exact at p > 1e-3 of a chi-square test. That DSSD does better than every method before it is not
checked: over five seeds it had 1.06 to 1.07 times the tokens per second of TK-SLT with K = 32
(1.3 to 1.4 at temperature 1), but the total of bytes is TK-SLT's to win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.bench.serving import Served, pair, prompts, serve, timed
from isthmus.claims.claim import Check, Progress
from isthmus.claims.tk_slt import fit
from isthmus.inference.length import tokens
from isthmus.inference.method import Method, method_of
from isthmus.inference.together import decode
from isthmus.models.decode import Law
from isthmus.report import units
from isthmus.wire.compact import FRAMING
from isthmus.wire.link import Link

V, GAMMA, TEXTS = 2048, 4, 16
UP, DOWN, LATENCY = 1e6, 1e7, 10e-3
DRAFT, VERIFY = 0.5e-3, 7.1e-3
LAW = Law(0.7, top_k=10)
WORDS, ALPHA = 32000, 0.8
"""The vocabulary and the acceptance of the table of bytes."""
METHODS: dict[str, dict[str, Any]] = {
    "full-row": {"gamma": GAMMA},
    "tk-slt": {"gamma": GAMMA, "adapt": False},
    "dssd": {"gamma": GAMMA},
}


def claim(progress: Progress) -> list[Check]:
    """Latency, the law, and what crosses."""
    texts = prompts(TEXTS)
    link, where = Link(up=UP, down=DOWN, latency=LATENCY), timed(DRAFT, VERIFY)
    served: dict[str, Served] = {}
    for name, settings in METHODS.items():
        progress(name)
        served[name] = serve(name, link, texts, where, settings, law=LAW)
    progress("exactness")
    return [
        faster(served),
        timing(served["dssd"], link),
        same(texts),
        exact(("fp16", "10", "3")),
        nothing_wide(served["dssd"]),
        crossed(served),
        table(),
    ]


def faster(served: dict[str, Served]) -> Check:
    """Tokens per virtual second beside full rows, and beside TK-SLT for information."""
    speeds = {name: each.tokens / each.seconds for name, each in served.items()}
    ratio = speeds["dssd"] / speeds["full-row"]
    here = (
        f"{ratio:.1f} times the tokens per second of full rows (more than 2 asked), "
        f"{speeds['dssd'] / speeds['tk-slt']:.2f} times those of TK-SLT with K = 32; "
        f"acceptance {served['dssd'].acceptance:.2f}, {served['full-row'].acceptance:.2f} and "
        f"{served['tk-slt'].acceptance:.2f}"
    )
    return Check("lower latency than full rows", "rows up become one row down", here, ratio > 2)


def timing(served: Served, link: Link) -> Check:
    """The mean time of a round after the first beside the formula, by acceptance alone."""
    seconds = sum(reply.rounds[-1].t - reply.rounds[0].t for reply in served.replies)
    measured = seconds / sum(len(reply.rounds) - 1 for reply in served.replies)
    rejected, id = 1 - served.acceptance**GAMMA, 2
    up, down = GAMMA * (2 + id) + id, rejected * 2 * V + (1 - rejected) * id
    formula = (
        GAMMA * DRAFT + 8 * up / UP + VERIFY + 8 * down / DOWN + 2 * link.latency
    )  # fmt: skip
    off = measured / formula - 1
    here = f"{measured * 1e3:.1f} ms a round, {formula * 1e3:.1f} by the formula (5 % asked)"
    return Check("a round takes what the formula says", "latency model", here, abs(off) < 0.05)


def same(texts: Sequence[Tensor]) -> Check:
    """The tokens of full-row speculation, under the same chances and the same rounding."""
    streams = [
        [
            reply.ids
            for reply in decode(
                *pair(), texts, method=method, settings={"gamma": GAMMA, **more}, stop=(), link="5g"
            )
        ]
        for method, more in (
            ("dssd", {}),
            ("full-row", {"row": "fp16"}),
            ("tk-slt", {"row": "fp16", "adapt": False}),
        )
    ]
    equal = sum(a == b for a, b in zip(streams[0], streams[1], strict=True))
    other = sum(a != b for a, b in zip(streams[0], streams[2], strict=True))
    here = f"{equal} of {len(texts)} texts equal full-row's; {other} differ from TK-SLT's"
    holds = equal == len(texts) and other > 0
    return Check("the tokens of full-row speculation", "unchanged quality", here, holds)


def exact(grids: Sequence[str]) -> Check:
    """The first token of many sessions against the target's law, for several widths of s."""
    found = {grid: fit(method_of("dssd", V, {"gamma": 1, "grid": grid}), 1000) for grid in grids}
    told = ", ".join(f"{p:.2g} ({grid})" for grid, p in found.items())
    here = f"p of a chi-square, by the rounding of the scalars: {told} (bits, or fp16)"
    return Check(
        "the target's law, at any width", "unchanged quality", here, min(found.values()) > 1e-3
    )


def nothing_wide(served: Served) -> Check:
    """No row of the vocabulary goes up: neither can one by the schema, nor did one by bytes."""
    up = method_of("dssd", V).up
    wide = [name for name, spec in (up.tensors or {}).items() if len(spec.shape) > 1]
    largest = max(each.up for reply in served.replies for each in reply.rounds[1:])
    # ids and scalars of two bytes, the text's last token, `at`, and two sizes of tensors
    most = FRAMING.size + 4 + 2 + GAMMA * 4 + 2
    bits = (V - 1).bit_length()
    formula = sum(
        (each.drafted * (16 + bits) + bits + 7) // 8
        for reply in served.replies
        for each in reply.rounds
    )
    here = (
        f"the largest offer has {largest} B ({most} for {GAMMA} scalars), a row has {2 * V}; "
        f"on paper {served.up_values} B = the sum of g (2 + id) + id"
    )
    holds = not wide and largest == most and served.up_values == formula
    return Check("no row of the vocabulary goes up", "scalars only", here, holds)


def crossed(served: dict[str, Served]) -> Check:
    """Bytes a token in both directions, and the rows that came down: one a rejection."""
    own = served["dssd"]
    rejections = sum(each.accepted < each.drafted for reply in own.replies for each in reply.rounds)
    verdicts = sum(len(reply.rounds) for reply in own.replies)
    # `at`, the count, the token and the row's size; a row and one byte more for its size
    exactly = verdicts * (FRAMING.size + 4 + 1 + 2 + 1) + rejections * (2 * V + 1)
    told = ", ".join(
        f"{name} {each.up / each.tokens:.0f} up {each.down / each.tokens:.0f} down"
        for name, each in served.items()
    )
    here = f"B a token: {told}; {rejections} rejections of {verdicts} rounds, as many rows down"
    holds = own.down == exactly and own.up < 0.01 * served["full-row"].up
    return Check("the uplink becomes one downlink row", "one row down", here, holds)


def table() -> Check:
    """Bytes a token on paper for the paper's vocabulary, from the methods' own count."""
    methods = {name: method_of(name, WORDS, settings) for name, settings in METHODS.items()}
    emitted, all = tokens(ALPHA, GAMMA), ALPHA**GAMMA
    found: dict[str, tuple[str, str]] = {}
    for name, method in methods.items():
        up, rejected, accepted = on_paper(method)
        down = (1 - all) * rejected + all * accepted
        found[name] = units.bytes_text(up / emitted), units.bytes_text(down / emitted)
    told = ", ".join(f"{name} {up} up {down} down" for name, (up, down) in found.items())
    here = f"a token, {WORDS:,} words, {GAMMA} drafted, acceptance {ALPHA:g}: {told}"
    ups = [up for up, _ in found.values()]
    holds = ups == ["76.2 kB", "150 B", "5 B"] and found["dssd"][1] == "11.2 kB"
    return Check("the table of bytes", "76.2 kB, 150 B and 5 B up; 11.2 kB down", here, holds)


def on_paper(method: Method) -> list[int]:
    """Bytes of an offer of four tokens, of a verdict that rejects and of one that accepts all."""
    even = torch.full((GAMMA + 1, method.vocab), 1 / method.vocab, dtype=torch.float64)
    other = even.clone()
    other[:, 0] = 0.0
    never, half = torch.zeros(2, GAMMA + 1, dtype=torch.float64) + torch.tensor([[0.0], [0.5]])
    offer, _ = method.offer(9, 0, torch.arange(GAMMA), even[:GAMMA], never[:GAMMA])
    verdicts = [method.judge(rows, offer, never, half).verdict for rows in (other, even)]
    return [method.values(message) for message in (offer, *verdicts)]
