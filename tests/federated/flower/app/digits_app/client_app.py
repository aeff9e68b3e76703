"""The client's half."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import accuracy, part, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    mine, of = context.node_config["partition-id"], context.node_config["num-partitions"]
    if mine == context.run_config["fail-partition"]:
        raise RuntimeError("out of memory")
    seen = int(context.state["seen"]["rounds"]) if "seen" in context.state else 0
    context.state["seen"] = MetricRecord({"rounds": seen + 1})
    x, y = part(mine, of)
    config, run = message.content["config"], context.run_config
    weights, loss = train(
        message.content["arrays"].to_numpy_ndarrays(),
        x,
        y,
        run["lr"],
        run["local-epochs"],
        [mine, config["server-round"]],
    )
    config["server-round"] = -1  # a client's copy is its own
    metrics = {"loss": loss, "num-examples": len(y), "partition": mine, "seen": seen + 1}
    content = RecordDict({"arrays": ArrayRecord(weights), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    x, y = part(context.node_config["partition-id"], context.node_config["num-partitions"])
    weights = message.content["arrays"].to_numpy_ndarrays()
    metrics = {"accuracy": accuracy(weights, x, y), "num-examples": len(y)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
