"""A client's half."""

from isthmus.run.deployment import node_app

app = node_app()
