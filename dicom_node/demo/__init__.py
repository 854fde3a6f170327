"""Synthetic patients and the two models trained on them.

Everything here is for demonstration and for tests: procedural CT and chest radiographs
(`phantom_ct`, `phantom_cxr`), the DICOM files made from them (`phantom_dicom`), and the program that
trains the bundled model packages (`train`). Nothing in this package is derived from a real person, and
nothing trained here may be used on one.
"""
