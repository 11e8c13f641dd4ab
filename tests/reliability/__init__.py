"""The promises of docs/reliability.md, and what tries to break them.

Each test has a short form that always runs. The long one has the marker `soak`.
"""
