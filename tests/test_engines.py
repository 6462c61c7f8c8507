"""The engines as guests of a process that has other things to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

for package in ('onnx', 'openvino'):
    pytest.importorskip(package)

SIGNAL = """
import gc, signal, subprocess, sys, threading
from onnx import TensorProto, helper
from basicsr_quant.deploy.engines import openvino_compiled

sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ('input', 'output')]
graph = helper.make_graph([helper.make_node('Relu', ['input'], ['output'])], 'relu', sides[:1], sides[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=10)
held = [openvino_compiled(model.SerializeToString())]
other = threading.Thread(target=lambda: (held.clear(), gc.collect()))
other.start()
other.join()
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's DataLoader does
subprocess.run([sys.executable, '-c', ''])
print('alive')
"""


def test_a_signal_after_openvino_was_let_go_of_in_another_thread():
    """Its plugin would take the stack of signal handlers along, and the kernel would kill the process."""
    done = subprocess.run([sys.executable, '-X', 'faulthandler', '-c', SIGNAL], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, 'alive'), done.stderr
