"""Runs: where one thing is built from several families."""
