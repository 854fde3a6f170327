"""External engines: what talks to analysis systems that are not ours, one leaf file for each dialect."""
