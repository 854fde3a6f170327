"""Where things are kept: bytes in a folder, rows in SQLite."""
