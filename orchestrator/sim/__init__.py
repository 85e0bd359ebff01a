"""Whole lives of jobs under a virtual clock: the real machine, records, policies and tasks over
the store and the market in memory, with agents, customers and faults imitated.

One thread, one heap of events, one seeded random: the same seed gives the same run, to the last
event. `docs/simulation.md` says what is checked, and how.
"""
