"""Tables of studies' verdicts, jobs and deliveries."""

from __future__ import annotations

from sqlite_utils import Migrations

queue_migrations = Migrations("queue")
