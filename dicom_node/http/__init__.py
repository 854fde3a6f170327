"""The small HTTP face: health and metrics."""
