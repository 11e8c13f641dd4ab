"""Doors: a request comes in, in some protocol; the log's events go out in that protocol's frames.

A door turns requests into `start`, `decide` and `cancel` of the engine and translates what the log
says. It never runs an agent and keeps no state. Each door exports a class with `routes()`.
"""
