"""The audit trail: messages of PS3.15 A.5, a file that cannot be changed unseen, and syslog to collectors."""
