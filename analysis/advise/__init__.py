"""Which chunk size to take.

In: a calibration, a trace of request lengths, latency targets. Out: the capacity at each chunk size, the best one with
its evidence, and how well the simulator predicts what was measured.
"""
