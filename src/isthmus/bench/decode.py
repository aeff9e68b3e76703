"""Split inference with the embedded pair: what each method sends, accepts and takes.

On the virtual clock: one device alone with an edge, 64 new tokens after 32 of held-out text at
temperature 1, over a link with 100 Mbit/s down and 3 ms each way unless a figure says otherwise.
The devices are a phone and an edge server; as the embedded models are far smaller than what is
served from an edge, the same is shown for devices slowed as if the models had 68 million and 7
billion parameters. What follows for other uplink rates and latencies is in closed form
(`isthmus.bench.serving`), but for lengths that adapt to the link.

On this machine: CPU time of one thread, the median over turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from isthmus.bench.figure import Figure, at_least, at_most, ratio, turns_of
from isthmus.bench.serving import (
    PARTS,
    Place,
    Served,
    as_embedded,
    as_large,
    break_even,
    pair,
    prompts,
    serve,
)
from isthmus.inference.together import decode
from isthmus.models import decode as plain
from isthmus.models import language
from isthmus.models.decode import Law
from isthmus.models.kv import memory_of
from isthmus.wire.link import Link

TEXTS, NEW, GAMMA = 16, 64, 4
METHODS: dict[str, dict[str, Any]] = {
    "cloud-only": {},
    "device-only": {},
    "full-row": {"gamma": GAMMA},
    "tk-slt": {"gamma": GAMMA, "adapt": False},
    "dssd": {"gamma": GAMMA},
}
MEGA = 1e6
RATES = (0.1, 0.5, 1.0, 5.0, 20.0, 100.0)
UP, DOWN, LATENCY = 5 * MEGA, 100 * MEGA, 3e-3
LATENCIES = (0.0, 0.2e-3, 1e-3, 3e-3, 10e-3, 30e-3)
NEAR = 0.2e-3
"""The latency of an edge in the same building, at which the goal over full rows is set."""

OVER_FULL_ROW, PLAIN, ASSISTED, CONCURRENT, SESSIONS = 10.0, 1.05, 1.0, 6.0, 32
SLOWER = "slower than cloud-only here"
OTHER = "the draft's law, not the target's"


def figures(
    texts: int = TEXTS, new: int = NEW, turns: int = 20, sessions: int = SESSIONS
) -> list[Figure]:
    """All figures: what crosses, the virtual time, and the time of this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out: list[Figure] = []
        small = _served(as_embedded(), texts, new)
        large = _served(as_large(), texts, new)
        out += _crossing(small)
        for title, place, served in (
            ("the embedded models", as_embedded(), small),
            ("as if of 68 M and 7 B parameters", as_large(), large),
        ):
            out += _time(title, served)
            adaptive = _adaptive(place, max(texts // 4, 1), new) if served is large else {}
            out += _speed(title, served, adaptive)
        out += _over_full_row(small, large)
        return [*out, *_beside_hugging_face(new, turns), *_together(new, turns // 3 + 1, sessions)]
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------ on the virtual clock


def _served(place: Place, texts: int, new: int) -> dict[str, Served]:
    link = Link(up=UP, down=DOWN, latency=LATENCY)
    return {
        name: serve(name, link, prompts(texts), place, settings, new)
        for name, settings in METHODS.items()
    }


def _crossing(served: Mapping[str, Served]) -> list[Figure]:
    """Acceptance, and bytes per emitted token."""
    out: list[Figure] = []

    def enter(table: str, row: str, column: str, value: float, unit: str) -> None:
        if not math.isnan(value):
            out.append(Figure(f"{row}: {column}", value, unit, cell=(table, row, column)))

    for name, each in served.items():
        title = f"Drafts of {GAMMA} tokens: the part that stands; by position, if all before it do"
        if METHODS[name]:
            enter(title, name, "of judged tokens", each.acceptance, "of 1")
            for position in range(GAMMA):
                column = f"position {position + 1}"
                enter(title, name, column, each.standing(position), "of 1")
            enter(title, name, "accepted in a round", each.length, "tokens")
        title = "Bytes for each token of the answer, opening and prompt left out"
        for column, count in (
            ("up", each.up),
            ("up, on paper", each.up_values),
            ("down", each.down),
            ("down, on paper", each.down_values),
        ):
            enter(title, name, column, count / each.tokens, "B/token")
    return out


def _time(title: str, served: Mapping[str, Served]) -> list[Figure]:
    """What virtual time is spent on, per token."""
    table = f"Virtual milliseconds a token, {title} ({UP / MEGA:g} Mbit/s up, {LATENCY * 1e3:g} ms)"
    out: list[Figure] = []
    for name, each in served.items():
        for part in PARTS:
            value = round(each.parts[part] / each.tokens * 1e3, 3)
            out.append(Figure(f"{name}: {part}, {title}", value, "ms", cell=(table, name, part)))
        value = each.seconds / each.tokens * 1e3
        out.append(Figure(f"{name}: in sum, {title}", value, "ms", cell=(table, name, "in sum")))
    return out


def _adaptive(place: Place, texts: int, new: int) -> dict[str, Callable[[float], float]]:
    """Tokens per second of lengths that adapt to the link, really run at each rate."""

    def speed(name: str, rate: float) -> float:
        link = Link(up=rate, down=DOWN, latency=LATENCY)
        return serve(name, link, prompts(texts), place, {"adapt": True}, new).speed(rate)

    return {
        f"{name}, adaptive": lambda rate, name=name: speed(name, rate)
        for name in ("tk-slt", "dssd")
    }


def _speed(
    title: str,
    served: Mapping[str, Served],
    adaptive: Mapping[str, Callable[[float], float]],
) -> list[Figure]:
    """Tokens per virtual second over uplink rates, and where a method meets cloud-only."""
    table = f"Tokens per virtual second over the uplink rate, {title} ({LATENCY * 1e3:g} ms)"
    base = served["cloud-only"]
    rows = {**{name: each.speed for name, each in served.items()}, **adaptive}
    out: list[Figure] = []
    for name, speed in rows.items():
        for rate in RATES:
            value = speed(rate * MEGA)
            note = SLOWER if value < base.speed(rate * MEGA) else ""
            if name == "device-only":
                note = note or OTHER
            column = f"{rate:g} Mbit/s"
            figure = f"{name} at {column}, {title}"
            out.append(Figure(figure, value, "tokens/s", note=note, cell=(table, name, column)))
        if name in served and name != "cloud-only":
            value = break_even(served[name], base) / MEGA
            note = {0.0: "at every rate", math.inf: "at no rate"}.get(value, "")
            figure = f"{name}: uplink from which it is faster than cloud-only, {title}"
            cell = (table, name, "faster than cloud-only from")
            out.append(Figure(figure, value, "Mbit/s", note=note, cell=cell))
    return out


def _over_full_row(small: Mapping[str, Served], large: Mapping[str, Served]) -> list[Figure]:
    """How many times the tokens per second of full rows, over a 5 Mbit/s uplink."""
    table = (
        f"Times the tokens per second of full-row, {UP / MEGA:g} Mbit/s up and "
        f"{DOWN / MEGA:g} Mbit/s down, by the latency of each way"
    )
    out: list[Figure] = []
    for name in ("tk-slt", "dssd"):
        for title, served in (("embedded models", small), ("68 M and 7 B", large)):
            for latency in LATENCIES:
                faster = served[name].speed(UP, latency) / served["full-row"].speed(UP, latency)
                column = f"{latency * 1e3:g} ms"
                row = f"{name}, {title}"
                figure = f"{row}: over full-row at {UP / MEGA:g} Mbit/s and {column}"
                cell = (table, row, column)
                if served is small and latency == NEAR:
                    out.append(at_least(figure, faster, OVER_FULL_ROW, "x")._replace(cell=cell))
                else:
                    out.append(Figure(figure, faster, "x", cell=cell))
    return out


# ------------------------------------------------------------ in seconds of this machine


def _beside_hugging_face(new: int, turns: int) -> list[Figure]:
    """Greedy decoding of one text beside `generate`, with the same attention on both sides."""
    from transformers.utils import logging

    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # assisted generation warns of how it calls itself
    text = prompts(1)[0]
    out: list[Figure] = []
    for attention in ("eager", "sdpa"):
        works = _greedy(text, new, attention)
        told = [work() for work in works.values()]
        same = sum(answer == told[0] for answer in told) / len(told)
        title = f"{attention} attention"
        out.append(at_least(f"greedy answers equal to generate's, {title}", same, 1.0, "of 1"))
        times = turns_of(turns, list(works.values()), time.process_time)
        hugging, assisted, loop, cloud, full = times
        out += [
            Figure(f"generate, {new} tokens, {title}", median(hugging) * 1e3, "ms"),
            at_most(f"plain decoding over generate, {title}", ratio(loop, hugging), PLAIN, "x"),
            at_most(
                f"cloud-only session over generate, {title}", ratio(cloud, hugging), PLAIN, "x"
            ),
            Figure(f"assisted generation, {new} tokens, {title}", median(assisted) * 1e3, "ms"),
            at_most(
                f"full-row session over assisted, {title}", ratio(full, assisted), ASSISTED, "x"
            ),
        ]
    logging.set_verbosity(loud)
    return out


def _greedy(text: Tensor, new: int, attention: str) -> dict[str, Callable[[], list[int]]]:
    """Five ways to the same greedy answer; Hugging Face's drafts are ours in number."""
    target = language.load("embedded:target", attention=attention)
    draft = language.load("embedded:draft", attention=attention)
    settings = draft.model.generation_config
    assert settings is not None  # the embedded models come with one
    settings.num_assistant_tokens = GAMMA  # 20 by default
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0  # 0.4 by default: a draft may end early
    greedy = Law(0.0)

    def generate(**more: Any) -> list[int]:
        ids = target.model.generate(  # type: ignore[operator]
            input_ids=text[None], attention_mask=torch.ones_like(text[None]), do_sample=False,
            max_new_tokens=new, eos_token_id=None, pad_token_id=target.tokenizer.pad_token_id,
            **more,
        )  # fmt: skip
        return ids[0, len(text) :].tolist()

    def session(method: str, **more: Any) -> list[int]:
        (reply,) = decode(
            target, draft, [text], method=method, law=greedy, max_new_tokens=new, stop=(), **more
        )
        return reply.ids

    return {
        "generate": generate,
        "assisted": lambda: generate(assistant_model=draft.model),
        "plain": lambda: plain.generate(target.model, [text], new, greedy, stop=())[
            0, len(text) :
        ].tolist(),
        "cloud-only": lambda: session("cloud-only"),
        "full-row": lambda: session("full-row", settings={"gamma": GAMMA}),
    }


def _together(new: int, turns: int, count: int) -> list[Figure]:
    """Tokens per second of concurrent DSSD sessions over those of one session, and what the
    forwards of a round alone would allow if all texts took equally many."""
    texts = prompts(count)

    def sessions(own: list[Tensor]) -> None:
        settings = {"gamma": GAMMA}
        decode(*pair(), own, method="dssd", settings=settings, stop=(), max_new_tokens=new)

    works = [lambda: sessions(texts[:1]), lambda: sessions(texts)]
    works += [_forwards(1), _forwards(count)]
    one, all, alone, batch = turns_of(turns, works, time.process_time)
    title = f"tokens/s of {count} DSSD sessions in one process over one session's"
    return [
        at_least(title, count * ratio(one, all), CONCURRENT, "x"),
        Figure(
            f"the forwards alone, {count} texts in step over one", count * ratio(alone, batch), "x"
        ),
    ]


def _forwards(count: int) -> Callable[[], None]:
    """The forwards of one round of so many texts: the draft's, one a token, and the target's."""
    target, draft = (memory_of(each.model) for each in pair())
    prompt = torch.stack(prompts(count))
    for memory in (target, draft):
        slots = [memory.open() for _ in range(count)]
        memory.extend(slots, prompt, [prompt.shape[1]] * count, 1)

    def round() -> None:
        for memory, steps, fed in ((draft, GAMMA, 1), (target, 1, GAMMA + 1)):
            for _ in range(steps):
                memory.extend(range(count), prompt[:, :fed], [fed] * count, fed)
            for slot in range(count):
                memory.crop(slot, prompt.shape[1])

    return round
