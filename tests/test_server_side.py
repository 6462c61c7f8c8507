"""Files for engines and servers that are not here: what their documents ask for, read in the files."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import images, plan_of, tiny

from basicsr_quant.deploy.capture import integer_plan
from basicsr_quant.deploy.serving import check_repository, triton_config, write_repository
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')

from basicsr_quant.deploy.onnx_file import packed_onnx  # noqa: E402
from basicsr_quant.deploy.tensorrt import check_tensorrt  # noqa: E402


def file_for(engine, bits=8, **settings):
    plan = plan_of(tiny(), 'minmax', bits, zero_point='integer', **settings)
    net = quantize(tiny(), plan)
    method_of(plan).calibrate(net, [images(2, 16)])
    return packed_onnx(integer_plan(net.eval(), (1, 3, 16, 20), engine))


@pytest.mark.parametrize('bits', [8, 4])
def test_a_file_for_tensorrt_keeps_its_rules(bits):
    found = check_tensorrt(file_for('tensorrt', bits))
    assert found.faults == [] and found.integer == {'quantized tensors': 4, 'int8 weights': 4}


@pytest.mark.parametrize('bits, words', [
    (8, ['zero point of type uint8', 'takes int32']), (4, ['zero point of type uint8', 'takes Cast', 'takes Clip']),
])  # fmt: skip
def test_files_for_other_engines_do_not(bits, words):
    faults = check_tensorrt(file_for('onnxruntime', bits)).faults
    for word in words:
        assert any(word in fault for fault in faults), faults


# -------------------------------------------------------------------------------------------------------------- servers


CONFIGS = [
    ('onnxruntime', '.onnx', (None, 3, None, None)), ('openvino', '.xml', (None, 1, None, None)),
    ('openvino', '.onnx', (1, 3, None, None)), ('tensorrt', '.onnx', (None, 3, None, None)),
    ('onnxruntime', '.onnx', (1, 3, 96, 128)),
]  # fmt: skip


@pytest.mark.parametrize('engine, suffix, shape', CONFIGS)
def test_the_configuration_is_one_of_triton(engine, suffix, shape):
    """Read by the schema of Triton's own client, where that is installed."""
    grpc = pytest.importorskip('tritonclient.grpc')
    from google.protobuf import text_format

    config = text_format.Parse(triton_config('net', engine, suffix, shape), grpc.model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == ('net', engine)
    free = shape[0] is None
    assert config.max_batch_size == (8 if free else 0) and config.HasField('dynamic_batching') == free
    wanted = [side or -1 for side in (shape[1:] if free else shape)]
    assert list(config.input[0].dims) == wanted and config.input[0].data_type == grpc.model_config_pb2.TYPE_FP32
    assert len(config.output[0].dims) == len(wanted) and config.output[0].name == 'output'


@pytest.mark.parametrize('engine, suffix, shape', CONFIGS)
def test_the_configuration_says_what_the_file_takes(engine, suffix, shape):
    text = triton_config('net', engine, suffix, shape)
    assert text.count('{') == text.count('}') and text.count('[') == text.count(']')
    assert f'backend: "{engine}"' in text and ('dynamic_batching' in text) == (shape[0] is None)
    dims = {(None, 3, None, None): '3, -1, -1', (1, 3, None, None): '1, 3, -1, -1', (1, 3, 96, 128): '1, 3, 96, 128',
            (None, 1, None, None): '1, -1, -1'}  # fmt: skip
    assert f'name: "input", data_type: TYPE_FP32, dims: [ {dims[shape]} ]' in text


def test_a_repository_holds_the_file_under_its_name(tmp_path):
    for suffix in ('.xml', '.bin'):
        (tmp_path / f'net{suffix}').write_bytes(suffix.encode())
    folder = write_repository(str(tmp_path / 'models'), str(tmp_path / 'net.xml'), 'openvino', (None, 3, None, None))
    assert {str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file()} == {
        'config.pbtxt', '1/model.xml', '1/model.bin',
    }  # fmt: skip
    assert (folder / '1/model.bin').read_bytes() == b'.bin' and folder.name == 'net'


@pytest.mark.parametrize('model, words', [('mein netz.onnx', 'mein netz'), ('net.onnx', 'is a file')])
def test_repositories_that_are_refused(model, words, tmp_path):
    (tmp_path / 'there').write_text('')
    with pytest.raises(QuantError, match=words):
        check_repository(str(tmp_path / 'there'), model)


@pytest.mark.parametrize('binary', [True, False])
def test_the_client_speaks_the_protocol(binary, tmp_path, monkeypatch):
    """Against a server of the standard library that answers as KServe's protocol v2 says, with tensors as numbers, or
    as binary data where it says that it takes them: it enlarges by repeating pixels."""
    pytest.importorskip('cv2')
    spec = importlib.util.spec_from_file_location('client', Path(__file__).parents[1] / 'docs/deploy/client.py')
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == '/v2'
            self.answer({'name': 'here', 'extensions': ['binary_tensor_data'] if binary else []})

        def do_POST(self):
            body = self.rfile.read(int(self.headers['Content-Length']))
            size = int(self.headers['Inference-Header-Content-Length']) if binary else len(body)
            given = json.loads(body[:size])['inputs'][0]
            assert (given['name'], given['datatype']) == ('input', 'FP32')
            if binary:
                assert given['parameters']['binary_data_size'] == len(body) - size
            values = np.frombuffer(body[size:], '<f4') if binary else np.array(given['data'], np.float32)
            seen.append((self.path, given['shape']))
            made = values.reshape(given['shape']).repeat(2, 2).repeat(2, 3)
            content = made.tobytes() if binary else b''
            more = {'parameters': {'binary_data_size': len(content)}} if binary else {'data': made.ravel().tolist()}
            output = {'name': 'output', 'datatype': 'FP32', 'shape': list(made.shape), **more}
            self.answer({'model_name': 'net', 'outputs': [output]}, content)

        def answer(self, message, content=b''):
            head = json.dumps(message).encode()
            self.send_response(200)
            if content:
                self.send_header('Inference-Header-Content-Length', str(len(head)))
            self.send_header('Content-Length', str(len(head) + len(content)))
            self.end_headers()
            self.wfile.write(head + content)

        def log_message(self, *_):
            pass

    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    with client.PngFile(tmp_path / 'a.png', 20, 30, 3, np.uint8) as file:
        file.write(picture)
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr('sys.argv', [
            'client.py', str(tmp_path / 'a.png'), str(tmp_path / 'b.png'), '--model', 'net', '--tile', '16',
            '--url', f'http://127.0.0.1:{server.server_port}',
        ])  # fmt: skip
        client.main()
        server.shutdown()
    np.testing.assert_array_equal(client.read_image(tmp_path / 'b.png'), picture.repeat(2, 0).repeat(2, 1))
    assert {path for path, _ in seen} == {'/v2/models/net/infer'} and len(seen) > 1
