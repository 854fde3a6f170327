"""The two model.yaml files as data: networks, where they apply, what their outputs mean.

Plain values only. `train` fills in the digest of the weights and the thresholds.
"""

from __future__ import annotations

from typing import Any

from dicom_node.demo.phantom_cxr import FINDING_NAMES

__all__ = ["CT_NETWORK", "CXR_NETWORK", "WEIGHTS_FILE", "ct_package", "cxr_package"]

WEIGHTS_FILE = "weights.safetensors"

CT_NETWORK: dict[str, Any] = {
    "name": "UNet",
    "args": {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 4,
        "channels": [12, 24, 48, 96],
        "strides": [2, 2, 2],
        "num_res_units": 2,
        "norm": "BATCH",
    },
}
CXR_NETWORK: dict[str, Any] = {
    "name": "ResNet",
    "args": {
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [16, 32, 64, 128],
        "spatial_dims": 2,
        "n_input_channels": 1,
        "conv1_t_size": 7,
        "conv1_t_stride": 2,
        "num_classes": len(FINDING_NAMES),
    },
}

_INTENDED_USE = {
    "status": "demonstration",
    "text": "Demonstration, trained on synthetic phantoms, not for clinical use.",
    "regulatory": "none",
}
# Pleural thickening has no code in a public scheme that could be verified: private until someone has one.
_FINDING_CODES = {
    "tuberculosis": ["SCT", "154283005", "Pulmonary tuberculosis"],
    "cardiomegaly": ["SCT", "8186001", "Cardiomegaly"],
    "pleural_thickening": ["99DICOMNODE", "PLTHICK", "Pleural thickening"],
    "pleural_effusion": ["SCT", "60046008", "Pleural effusion"],
    "pneumothorax": ["SCT", "36118008", "Pneumothorax"],
    "consolidation": ["SCT", "95436008", "Lung consolidation"],
    "atelectasis": ["SCT", "46621007", "Atelectasis"],
    "nodule_mass": ["SCT", "309529002", "Lung mass"],
    "fibrosis": ["SCT", "51615001", "Fibrosis of lung"],
    "infiltration": ["DCM", "112121", "Infiltrate"],
    "calcification": ["DCM", "112063", "Abnormal calcifications"],
}
_ANATOMICAL_STRUCTURE = ["SCT", "91723000", "Anatomical Structure"]
# `expected` is where an organ must lie, told by another one: only a scan that covers that may call it absent
_ORGANS = (
    # index, key, SCT code and meaning, display colour (RGB), clean-up and where to expect it
    (
        *(1, "liver", ["SCT", "10200004", "Liver"], [221, 130, 101]),
        {"keep": "largest_component", "min_ml": 20, "expected": [{"near": "kidney", "above_mm": 150}]},
    ),
    (
        *(2, "spleen", ["SCT", "78961009", "Spleen"], [157, 108, 162]),
        {"keep": "largest_component", "min_ml": 5, "expected": [{"near": "liver", "above_mm": 10}]},
    ),
    (
        *(3, "kidney", ["SCT", "64033007", "Kidney"], [185, 102, 83]),
        {"min_ml": 5, "expected": [{"near": "liver", "below_mm": 80}]},
    ),
)


def _head(model_id: str, task: str, sha256: str, network: dict[str, Any], limits: list[str]) -> dict[str, Any]:
    return {
        "schema": 1,
        "id": model_id,
        "version": "1.0.0",
        "manufacturer": "dicom-node",
        "task": task,
        "trust": "data",
        "source": {
            "format": "state_dict",
            "path": WEIGHTS_FILE,
            "sha256": sha256,
            "network": network,
        },
        "intended_use": {**_INTENDED_USE, "limits": limits},
    }


def ct_package(sha256: str) -> dict[str, Any]:
    """model.yaml of the abdominal CT segmentation."""
    head = _head("demo-ct-abdomen", "segmentation", sha256, CT_NETWORK, ["adult abdomen CT phantoms"])
    return {
        **head,
        "select": {
            "modality": ["CT"],
            "sop_class": ["CTImageStorage"],
            "body_part": {
                "any": ["ABDOMEN", "ABDOMENPELVIS", "CHESTABDOMEN", "CHESTABDPELVIS"],
                "missing": "allow",
            },
            "geometry": {
                "min_slices": 10,
                "max_spacing_mm": 8,
                "orientation": "axial",
                "regular": "require",
                "min_coverage_mm": 60,
            },
            "exclude": {"image_type": ["LOCALIZER", "MIP"], "description_contains": ["scout", "dose"]},
        },
        "input": {
            "orientation": "RAS",
            "spacing_mm": [4, 4, 4],
            "mode": "linear",
            "intensity": {"clip": [-160, 240], "to": [-1, 1]},
            "padding_hu": -1000,
        },
        "infer": {"window": [64, 64, 64], "overlap": 0.25, "blend": "gaussian"},
        "output": {
            "activation": "softmax",
            "labels": [
                {
                    "index": index,
                    "key": key,
                    "color": color,
                    "segment": {"category": list(_ANATOMICAL_STRUCTURE), "type": code},
                    **clean_up,
                }
                for index, key, code, color, clean_up in _ORGANS
            ],
        },
        "metrics": {"file": "eval.json"},
    }


def cxr_package(sha256: str, thresholds: dict[str, float]) -> dict[str, Any]:
    """model.yaml of the chest radiograph classification."""
    head = _head("demo-cxr-findings", "classification", sha256, CXR_NETWORK, ["frontal chest phantoms"])
    return {
        **head,
        "select": {
            "modality": ["DX", "CR"],
            "sop_class": ["DigitalXRayImageStorageForPresentation", "ComputedRadiographyImageStorage"],
            "body_part": {"any": ["CHEST"], "missing": "allow"},
            "view": {"any": ["PA", "AP"], "missing": "refuse"},
        },
        "input": {"prepare": "radiograph", "size": 192, "gate": "frontal_chest"},
        "infer": {"batch": "auto"},
        "output": {
            "activation": "sigmoid",
            "findings": [
                {
                    "key": key,
                    "name": name,
                    "index": index,
                    "threshold": thresholds[key],
                    "code": _FINDING_CODES[key],
                }
                for index, (key, name) in enumerate(FINDING_NAMES.items())
            ],
        },
        "metrics": {"file": "eval.json"},
    }
