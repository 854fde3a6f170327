"""A MONAI Label app without weights: a threshold on Hounsfield units, read and written as other apps do."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import LoadImage
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.transform.writer import Writer

LABELS = {"soft tissue": 1, "bone": 2}
SOFT, BONE, HELD_S = 20, 150, 120.0


class Threshold(InferTask):  # type: ignore[misc]
    """Soft tissue from 20 HU, bone from 150 HU; both more when params say so."""

    def is_valid(self) -> bool:
        """There are no weights that could be missing."""
        return True

    def __call__(self, request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The path of the label map. Works for as long as the file that params call `hold` is there."""
        image = LoadImage(image_only=True, ensure_channel_first=False)(request["image"])
        hold, began = Path(request.get("hold", "/nonexistent")), time.monotonic()
        while hold.exists() and time.monotonic() - began < HELD_S:
            hold.with_suffix(".held").touch()
            time.sleep(0.05)
        values, above = np.asarray(image), request.get("above", 0)
        labels = np.where(values >= BONE + above, 2, np.where(values >= SOFT + above, 1, 0))
        meta = {"affine": np.asarray(image.affine)}
        written: tuple[Any, dict[str, Any]] = Writer(label="pred")(
            {**request, "pred": labels.astype(np.uint8), "pred_meta_dict": meta, "image_path": request["image"]}
        )
        return written


class MyApp(MONAILabelApp):  # type: ignore[misc]
    """The name the server looks for."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(app_dir=app_dir, studies=studies, conf=conf, name="MONAILabel - Threshold", labels=LABELS)

    def init_infers(self) -> dict[str, InferTask]:
        """The one model."""
        return {"threshold": Threshold(InferType.SEGMENTATION, LABELS, 3, "A threshold on Hounsfield units")}
