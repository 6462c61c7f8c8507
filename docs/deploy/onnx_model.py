"""A file of ``basicsr export`` in MLServer (https://github.com/SeldonIO/MLServer), which speaks KServe's protocol v2.

    models/edsr_x4/model-settings.json: {"name": "edsr_x4", "implementation": "onnx_model.OnnxModel",
                                         "parameters": {"uri": "./edsr_x4.onnx"}}
    PYTHONPATH=docs/deploy mlserver start models
"""

from __future__ import annotations

import onnxruntime
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec
from mlserver.utils import get_model_uri


class OnnxModel(MLModel):
    """ONNX Runtime behind MLServer's queue; float32 (N, C, H, W) in and (N, C, H scale, W scale) out, both in 0-1."""

    async def load(self) -> bool:
        file = await get_model_uri(self.settings)
        self.session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0])
        output = self.session.run(['output'], {'input': images})[0]
        return types.InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output('output', output)])
