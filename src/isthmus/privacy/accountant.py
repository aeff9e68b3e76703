"""What a run's privacy events cost together: epsilon at a given delta, never a sum of epsilons.

An *event* is what a mechanism leaves in the ledger, a plain dict:

    {"mechanism": "gaussian",
     "parameters": {"noise_multiplier": 1.1},                 # noise std / clip bound of one unit
     "sampling": {"kind": "poisson", "rate": 0.01},           # or "none", "without-replacement"
     "adjacency": "add-remove",                               # or "replace-one"
     "unit": "client",                                        # or "example", "token", ...
     "count": 1}                                              # times it happened

or, for any other mechanism, `"pair"` in place of `"mechanism"`: a pair of discrete distributions
`{"upper": [p_0, p_1, ...], "lower": [q_0, q_1, ...]}` over the same outcomes that dominates the
mechanism in both directions (upper: with the unit, lower: without it).

Two accountants of `dp-accounting` compose them: `pld` (privacy-loss distributions; Koskela,
Jälkö and Honkela, AISTATS 2020, arXiv:1906.03049; pessimistic rounding, so an upper bound that
is nearly tight) and `rdp` (Rényi divergences; Mironov, CSF 2017, arXiv:1702.07476; conversion of
Canonne, Kamath and Steinke, NeurIPS 2020, arXiv:2004.00010, Prop. 12).

One convention matters. Replacing one unit moves a clipped sum by up to twice the clip bound.
`dp-accounting`'s `pld` doubles by itself, its `rdp` does not, so `rdp` is given half the
multiplier here: both then speak of the same mechanism.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from isthmus.errors import InputError, need, unknown

Event = Mapping[str, Any]
Accountant = Literal["pld", "rdp"]

ADJACENCIES = ("add-remove", "replace-one")
SAMPLINGS = ("none", "poisson", "without-replacement")


def epsilon(events: Iterable[Event], delta: float, accountant: Accountant | None = None) -> float:
    """The smallest proven epsilon at `delta` for all events together (`inf`: no guarantee).

    Without `accountant` it is `pld`, or `rdp` where cohorts have a fixed size. All events must
    protect the same unit under the same adjacency; to add unlike ones is an `InputError`, as is
    a `delta` outside (0, 1) or an event that the accountant cannot bound.

    >>> step = {
    ...     "mechanism": "gaussian",
    ...     "parameters": {"noise_multiplier": 5.0},
    ...     "adjacency": "add-remove",
    ...     "unit": "client",
    ...     "count": 50,
    ... }
    >>> round(epsilon([step], 1e-5, "rdp"), 3), round(epsilon([step], 1e-5, "pld"), 3)
    (7.077, 6.573)
    """
    if not 0.0 < delta < 1.0:
        raise InputError("delta", delta, "a number between 0 and 1")
    grouped = _grouped(events)
    if not grouped:
        return 0.0
    if any(_unbounded(event) for event, _ in grouped):
        return math.inf
    if accountant is None:
        fixed = any(_sampling(event)[0] == "without-replacement" for event, _ in grouped)
        accountant = "rdp" if fixed else "pld"
    if accountant == "pld":
        return float(_pld(grouped).get_epsilon_for_delta(delta))
    if accountant == "rdp":
        return _rdp(grouped, delta)
    raise unknown("accountant", accountant, ("pld", "rdp"))


def spent(
    rows: Iterable[Mapping[str, Any]], delta: float, accountant: Accountant | None = None
) -> dict[tuple[str, str, str], float]:
    """Epsilon of each (party, adjacency, unit) among the rows of a ledger."""
    groups: dict[tuple[str, str, str], list[Event]] = {}
    for row in rows:
        if row["what"] == "privacy":
            event = row["event"]
            _check(event)
            groups.setdefault((row["from"], event["adjacency"], event["unit"]), []).append(event)
    costs: dict[tuple[str, str, str], float] = {}
    known: dict[str, float] = {}  # parties with the same events share one composition
    for key, group in groups.items():
        events = sorted(json.dumps(counted, sort_keys=True) for counted in _grouped(group))
        text = "\n".join(events)
        if text not in known:
            known[text] = epsilon(group, delta, accountant)
        costs[key] = known[text]
    return costs


def _grouped(events: Iterable[Event]) -> list[tuple[Event, int]]:
    """Equal events once, with how often they happened; the kinds must be alike."""
    counts: Counter[str] = Counter()
    first: Event | None = None
    for event in events:
        _check(event)
        if first is None:
            first = event
        for key in ("adjacency", "unit"):
            if event[key] != first[key]:
                raise InputError(f"event.{key}", event[key], f"{first[key]}, as the events before")
        rest = {key: value for key, value in event.items() if key != "count"}
        counts[json.dumps(rest, sort_keys=True)] += event.get("count", 1)
    return [(json.loads(text), count) for text, count in counts.items() if count]


def _check(event: Event) -> None:
    if event.get("adjacency") not in ADJACENCIES:
        raise unknown("event.adjacency", str(event.get("adjacency")), ADJACENCIES)
    if not isinstance(event.get("unit"), str):
        raise InputError("event.unit", event.get("unit"), "a word, such as client or example")
    kind, rate = _sampling(event)
    if kind not in SAMPLINGS:
        raise unknown("event.sampling.kind", kind, SAMPLINGS)
    if not 0.0 <= rate <= 1.0:
        raise InputError("event.sampling.rate", rate, "a number from 0 to 1")
    count = event.get("count", 1)
    if not isinstance(count, int) or count < 0:
        raise InputError("event.count", count, "a whole number, 0 or more")
    if "pair" in event:
        for side in ("upper", "lower"):
            _distribution(event["pair"], side)
        if len(event["pair"]["upper"]) != len(event["pair"]["lower"]):
            raise InputError("event.pair", "unequal lengths", "one probability per outcome")
    elif event.get("mechanism") != "gaussian":
        raise unknown("event.mechanism", str(event.get("mechanism")), ("gaussian",))
    elif not 0.0 <= _sigma(event) < math.inf:
        raise InputError("event.parameters.noise_multiplier", _sigma(event), "0 or more")


def _distribution(pair: Mapping[str, Sequence[float]], side: str) -> None:
    weights = pair.get(side, ())
    if not all(p >= 0.0 for p in weights) or not math.isclose(
        math.fsum(weights), 1.0, abs_tol=1e-9
    ):
        raise InputError(f"event.pair.{side}", "no distribution", "probabilities that sum to 1")


def _sampling(event: Event) -> tuple[str, float]:
    sampling = event.get("sampling") or {"kind": "none"}
    kind = str(sampling.get("kind"))
    return kind, 1.0 if kind == "none" else float(sampling.get("rate", -1.0))


def _sigma(event: Event) -> float:
    return float(event.get("parameters", {}).get("noise_multiplier", math.nan))


def _unbounded(event: Event) -> bool:
    """True when the event releases its input as it is."""
    return "pair" not in event and _sigma(event) == 0.0 and _sampling(event)[1] > 0.0


def _relation(event: Event) -> Any:
    relations = need("dp_accounting", "trust").NeighboringRelation
    one = event["adjacency"] == "add-remove"
    return relations.ADD_OR_REMOVE_ONE if one else relations.REPLACE_ONE


def _pld(grouped: Sequence[tuple[Event, int]]) -> Any:
    pld = need("dp_accounting.pld.privacy_loss_distribution", "trust")
    total = pld.identity()
    for event, count in grouped:
        kind, rate = _sampling(event)
        if kind == "without-replacement":
            raise InputError("accountant", "pld", "rdp, for sampling without replacement")
        if rate == 0.0:
            continue
        if "pair" in event:
            one = _pair(pld, event, rate).self_compose(count)
        elif rate == 1.0:  # n Gaussian releases are one with std / sqrt(n), exactly
            one = pld.from_gaussian_mechanism(
                _sigma(event) / math.sqrt(count), neighboring_relation=_relation(event)
            )
        else:
            one = pld.from_gaussian_mechanism(
                _sigma(event),
                sampling_prob=rate,
                neighboring_relation=_relation(event),
            ).self_compose(count)
        total = total.compose(one)
    return total


def _pair(pld: Any, event: Event, rate: float) -> Any:
    """The loss distribution of a dominating pair, both directions kept.

    Poisson sampling mixes the unit's distribution with the one without it (Zhu, Dong and Wang,
    AISTATS 2022, arXiv:2106.08567, Theorem 11), which is stated for adding or removing.
    """
    if rate < 1.0 and event["adjacency"] != "add-remove":
        raise InputError("event.adjacency", event["adjacency"], "add-remove, for a sampled pair")
    lower = event["pair"]["lower"]
    upper = [
        rate * p + (1.0 - rate) * q for p, q in zip(event["pair"]["upper"], lower, strict=True)
    ]
    return pld.from_two_probability_mass_functions(
        log_probability_mass_function_lower=_logs(lower),
        log_probability_mass_function_upper=_logs(upper),
        symmetric=False,
    )


def _logs(weights: Sequence[float]) -> dict[int, float]:
    return {i: math.log(p) if p > 0.0 else -math.inf for i, p in enumerate(weights)}


def _rdp(grouped: Sequence[tuple[Event, int]], delta: float) -> float:
    dp, rdp = need("dp_accounting", "trust"), need("dp_accounting.rdp", "trust")
    relation = _relation(grouped[0][0])
    account = rdp.RdpAccountant(neighboring_relation=relation)
    replace = relation is dp.NeighboringRelation.REPLACE_ONE
    with _quiet_orders():
        for event, count in grouped:
            if "pair" in event:
                raise InputError("accountant", "rdp", "pld, for a pair of distributions")
            sigma = _sigma(event) / (2.0 if replace else 1.0)
            account.compose(_dp_event(dp, event, sigma), count)
        if (account.rdp < 0.0).any():
            raise ArithmeticError("a negative Renyi divergence: use the accountant 'pld'")
        return float(account.get_epsilon(delta))


def _dp_event(dp: Any, event: Event, sigma: float) -> Any:
    kind, rate = _sampling(event)
    gaussian = dp.GaussianDpEvent(sigma)
    if kind == "none":
        return gaussian
    fitting = {"poisson": "add-remove", "without-replacement": "replace-one"}[kind]
    if event["adjacency"] != fitting:
        raise InputError("event.adjacency", event["adjacency"], f"{fitting}, for {kind} under rdp")
    if kind == "poisson":
        return dp.PoissonSampledDpEvent(rate, gaussian)
    part, whole = rate.as_integer_ratio()  # only the ratio enters, and this one is exact
    return dp.SampledWithoutReplacementDpEvent(whole, part, gaussian)


@contextmanager
def _quiet_orders() -> Iterator[None]:
    """Silence the notes on Rényi orders whose series does not converge.

    Such orders are left out, which can only raise epsilon. Other warnings still appear.
    """
    logger = logging.getLogger("absl")

    def passes(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
