"""Run a save: the attempt, the records of the ranks, both halves, the commit.

Modules here do not plan: `plan` decides which bytes go where.
"""
