"""What a run leaves.

In: batches, step times and token times from any engine. Out: records (requests, steps, tokens), the metrics computed
from them, sealed bags, and where a record comes from: code, environment, machine. Also how every command speaks.
"""
