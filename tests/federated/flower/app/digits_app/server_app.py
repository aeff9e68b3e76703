"""The server's half: FedAvg that adds the replies up in the order of the partitions."""

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_app.task import zeros

app = ServerApp()


class InOrder(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        replies = list(replies)
        good = [reply for reply in replies if reply.has_content()]
        good.sort(key=lambda reply: reply.content["metrics"]["partition"])
        return super().aggregate_train(
            server_round, good + [reply for reply in replies if reply.has_error()]
        )


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = context.run_config
    result = InOrder().start(
        grid=grid,
        initial_arrays=ArrayRecord(zeros()),
        num_rounds=run["num-server-rounds"],
    )
    if run["save-to"]:
        weights = result.arrays.to_numpy_ndarrays()
        seen = [result.train_metrics_clientapp[r]["seen"] for r in result.train_metrics_clientapp]
        accuracy = result.evaluate_metrics_clientapp[run["num-server-rounds"]]["accuracy"]
        np.savez(run["save-to"], *weights, seen=seen, accuracy=accuracy)
