"""The benchmarks: what the gateway does, beside what the machine could do, in the same run.

`make bench` runs them; docs/performance.md says what they mean and what came out. The gateway, the
model server and the load client are processes of their own.
"""
