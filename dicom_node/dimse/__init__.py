"""The wires: DICOM upper layer and message exchange. Only `pynetdicom_*` imports pynetdicom."""
