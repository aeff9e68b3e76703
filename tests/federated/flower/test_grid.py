"""An unmodified Flower app on the in-process grid: weights, state, bytes, time, failures."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cli import main
from isthmus.errors import InputError
from isthmus.federated.flower import app as apps
from isthmus.federated.flower import ready
from isthmus.federated.flower.app import opened, play
from isthmus.wire.ledger import Ledger
from isthmus.wire.link import Link

pytest.importorskip("flwr")
ready()

APP = Path(__file__).parent / "app"
ROUNDS, CLIENTS = 3, 5


def by_hand() -> tuple[list[np.ndarray], float]:
    """The app's algorithm without Flower: the same operations in the same order."""
    with opened(APP):
        from digits_app.task import accuracy, part, train, zeros  # pyright: ignore

        weights = zeros()
        for round in range(1, ROUNDS + 1):
            made, counts = [], []
            for i in range(CLIENTS):
                x, y = part(i, CLIENTS)
                made.append(train(weights, x, y, 0.5, 1, [i, round])[0])
                counts.append(len(y))
            total = sum(counts)
            weights = []
            for layer in zip(*made, strict=True):
                mean = layer[0] * (counts[0] / total)
                for x, n in zip(layer[1:], counts[1:], strict=True):
                    mean = mean + x * (n / total)
                weights.append(mean)
        shares = [len(part(i, CLIENTS)[1]) for i in range(CLIENTS)]
        right = [accuracy(weights, *part(i, CLIENTS)) for i in range(CLIENTS)]
    return weights, float(np.average(right, weights=shares))


def test_the_weights_have_the_bits_of_the_same_loop_by_hand(tmp_path: Path) -> None:
    ran = apps.run(APP, f"save-to='{tmp_path / 'end.npz'}'")
    end = np.load(tmp_path / "end.npz")
    weights, accuracy = by_hand()
    assert np.array_equal(end["arr_0"], weights[0]) and np.array_equal(end["arr_1"], weights[1])
    assert end["accuracy"] == pytest.approx(accuracy, abs=1e-12) and accuracy > 0.85
    assert (ran.nodes, ran.messages, ran.failed) == (CLIENTS, 2 * CLIENTS * ROUNDS, 0)
    assert end["seen"].tolist() == [1.0, 2.0, 3.0]  # a node's context stays with it
    assert "digits_app" not in sys.modules and str(APP) not in sys.path


def test_every_message_is_entered_with_its_bytes_and_time() -> None:
    ledger = Ledger()
    link = Link.parse("up=1e6,down=4e6,latency=0.01")
    ran = apps.run(APP, "num-server-rounds=2", count=4, link=link, ledger=ledger)
    rows = list(ledger.rows())
    assert len(rows) == 2 * 2 * 2 * 4
    assert {row["kind"] for row in rows} == {"train", "evaluate"}
    assert [row["round"] for row in rows if row["from"] == "server"] == [1] * 8 + [2] * 8
    for row in rows:
        rate = 4e6 if row["from"] == "server" else 1e6
        assert row["seconds"] == pytest.approx(8 * row["bytes"] / rate + 0.01, abs=1e-11)
        there = row["from"] == "server" or row["kind"] == "train"
        assert (
            row["values"] == (8 * (64 * 10 + 10) if there else 0) and row["bytes"] > row["values"]
        )
    slowest = sum(max(row["seconds"] for row in rows[i : i + 4]) for i in range(0, len(rows), 4))
    assert ran.seconds == pytest.approx(slowest, abs=1e-9)
    assert ran.bytes_up == sum(row["bytes"] for row in rows if row["to"] == "server")


def test_a_client_that_raises_is_an_error_message_and_counted(tmp_path: Path) -> None:
    ledger = Ledger()
    config = f"fail-partition=2 num-server-rounds=2 save-to='{tmp_path / 'end.npz'}'"
    ran = apps.run(APP, config, ledger=ledger)
    assert ran.failed == 2
    failed = [row for row in ledger.rows() if row["note"] == "failed"]
    assert [(row["from"], row["kind"], row["values"]) for row in failed] == [
        ("client/2", "train", 0)
    ] * 2
    assert all(row["bytes"] > len("out of memory") for row in failed)
    assert np.load(tmp_path / "end.npz")["seen"].tolist() == [1.0, 2.0]  # the others went on


def halves(main: Any, reply: Any = None) -> tuple[Any, Any]:
    """A server's half from a function, and a client that echoes."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    server, client = ServerApp(), ClientApp()
    server.main()(main)
    client.query()(reply or (lambda message, context: Message(message.content, reply_to=message)))
    return server, client


def bytes_of(length: int) -> Any:
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"c": ConfigRecord({"data": b"\0" * length})})


def test_replies_come_when_they_are_due() -> None:
    got: list[Any] = []

    def serve(grid: Any, context: Any) -> None:
        from flwr.app import Message

        long, short = list(grid.get_node_ids())
        ids = grid.push_messages(
            [Message(bytes_of(50_000), long, "query"), Message(bytes_of(100), short, "query")]
        )
        while ids:
            replies = list(grid.pull_messages(ids))
            got.append(([r.metadata.src_node_id == long for r in replies], grid.now))
            ids = [i for i in ids if i not in {r.metadata.reply_to_message_id for r in replies}]
        early = grid.send_and_receive(
            [Message(bytes_of(size), node, "query") for size, node in ((50_000, long), (9, short))],
            timeout=0.1,
        )
        got.append(([r.metadata.src_node_id == long for r in early], grid.now - got[-1][1]))

    server, client = halves(serve)
    link = Link(up=1e6, down=1e6)
    play(server, client, {}, 2, link, Ledger())
    (first, at), (second, later), (early, waited) = got
    assert (first, second, early) == ([False], [True], [False])
    assert 2 * 8 * 100 / 1e6 < at < later / 50
    assert later == pytest.approx(2 * 8 * 50_000 / 1e6, rel=0.01)
    assert waited == pytest.approx(0.1)


def test_what_is_lost_is_an_error_of_flowers_own_number() -> None:
    codes: list[int] = []

    def serve(grid: Any, context: Any) -> None:
        from flwr.app import Message

        for reply in grid.send_and_receive(
            [Message(bytes_of(10), node, "query") for node in grid.get_node_ids()]
        ):
            codes.append(reply.error.code if reply.has_error() else 0)

    called: list[int] = []

    def reply(message: Any, context: Any) -> Any:
        from flwr.app import Message

        called.append(context.node_config["partition-id"])
        return Message(message.content, reply_to=message)

    ledger = Ledger()
    server, client = halves(serve, reply)
    grid = play(server, client, {}, 60, Link(loss=0.4, attempts=1), ledger, seed=3)
    none, back = codes.count(5), codes.count(4)
    assert len(codes) == 60 and min(none, back, codes.count(0)) > 5
    assert len(called) == 60 - none and grid.failed == none + back
    assert ledger.total("rows", note="lost") == none + back


def test_a_message_that_is_sent_again_is_entered_again_under_its_own_kind() -> None:
    def serve(grid: Any, context: Any) -> None:
        from flwr.app import Message

        kinds = ["query", "query.mine"] * 10
        asked = [
            Message(bytes_of(10), node, kind)
            for node, kind in zip(grid.get_node_ids(), kinds, strict=True)
        ]
        assert len(grid.send_and_receive(asked)) == 20

    ledger = Ledger()
    server, client = halves(serve)
    client.query("mine")(lambda message, context: Message(message.content, reply_to=message))
    from flwr.app import Message

    grid = play(server, client, {}, 20, Link(loss=0.5, attempts=50), ledger)
    assert grid.failed == 0 and ledger.total("rows", note="lost") > 10
    for row in ledger.rows():
        client_number = row["sequence"]
        assert row["kind"] == ("query.mine" if client_number % 2 else "query")


def test_generators_and_shared_records_do_not_leak() -> None:
    """A generator that changes what it has sent, and a client that changes what it was sent."""
    seen: list[int] = []

    def serve(grid: Any, context: Any) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict

        record = ConfigRecord({"k": 0})

        def messages() -> Any:
            for i, node in enumerate(grid.get_node_ids()):
                record["k"] = i
                yield Message(RecordDict({"c": record}), node, "query")

        replies = grid.send_and_receive(messages())
        seen.extend(reply.content["c"]["k"] for reply in replies)
        assert record["k"] == 3
        shared = RecordDict({"c": ConfigRecord({"k": 7})})
        replies = grid.send_and_receive(
            [Message(shared, node, "query") for node in grid.get_node_ids()]
        )
        seen.extend(reply.content["c"]["k"] for reply in replies)
        assert shared["c"]["k"] == 7

    def reply(message: Any, context: Any) -> Any:
        from flwr.app import Message

        message.content["c"]["k"] += 10
        return Message(message.content, reply_to=message)

    server, client = halves(serve, reply)
    play(server, client, {}, 4, Link(), Ledger())
    assert seen == [10, 11, 12, 13, 17, 17, 17, 17]


def test_the_global_generators_are_seeded_and_put_back() -> None:
    drawn: list[Any] = []

    def serve(grid: Any, context: Any) -> None:
        drawn.append((random.random(), float(np.random.rand()), list(grid.get_node_ids())))

    server, client = halves(serve)
    random.seed(1)
    expected = random.Random(1).random()
    for seed in (4, 4, 5):
        play(server, client, {}, 3, Link(), Ledger(), seed)
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0][2])) == 3
    assert random.random() == expected


def test_an_app_of_the_older_interface_runs() -> None:
    from flwr.client import NumPyClient
    from flwr.clientapp import ClientApp
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.serverapp import ServerApp

    end: list[np.ndarray] = []

    class Client(NumPyClient):
        def __init__(self, number: int) -> None:
            self.number = number

        def fit(self, parameters: Any, config: Any) -> Any:
            return [parameters[0] + self.number], self.number, {}

    class Kept(FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            assert not failures
            made = super().aggregate_fit(server_round, results, failures)
            end[:] = parameters_to_ndarrays(made[0])
            return made

    def clients(context: Any) -> Any:
        return Client(int(context.node_config["partition-id"]) + 1).to_client()

    def server(context: Any) -> Any:
        start = ndarrays_to_parameters([np.zeros(2)])
        strategy = Kept(initial_parameters=start, fraction_evaluate=0.0, min_available_clients=3)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    grid = play(ServerApp(server_fn=server), ClientApp(clients), {}, 3, Link(), Ledger())
    mean = (1 * 1 + 2 * 2 + 3 * 3) / 6
    assert end[0].tolist() == pytest.approx([2 * mean, 2 * mean]) and grid.failed == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((), "app: empty: Cannot find pyproject.toml"),
        (("[tool.flwr.app]", "[tool.other]"), "[tool.flwr.app]"),
        (("server_app:app", "server_ap:app"), "serverapp: digits_app.server_ap:app given"),
        (("client_app:app", "client_app:ap"), "clientapp: digits_app.client_app:ap given"),
        (("client_app:app", "client_app:fit"), "a function given, allowed: a ClientApp"),
    ],
)
def test_a_folder_that_is_no_app_is_said_in_one_line(
    change: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if change:
        text = (APP / "pyproject.toml").read_text().replace(*change)
        (folder / "pyproject.toml").write_text(text)
        (folder / "digits_app").symlink_to(APP / "digits_app")
    with pytest.raises(InputError) as error, opened(folder):
        pass
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run-config", "rounds=3"], "run-config: rounds=3"),
        (["--run-config", "lr=abc"], "run-config: lr=abc"),
        (["--num-supernodes", "0"], "num-supernodes: 0 given"),
        (["--link", "wify"], "nearest: wifi"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flower-run", str(APP), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ledger.jsonl"
    options = ["--num-supernodes", "3", "--run-config", "num-server-rounds=1", "--out", str(out)]
    assert main(["flower-run", str(APP), *options]) == 0
    said = capsys.readouterr().out
    assert "digits-app: 3 clients, 6 messages, 0 failed" in said and f"ledger: {out}" in said
    assert len(Ledger.read(out)) == 12


def test_telemetry_is_off_unless_the_user_says_so() -> None:
    code = (
        "import os; os.environ.update({}); from isthmus.federated.flower import ready\n"
        "print(sorted(ready())); from flwr.supercore import telemetry as t\n"
        "print(t.FLWR_TELEMETRY_ENABLED, os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    for given, line in (("{}", "0 0"), ("{'FLWR_TELEMETRY_ENABLED': '1'}", "1 0")):
        environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{}", given)],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        names, values = done.stdout.splitlines()
        assert ("FLWR_TELEMETRY_ENABLED" in names) == (given == "{}") and values == line
