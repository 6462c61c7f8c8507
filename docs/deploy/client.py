"""Up-scales an image through a model server: Triton, OpenVINO Model Server, or any that speaks KServe's protocol v2.

    python docs/deploy/client.py photo.png large.png --model edsr_x4 --url http://localhost:8000
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path

import torch

from basicsr_quant.data.image_files import read_image, through_network
from basicsr_quant.data.png_file import PngFile
from basicsr_quant.deploy.tiles import Tiling, upscale


def infer(url: str, model: str, images: torch.Tensor) -> torch.Tensor:
    """One request with binary data: (N, C, H, W) float32 in and out."""
    content = images.contiguous().numpy().astype('<f4').tobytes()
    tensor = {'name': 'input', 'shape': list(images.shape), 'datatype': 'FP32',
              'parameters': {'binary_data_size': len(content)}}  # fmt: skip
    wanted = {'name': 'output', 'parameters': {'binary_data': True}}
    header = json.dumps({'inputs': [tensor], 'outputs': [wanted]}).encode()
    request = urllib.request.Request(
        f'{url}/v2/models/{model}/infer', header + content, {'Inference-Header-Content-Length': str(len(header))}
    )
    with urllib.request.urlopen(request) as answer:
        size, body = int(answer.headers['Inference-Header-Content-Length']), answer.read()
    shape = json.loads(body[:size])['outputs'][0]['shape']
    return torch.frombuffer(bytearray(body[size:]), dtype=torch.float32).reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--model', required=True, help='its folder in the model repository')
    parser.add_argument('--url', default='http://localhost:8000')
    parser.add_argument('--tile', type=int, default=256)
    args = parser.parse_args()
    image = read_image(args.input)
    scale = infer(args.url, args.model, torch.zeros(1, 3, 32, 32)).shape[-1] // 32
    bands = through_network(
        image, 3, scale,
        lambda part: upscale(lambda tiles: infer(args.url, args.model, tiles), part, scale, Tiling(args.tile)),
    )  # fmt: skip
    channels = 1 if image.ndim == 2 else image.shape[2]
    with PngFile(args.output, image.shape[0] * scale, image.shape[1] * scale, channels, image.dtype) as file:
        for band in bands:
            file.write(band)


if __name__ == '__main__':
    main()
