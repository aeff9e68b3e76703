"""Claims: found by file name, judged against the status, and the real ones run in full."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from isthmus import catalogue, claims
from isthmus.claims import claim, fedcompass, fedit, fedmomentum, tinyml
from isthmus.claims.claim import Check, Outcome
from isthmus.cli import main
from isthmus.errors import InputError, MissingExtra
from isthmus.tasks.losses import IGNORE


def outcome(status: str, *holds: bool) -> Outcome:
    return Outcome("x", status, [Check("c", "p", "h", held) for held in holds])


@pytest.mark.parametrize(
    ("status", "holds", "passed", "contradicted"),
    [
        ("miniature", (True, True), True, False),
        ("miniature", (True, False), False, True),
        ("verified", (False, True), False, True),
        ("not-reproduced", (True, False), True, False),
        ("not-reproduced", (True, True), False, True),
        ("reconstructed", (True, True), True, False),
        ("reconstructed", (True, False), False, False),
    ],
)
def test_checks_are_held_against_the_status(
    status: str, holds: tuple[bool, ...], passed: bool, contradicted: bool
) -> None:
    seen = outcome(status, *holds)
    assert seen.passed is passed
    assert (seen.contradiction is not None) is contradicted


def test_every_claim_is_of_a_built_system_and_says_what_it_does() -> None:
    here = {s.name: s for s in catalogue.systems(all=True)}
    folder = Path(claims.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "claim"}
    assert {name.replace("-", "_") for name in claim.names()} == files
    assert {"fedit", "fedmomentum"} <= set(claim.names())
    assert all(here[name].status != "planned" for name in claim.names())
    for stem in files:
        text = (folder / f"{stem}.py").read_text()
        assert "Paper" in text and "Here:" in text and "Thresholds" in text


def test_names_that_lead_nowhere_are_one_line() -> None:
    with pytest.raises(InputError, match="nearest: fedmomentum"):
        claim.run("fedmomentun")
    built = claim.names()
    planned = next(s for s in catalogue.systems() if s.status == "planned" and s.name not in built)
    with pytest.raises(InputError, match=rf"{planned.name} \(planned, no claim yet\)"):
        claim.run(planned.name)


def test_a_claim_runs_on_one_thread_and_puts_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fedprox.py").write_text(
        "import torch\n"
        "from isthmus.claims.claim import Check\n"
        "def claim(progress):\n"
        "    progress('running')\n"
        "    return [Check('threads', '', str(torch.get_num_threads()), True)]\n"
    )
    monkeypatch.setattr(claims, "__path__", [*claims.__path__, str(tmp_path)])
    before, told = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        seen = claim.run("Fed Prox", told.append)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        sys.modules.pop("isthmus.claims.fedprox", None)
    assert seen.system == "fedprox" and seen.checks[0].here == "1" and told == ["running"]


def test_instructions_are_answered_and_their_prompts_masked() -> None:
    rng = fedit.seeds.rng(3, "test")
    tokens, labels, prompt = fedit.texts(rng, 60)
    masked = fedit.masked(labels, prompt)
    for i in range(60):
        words = [fedit.WORDS[j] for j in tokens[i].tolist() if j]
        given = words[2 : words.index("=")]
        said = [fedit.WORDS[j] for j in masked[i].tolist() if j != IGNORE]
        assert words[1] == fedit.SKILLS[i % 6]
        assert said == [*fedit.reply(words[1], given), "<end>"]
        whole = [fedit.WORDS[j] for j in labels[i].tolist() if j != IGNORE]
        assert [words[0], *whole[: prompt[i] - 1]] == words[: prompt[i]]


def test_exact_match_counts_whole_answers_only() -> None:
    """Of three items one has a wrong token; one of the right ones counts twice."""
    labels = torch.tensor([[IGNORE, 1, 2], [IGNORE, 0, 2], [3, IGNORE, IGNORE]])
    logits = torch.full((3, 3, 4), 0.0)
    said = [[3, 1, 2], [3, 1, 2], [3, 0, 0]]
    for i, row in enumerate(said):
        for t, word in enumerate(row):
            logits[i, t, word] = 2.0
    metric = fedit.ExactMatch()
    weight = torch.tensor([2.0, 1.0, 1.0])
    state = metric.update(metric.init(), logits, {"labels": labels}, weight)
    assert metric.finish(state)["exact"] == pytest.approx(3 / 4)
    assert metric.finish(state)["loss"] == pytest.approx(
        float(torch.log(torch.tensor(2.718281828**2 + 3)) - 2 + 2 / 7), rel=1e-4
    )


def test_greedy_decoding_gives_the_answer_exactly_where_exact_match_counts_it() -> None:
    """On a net that was hardly trained, so that some answers are right and some are not."""
    net = fedit.backbone(steps=60, batch=64)
    tokens, labels, prompt = fedit.texts(fedit.seeds.rng(1, "greedy"), 90, "~")
    masked = fedit.masked(labels, prompt)
    decoded = []
    with torch.no_grad():
        forced = ((net(tokens).argmax(-1) == masked) | (masked == IGNORE)).all(1).tolist()
        for i in range(90):
            text, answer = tokens[i].clone(), masked[i][masked[i] != IGNORE]
            text[prompt[i] :] = 0
            for j in range(len(answer)):
                at = int(prompt[i]) + j
                word = net(text[None])[0, at - 1].argmax()
                if at < len(text):
                    text[at] = word
                if word != answer[j]:
                    break
            else:
                decoded.append(i)
    assert decoded == [i for i, right in enumerate(forced) if right]
    assert 0 < len(decoded) < 90


def test_the_exactness_check_fails_for_factor_averages() -> None:
    """FedIT's round, looked at as FedMomentum's is, misses the mean product."""
    task = fedmomentum.turned(0)
    kept = fedmomentum.watched(task, "fedmomentum", rounds=2, tau=1.0)
    averaged = fedmomentum.watched(task, "fedit", rounds=2)
    assert fedmomentum.exact(kept).holds and not fedmomentum.exact(averaged).holds
    assert max(layer.error for layer in averaged[1]) == pytest.approx(
        max(layer.factors_error for layer in averaged[1]), rel=1e-3
    )


def test_adapting_to_many_sines_at_once_is_adapting_to_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against one optimiser a sine, in its order of samples, on items it has not seen."""
    monkeypatch.setattr(tinyml, "NEW", 3)
    seen = tinyml.adapted(tinyml.network(1), seed=5)
    x, y = tinyml.sines(3, seed=5)
    errors = {steps: 0.0 for steps in tinyml.AFTER}
    for row in range(3):
        net = tinyml.network(1)
        rule = torch.optim.SGD(net.parameters(), lr=tinyml.RATE)
        for step in range(tinyml.ITEMS):
            rule.zero_grad()
            (net(x[row, step : step + 1]) - y[row, step : step + 1]).square().mean().backward()
            rule.step()
            if step + 1 in errors:
                with torch.no_grad():
                    unseen = net(x[row, tinyml.ITEMS :]) - y[row, tinyml.ITEMS :]
                errors[step + 1] += float(unseen.square().mean()) / 3
    assert seen == pytest.approx(errors, rel=1e-4)
    assert seen[8] != pytest.approx(seen[32], rel=0.01)


def test_what_the_claim_of_tinyml_lacks_is_one_line_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rdflib", None)
    assert main(["claim", "tinyml"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "isthmus[registry]" in err


def test_a_level_is_reached_at_the_first_look_that_shows_it() -> None:
    """A curve that crosses, falls back and ends below; one that never gets there."""
    looks = fedcompass.POINTS
    curve = [0.1] * 29 + [0.9] + [0.2] * (looks - 30)
    assert fedcompass.reached(curve) == pytest.approx(30 / looks * fedcompass.ROUNDS)
    assert fedcompass.reached([0.84] * looks) == float("inf")
    assert fedcompass.late([0.0] * (looks - looks // 4) + [0.5] * (looks // 4)) == 0.5
    assert fedcompass.late(curve) == pytest.approx(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", claim.names())
def test_the_claim_agrees_with_its_status(name: str) -> None:
    try:
        seen = claim.run(name)
    except MissingExtra as missing:
        pytest.skip(str(missing))
    assert len(seen.checks) > 1
    assert seen.contradiction is None, [check for check in seen.checks if not check.holds]
