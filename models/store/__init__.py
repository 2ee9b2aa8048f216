"""Every SQL statement that changes state, as a named function that says why.

Functions take an open `Connection` and never commit: whoever calls them owns the transaction.
Locks are taken in one order everywhere: job rows by id, chunk rows by id, results. A job is locked
`FOR NO KEY UPDATE`, which lets the foreign keys of result rows pass; on SQLite the writing
transaction itself is the lock. Every change of state is one guarded UPDATE: the old state stands
in its WHERE, and of several that try it at once only one hits the row.
"""
