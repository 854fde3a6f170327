"""dicom-node: a DICOM-native PACS node with AI routing."""

__version__ = "0.1.0"
