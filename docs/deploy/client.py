"""Up-scales an image through a model server: Triton, OpenVINO Model Server, MLServer, any with KServe's protocol v2.

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


def takes_binary(url: str) -> bool:
    """Whether the server says that tensors may follow the JSON as they are, an extension of the protocol."""
    with urllib.request.urlopen(f'{url}/v2') as answer:
        return 'binary_tensor_data' in json.loads(answer.read()).get('extensions', [])


def infer(url: str, model: str, images: torch.Tensor, binary: bool) -> torch.Tensor:
    """One request: (N, C, H, W) float32 in and out, as bytes behind the JSON or as numbers in it."""
    values = images.contiguous().numpy().astype('<f4')
    tensor = {'name': 'input', 'shape': list(images.shape), 'datatype': 'FP32'}
    if binary:
        content = values.tobytes()
        tensor['parameters'] = {'binary_data_size': len(content)}
    else:
        content = b''
        tensor['data'] = values.ravel().tolist()
    wanted = {'name': 'output', 'parameters': {'binary_data': binary}}
    header = json.dumps({'inputs': [tensor], 'outputs': [wanted]}).encode()
    fields = {'Inference-Header-Content-Length': str(len(header))} if binary else {'Content-Type': 'application/json'}
    request = urllib.request.Request(f'{url}/v2/models/{model}/infer', header + content, fields)
    with urllib.request.urlopen(request) as answer:
        body = answer.read()
        size = int(answer.headers.get('Inference-Header-Content-Length', len(body)))
    output = json.loads(body[:size])['outputs'][0]
    if 'data' in output:
        return torch.tensor(output['data'], dtype=torch.float32).reshape(output['shape'])
    return torch.frombuffer(bytearray(body[size:]), dtype=torch.float32).reshape(output['shape'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--model', required=True, help='its folder in the model repository')
    parser.add_argument('--url', default='http://localhost:8000')
    parser.add_argument('--tile', type=int, default=256)
    parser.add_argument('--binary', action='store_true', help='for servers that take binary tensors and do not say so')
    args = parser.parse_args()
    image = read_image(args.input)
    binary = args.binary or takes_binary(args.url)

    def network(tiles: torch.Tensor) -> torch.Tensor:
        return infer(args.url, args.model, tiles, binary)

    scale = network(torch.zeros(1, 3, 32, 32)).shape[-1] // 32
    bands = through_network(image, 3, scale, lambda part: upscale(network, part, scale, Tiling(args.tile)))
    channels = 1 if image.ndim == 2 else image.shape[2]
    with PngFile(args.output, image.shape[0] * scale, image.shape[1] * scale, channels, image.dtype) as file:
        for band in bands:
            file.write(band)


if __name__ == '__main__':
    main()
