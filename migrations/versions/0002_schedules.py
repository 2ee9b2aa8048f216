"""What schedules need to fire, and webhooks.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    # Plain ALTERs, which SQLite knows too: a copy of the table would empty `jobs.firing_id`.
    kind = sa.Column("kind", sa.String(length=16), nullable=False, server_default="due")
    op.add_column("firings", kind)
    op.add_column("firings", sa.Column("since_utc", TIME, nullable=True))
    op.add_column("firings", sa.Column("output", sa.Text(), nullable=True))
    op.add_column(
        "firings", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0")
    )
    open_firings = sa.text("state IN ('claimed', 'submitted')")
    op.create_index(
        "ix_firings_open",
        "firings",
        ["schedule_id"],
        unique=False,
        sqlite_where=open_firings,
        postgresql_where=open_firings,
    )
    claimed = sa.text("state = 'claimed'")
    op.create_index(
        "ix_firings_claimed",
        "firings",
        ["lease_until"],
        unique=False,
        sqlite_where=claimed,
        postgresql_where=claimed,
    )
    op.create_index("ix_schedules_next_at", "schedules", ["next_at", "id"], unique=False)
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=16), nullable=True),
        sa.Column("firing_id", sa.Integer(), nullable=True),
        sa.Column("occasion", sa.String(length=16), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", TIME, nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("finished_at", TIME, nullable=True),
        sa.CheckConstraint(
            "state IN ('waiting', 'due', 'delivered', 'failed', 'dropped')",
            name=op.f("ck_webhooks_state"),
        ),
        sa.CheckConstraint(
            "occasion IN ('complete', 'failure')", name=op.f("ck_webhooks_occasion")
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_webhooks_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["firing_id"],
            ["firings.id"],
            name=op.f("fk_webhooks_firing_id_firings"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_index("ix_webhooks_job_id", "webhooks", ["job_id"], unique=False)
    op.create_index("ix_webhooks_firing_id", "webhooks", ["firing_id"], unique=False)
    open_webhooks = sa.text("state IN ('waiting', 'due')")
    op.create_index(
        "ix_webhooks_open",
        "webhooks",
        ["state", "next_attempt_at"],
        unique=False,
        sqlite_where=open_webhooks,
        postgresql_where=open_webhooks,
    )


def downgrade() -> None:
    op.drop_table("webhooks")
    op.drop_index("ix_schedules_next_at", table_name="schedules")
    op.drop_index("ix_firings_claimed", table_name="firings")
    op.drop_index("ix_firings_open", table_name="firings")
    for column in ("attempts", "output", "since_utc", "kind"):
        op.drop_column("firings", column)
