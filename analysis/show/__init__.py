"""What people see.

In: loaded runs and verdicts. Out: tables, pictures, the report page, and records in the formats of others. Only the
files `plots*.py` import matplotlib.
"""
