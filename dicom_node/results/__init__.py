"""Findings to DICOM objects; the only importer of highdicom."""
