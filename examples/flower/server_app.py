"""The server's half."""

from isthmus.run.deployment import server_app

app = server_app()
