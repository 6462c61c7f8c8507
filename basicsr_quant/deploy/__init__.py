"""From a quantized network to files that run in integers: plan, ONNX, parity, engines, tiles."""
