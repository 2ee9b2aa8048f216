"""Schedules that fire: `beat` and the commands do it through the same functions.

`firing_loop` looks for what is due and what has ended, `firing` makes the job of one scheduled
time, `ending` writes outputs and ends, `manual` fires for `run-now` and `backfill`, `views` shows
it all.
"""
