"""Clients of others against a live gateway: each in an environment of its own, made when needed."""
