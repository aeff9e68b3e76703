"""Serving over HTTP: an OpenAI-compatible server in two parts, its page and its metrics."""
