"""What to measure.

In: a figure, a testbed and a model as YAML and config.json, and a trace of request lengths. Out: sessions, trials and
points, and the requests of each; one clear line for bad input. Knows no engine.
"""
