"""${message}

Rules for every migration, so that a fleet can be upgraded while it works:

* Workers of the previous release run on while it is applied: add before you remove; a column is
  nullable or has a server default; what is dropped or renamed has been unused for one release.
* It goes up, down and up again on filled tables, on SQLite and on PostgreSQL (tests/migrations).
* It is one transaction, in which no lock is waited for longer than `lock_timeout`, which the runner
  sets. An index on a large table blocks writers for as long as it takes: the release's notes say so.

Revision: ${up_revision}
Down: ${down_revision | comma,n}
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
