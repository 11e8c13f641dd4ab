"""Ownware Gateway runs LLM agents and streams what they do, from an append-only log."""

__version__ = "0.1.0"
