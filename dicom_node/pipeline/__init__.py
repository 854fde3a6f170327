"""The flow: ingest, route, work, deliver. Reads like the data."""
