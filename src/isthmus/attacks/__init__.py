"""Attacks, each with the threat model that bounds what it sees."""
