"""Sessions on nodes.

In: a plan of sessions, and a Ray cluster or this machine alone. Out: which session runs where and when, and the records
of all. Only this room imports Ray.
"""
