"""The same on a virtual clock.

In: a session and a calibration, the coefficients of the cost model. Out: the records that an engine would leave, marked
as simulated, and from them how long a plan takes.
"""
