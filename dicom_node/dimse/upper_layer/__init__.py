"""The DICOM upper layer protocol (PS3.8) without I/O: bytes in, events out; no socket, no thread, no clock."""
