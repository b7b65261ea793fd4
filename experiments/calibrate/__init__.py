"""Where coefficients come from.

In: published measurements, or steps of the engine of this machine. Out: calibration files with their sources and their
held-out error.
"""
