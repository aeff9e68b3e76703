"""Every rule of an upload's path, pair by pair."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from isthmus.errors import InputError
from isthmus.run.compatibility import FIELDS, RULES, Pieces, broken, check, refuse

COVERED: dict[str, Any] = {"clip": True, "covered": {"delta"}, "public": {"examples"}}

# What it takes to have a piece in a configuration that is otherwise legal, first what needs most.
SETTINGS: dict[str, dict[str, Any]] = {
    "upload": {},
    "mask": {"mask": True, "codec": ("integer-shared-scale",)},
    "local noise": {"local_noise": True, **COVERED},
    "central noise": {"central_noise": True, "weights": "fixed", **COVERED},
    "binomial codec": {"codec": ("binomial",), **COVERED},
    "attack": {"attack": True},
    "clip": {"clip": True},
    "selector": {"server": ("selector", "mean")},
    "no clip": {"clip": False},
    "no reducer": {"server": ("selector",)},
    "several reducers": {"server": ("mean", "coordinate")},
    "selector after the reducer": {"server": ("mean", "selector")},
    "several codecs": {"codec": ("sparse", "real")},
    "running statistics": {
        "sends": {"delta", "buffers"},
        "covered": {"delta", "buffers"},
        "running_statistics": True,
    },
    "method with individual uploads": {"individual": True},
    "method that is not vectorised": {"vectorise": False},
    **{f"{kind} codec": {"codec": (kind,)} for kind in ("real", "sparse", "discrete")},
    "integer-shared-scale codec": {"codec": ("integer-shared-scale",)},
    **{
        f"{kind} reducer": {"server": (kind,)}
        for kind in ("mean", "coordinate", "adapter-factor", "adapter-product", "stack")
    },
    "method that changes the backbone": {"backbone": True},
    "method that gathers the data": {"gathers": True},
    "schedule with a cache": {"cache": True},
    "method with a server of its own": {"server_half": True},
    **{f"{kind} schedule": {"schedule": kind} for kind in ("async", "gossip")},
    **{
        f"{kind} executor": {"executor": kind}
        for kind in ("auto", "vectorised", "sequential", "flower")
    },
    **{f"{kind} weights": {"weights": kind} for kind in ("examples", "uniform", "fixed")},
    **{f"{name} in the clear": {"sends": {"delta", name}} for name in FIELDS},
    "delta in the clear": {"covered": set()},
    "examples in the clear": {"weights": "examples", "public": set()},
}

# The pair that cannot be had without a second fault: the weights themselves are refused too.
FURTHER = {("central noise", "examples in the clear"): 1}


def pieces(*words: str) -> Pieces:
    """The smallest configuration that has the pieces of all the words."""
    merged: dict[str, Any] = {}
    for word in words:
        for key, value in SETTINGS[word].items():
            beside = key in merged and {"selector", "several codecs"} & set(words)
            if key == "server" and beside and "selector" not in value:
                value = ("selector", *value)
            if key == "codec" and beside:
                value = (*merged[key], *value)
            merged[key] = value
    return Pieces(**{k: frozenset(v) if isinstance(v, set) else v for k, v in merged.items()})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.first} with {rule.second}")
def test_rule(rule):
    given = pieces(rule.first, rule.second)
    assert {rule.first, rule.second} <= given.words()
    lines = check(given)
    if rule.allowed:
        assert lines == []
        refuse(given)
    else:
        assert rule.line in lines
        with pytest.raises(InputError) as error:
            refuse(given)
        assert str(error.value).startswith(broken(given)[0].first)
        assert broken(given)[0].reason in str(error.value)


@pytest.mark.parametrize("rule", [r for r in RULES if not r.allowed], ids=lambda rule: rule.line)
def test_either_piece_alone_does_not_break_the_rule(rule):
    """The refusal comes from the pair: each of its pieces without the other is not refused so."""
    for word in (rule.first, rule.second):
        if word != "upload" and rule.first != "upload":
            assert rule not in broken(pieces(word))
    if rule.first == "upload":
        assert rule not in broken(Pieces())


def test_a_refused_pair_is_the_only_fault_of_the_smallest_configuration_that_has_it():
    for rule in RULES:
        if not rule.allowed:
            extra = [line for line in check(pieces(rule.first, rule.second)) if line != rule.line]
            assert len(extra) == FURTHER.get((rule.first, rule.second), 0), extra


def test_no_pair_is_ruled_twice():
    pairs = [frozenset((r.first, r.second)) for r in RULES]
    assert len(set(pairs)) == len(pairs)


def test_every_word_of_a_rule_is_a_word_that_pieces_can_have():
    assert {word for r in RULES for word in (r.first, r.second)} <= SETTINGS.keys()
    for word in SETTINGS:
        assert word in pieces(word).words()


def test_the_plain_run_and_a_full_private_one_are_legal():
    assert check(Pieces()) == []
    everything = frozenset({"delta", "values", "buffers"})
    full = Pieces(
        clip=True,
        central_noise=True,
        weights="fixed",
        sends=everything,
        covered=everything,
        codec=("sparse", "real"),
        attack=True,
        executor="vectorised",
    )
    assert check(full) == []
    masked = Pieces(
        mask=True, codec=("binomial",), clip=True, weights="uniform", covered=frozenset({"delta"})
    )
    assert check(masked) == []


def test_every_field_that_goes_up_is_covered_or_public():
    some = {"local_noise": True, "clip": True, "weights": "uniform"}
    up = frozenset({"delta", "values", "scalars"})
    delta = frozenset({"delta"})
    lines = check(Pieces(sends=up, covered=delta, **some))
    assert len(lines) == 2 and "values" in lines[0] and "scalars" in lines[1]
    assert (
        check(Pieces(sends=up, covered=delta, public=frozenset({"values", "scalars"}), **some))
        == []
    )
    assert check(Pieces(sends=up, covered=up, **some)) == []
    assert check(Pieces(sends=up)) == []  # without a privacy mechanism nothing needs cover


def test_public_running_statistics_may_go_up_beside_noise():
    sends = frozenset({"delta", "buffers"})
    some = {"local_noise": True, "clip": True, "weights": "uniform", "running_statistics": True}
    assert len(check(Pieces(sends=sends, covered=sends, **some))) == 1
    shared = Pieces(
        sends=sends, covered=frozenset({"delta"}), public=frozenset({"buffers"}), **some
    )
    assert check(shared) == []


def test_reasons_come_in_the_order_of_the_rules():
    given = Pieces(
        mask=True, central_noise=True, server=("coordinate", "selector"), schedule="gossip"
    )
    found = [RULES.index(rule) for rule in broken(given)]
    assert len(found) > 8
    assert all(a < b for a, b in pairwise(found))
    with pytest.raises(InputError, match="selectors go before any reducer"):
        refuse(given)
