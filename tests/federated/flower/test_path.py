"""A deployed client walks its half of an upload's path: all arrives as in one process."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.federated import tiny
from tests.federated.flower.halves import Flaky, deployed, flat, keys_of, reference

from isthmus import tree
from isthmus.errors import InputError
from isthmus.federated.flower import ready, visit
from isthmus.federated.path import Path
from isthmus.run import deployment

pytest.importorskip("flwr")
ready()

LOSSY = "up=1e6,down=1e6,loss=0.35,attempts=1"
LOCAL = {"privacy": "local", "noise": 0.5, "public": ["examples"], "noise-source": "seed"}
CENTRAL = {"privacy": "central", "noise": 0.5, "public": ["examples"], "noise-source": "seed"}

PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("fedavg", {"clip": 0.01}),
    "clip, noise, int8": ("fedavg", {"clip": 0.01, "codec": "int8:stochastic", **LOCAL}),
    "noise on factors": ("fedit", {"clip": 0.01, "codec": "int8", **LOCAL}),
    "what a client keeps": ("scaffold", {"clip": 0.2, "codec": "int4", "link": LOSSY}),
    "feedback": ("fedavg", {"codec": "topk:0.2|int8", "feedback": True, "link": LOSSY}),
    "random support": ("fedavg", {"codec": "randomk:0.3"}),
    "slices": ("flexlora", {"codec": "int8", "ranks": [1, 2, 2]}),
    "a bound on unequal ranks": ("flora", {"clip": 0.01, "codec": "int8", "ranks": [1, 2, 2]}),
    "warm-up": ("dbe", {"clip": 0.1, "codec": "int8"}),
    "central noise": ("fedavg", {"clip": 0.01, "codec": "int8", **CENTRAL}),
    "chosen by losses": ("fedavg", {"schedule": "oort", "cohort": 2, "codec": "int8"}),
}


def inside(keys: dict[str, Any]) -> Any:
    """The same run in one process."""
    return reference({key: value for key, value in keys.items() if key != "noise-source"})


@pytest.mark.parametrize("name", PATHS)
def test_a_deployment_equals_the_run_in_process(name: str) -> None:
    method, more = PATHS[name]
    keys = {**keys_of(method), "rounds": 6 if "link" in more else 3, "seed": 5, **more}
    fed, built = inside(keys), deployed(keys)
    assert tiny.apart(tiny.state(fed), tiny.state(built.federation)) < 1e-12
    assert list(fed.ledger.rows()) == list(built.federation.ledger.rows())
    if "link" in more:
        assert fed.ledger.total("rows", note="lost", kind="update") > 2
    if "privacy" in more:
        assert any("event" in row for row in fed.ledger.rows())


def test_a_client_that_does_not_clip_is_not_the_run_in_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bound is one that matters: what would be sent without it ends elsewhere."""
    keys = {**keys_of("fedavg"), **PATHS["clip"][1]}
    fed, whole = inside(keys), Path.protected
    monkeypatch.setattr(Path, "protected", lambda self, updates, *rest: (updates, []))
    apart = tiny.apart(tiny.state(fed), tiny.state(deployed(keys).federation))
    monkeypatch.setattr(Path, "protected", whole)
    assert apart > 0.01 > 1e9 * tiny.apart(tiny.state(fed), tiny.state(deployed(keys).federation))


def test_the_bytes_are_those_of_the_run_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**keys_of("fedavg"), **PATHS["clip, noise, int8"][1]}
    coded = Path._coded
    seen: list[bytes] = []

    def spied(self: Path, *given: Any) -> Any:
        made = coded(self, *given)
        seen.extend(bytes(made.parcel[i]) for i in range(len(made.parcel)))
        return made

    monkeypatch.setattr(Path, "_coded", spied)
    inside(keys)
    monkeypatch.setattr(Path, "_coded", coded)
    sent: list[bytes] = []
    together = visit.together

    def read(answers: Any, *rest: Any) -> Any:
        done = together(answers, *rest)
        assert done.posted is not None
        sent.extend(done.posted.messages)
        assert all(message in answer for message, answer in zip(sent[-3:], answers, strict=True))
        return done

    monkeypatch.setattr("isthmus.federated.executors.flower.together", read)
    built = deployed(keys)
    assert sent == seen and len(sent) == 3 * 4
    rows = [r for r in built.federation.ledger.rows() if r["kind"] == "update"]
    assert [r["bytes"] for r in rows] == [len(message) for message in sent]


@pytest.mark.parametrize("codec", ["int8", "dense"])
def test_a_client_that_diverges_sends_nothing_where_the_guard_drops_it(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**keys_of("fedavg"), "codec": codec, "guard": "drop", "optimiser": "sgd", "lr": 0.1}
    plain = tiny.data

    def broken(*given: Any, **more: Any) -> Any:
        x, y = plain(*given, **more)
        x[10] = torch.inf  # an item of the second client
        return x, y

    monkeypatch.setattr(tiny, "data", broken)
    deployment._part.cache_clear()
    fed, built = inside(keys), deployed(keys)
    deployment._part.cache_clear()
    assert tiny.apart(tiny.state(fed), tiny.state(built.federation)) < 1e-12
    assert {r["from"] for r in fed.ledger.rows() if r["kind"] == "update"} == {
        r["from"] for r in built.federation.ledger.rows() if r["kind"] == "update"
    }
    assert len({r["from"] for r in fed.ledger.rows() if r["kind"] == "update"}) == 2


# -- noise of a real deployment ------------------------------------------------------------


SYSTEM = {**keys_of("fedavg"), "clip": 0.01, **LOCAL, "noise-source": ""}


def test_noise_comes_from_the_system_and_losses_stay(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = deployed(SYSTEM).federation, deployed(SYSTEM).federation
    seeded = inside(SYSTEM)
    states = [tiny.state(fed) for fed in (first, second, seeded)]
    assert min(tiny.apart(a, b) for a, b in pairwise(states)) > 1e-4
    assert "training loss nan" in capsys.readouterr().out
    rows = [[r for r in fed.ledger.rows() if "event" in r] for fed in (first, seeded)]
    assert rows[0] == rows[1] and len(rows[0]) == 3 * 4


def test_central_noise_comes_from_the_system() -> None:
    keys = {**keys_of("fedavg"), "clip": 0.01, **CENTRAL, "noise-source": "system"}
    states = [tiny.state(fed) for fed in (deployed(keys).federation, inside(keys))]
    assert tiny.apart(*states) > 1e-4


def test_the_size_of_the_noise_and_one_answer_to_one_question() -> None:
    """Against the same visit without noise: normal of std sigma S; asked again, the same bytes."""
    from flwr.app import RecordDict

    keys = {**SYSTEM, "noise": 2.0}
    plain = deployment._part(_text({**keys_of("fedavg"), "clip": 0.01}), 1)
    noised = deployment._part(_text(keys), 1)
    fed = inside({**keys_of("fedavg"), "rounds": 1})
    from isthmus.federated.cohort import Cohort

    cohort = Cohort(
        clients=np.array([1]), keys=np.array([77]), ranks=np.array([0]), versions=np.array([0]),
        round=1, lr=0.1, downs=[fed.state["shared"]], kept={},
    )  # fmt: skip
    asked = visit.ask(cohort, 0, {}, 0)

    def at(part: Any, source: str, once: bool) -> Any:
        half = part.half._replace(path=deployment._sourced(part.half.path, source))
        return visit.OnNode(part.method, part.ground, part.initial, RecordDict(), half, once)

    def deltas(answer: bytes) -> torch.Tensor:
        posted = visit.together([answer], [{}], _form(fed)).posted
        assert posted is not None
        sent = noised.half.path.arrived(posted, [_meta()])
        return tree.flatten_stacked(sent.updates.delta)[0]

    site = at(noised, "system", True)
    base = deltas(visit.answer(asked, at(plain, "seed", False)))
    draws = [deltas(visit.answer(asked, at(noised, "system", True))) - base for _ in range(40)]
    std = float(torch.stack(draws).std())
    assert abs(std / (2.0 * 0.01) - 1) < 0.05  # of 40 x 103 draws: within 4 standard errors
    assert float(base.norm()) <= 0.01
    assert visit.answer(asked, site) == visit.answer(asked, site)
    other = visit.ask(cohort, 0, {"x": torch.zeros(1)}, 0)
    assert visit.answer(other, site) != visit.answer(asked, site)


def _text(keys: dict[str, Any]) -> str:
    own, _ = deployment._parted(flat(keys))
    return deployment.config_of(own).model_dump_json()


def _form(fed: Any) -> Any:
    from isthmus.contracts import Updates

    return Updates({n: torch.zeros_like(x)[None] for n, x in fed.state["shared"].items()})


def _meta() -> Any:
    from isthmus.contracts import Meta

    return Meta(1, 1, 0, 24, 3)


def test_a_node_that_fails_draws_no_second_noise_for_what_it_has_sent() -> None:
    """Every answer but the first to a question is the one given before."""
    keys = {**SYSTEM, "rounds": 2}
    asked: dict[bytes, set[bytes]] = {}

    class Recorded(Flaky):
        def __call__(self, message: Any, context: Any) -> Any:
            if message.metadata.message_type == "train":
                reply = self.app(message, context)
                given = asked.setdefault(visit.opened(message), set())
                given.add(visit.opened(reply))
            return super().__call__(message, context)

    deployed(keys, lambda app: Recorded(app, {1, 4}))
    assert len(asked) == 6 and all(len(answers) == 1 for answers in asked.values())


def test_a_source_that_does_not_exist() -> None:
    with pytest.raises(InputError, match=r"noise-source: dice"):
        deployed({**SYSTEM, "noise-source": "dice"})
