"""From bags to verdicts.

In: sealed bags and the claims of the paper. Out: tidy tables, the integrity of each bag, validity gates, a verdict for
each claim with its interval. Reads records, never makes them.
"""
