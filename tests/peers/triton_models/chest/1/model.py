"""A model for Triton's Python backend: how bright a picture is on the whole, and how dark."""

import numpy as np
import triton_python_backend_utils as backend


class TritonPythonModel:
    """Two numbers that add up to 1."""

    def execute(self, requests):
        """A response for each request."""
        responses = []
        for request in requests:
            bright = float(backend.get_input_tensor_by_name(request, "picture").as_numpy().mean())
            tensor = backend.Tensor("probability", np.array([bright, 1 - bright], np.float32))
            responses.append(backend.InferenceResponse(output_tensors=[tensor]))
        return responses
