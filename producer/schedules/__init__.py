"""Schedules that fire: `beat` and the commands do it through the same functions.

`scheduler` looks for what is due and what has ended, `firing` makes the job of one slot, `ending`
writes outputs and ends, `by_hand` fires for `run-now` and `backfill`, `views` shows it all.
"""
