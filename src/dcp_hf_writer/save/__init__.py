"""Running a save: the attempt, the records of the ranks, both halves, the commit.

Modules here do not plan: what goes where comes from `plan`.
"""
