"""Writing an integer plan as an ONNX file with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import QuantError
from .capture import IntegerPlan, free_sizes
from .operators import ACTIVATION, CODES, CONSTANT, INTEGERS, MATRIX_PRODUCT, WHOLE

OPSET = 21
"""The first opset with 4-bit integers; every engine named here reads it."""
OPSETS = (21, 22, 23)
_INSTALL = 'pip install "basicsr_quant[deploy]", or: pip install onnx onnxscript onnxruntime'


def need(*packages: str) -> None:
    """Refuse in one sentence where a package is not installed.

    Raises:
        QuantError: naming the package and how to get it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            extra = ' openvino' if package == 'openvino' else ''
            raise QuantError(f'the package {package} is not installed, which this needs; {_INSTALL}{extra}') from None


def check_opset(opset: int, engine: str) -> None:
    """Refuse an opset that the exporter or an engine does not take.

    Raises:
        QuantError: naming what is allowed.
    """
    if opset not in OPSETS:
        allowed = ', '.join(map(str, OPSETS))
        raise QuantError(
            f'--opset {opset}: {engine} is given opset {allowed} here; below 21 ONNX has no 4-bit integers, and the '
            'engines do not take newer ones'
        )


def to_onnx(
    graph: fx.GraphModule, shape: tuple[int, ...], *, dynamic: bool = True, batched: bool = False, opset: int = OPSET
) -> Any:
    """Translate a graph of aten operators and those of :mod:`.operators` into an ``onnx.ModelProto``.

    Input and output are called ``input`` and ``output``, shape (N, C, H, W), float32; N is 1 where it is not free.

    Raises:
        QuantError: if an operator of the network has no translation.
    """
    image = torch.rand((2 if batched else 1, *shape[1:]))
    return translated(
        graph, (image,), opset, input_names=['input'], output_names=['output'],
        dynamic_shapes=(free_sizes(batched),) if dynamic else None,
    )  # fmt: skip


def translated(graph: fx.GraphModule, examples: tuple[Any, ...], opset: int = OPSET, **kwargs: Any) -> Any:
    """Any graph as an ``onnx.ModelProto``; ``kwargs`` go to torch's exporter.

    Raises:
        QuantError: if an operator has no translation.
    """
    need('onnx', 'onnxscript')
    try:
        with _quiet():
            program = torch.onnx.export(
                graph, examples, dynamo=True, opset_version=opset, verbose=False, external_data=False,
                custom_translation_table=_translations(), **kwargs,
            )  # fmt: skip
    except Exception as error:
        said = ' '.join(str(error).split())[:200]
        raise QuantError(f'this network cannot be written as ONNX: {type(error).__name__}: {said}') from None
    model = program.model_proto  # type: ignore[union-attr]
    _strip(model)
    return model


def packed_onnx(plan: IntegerPlan, opset: int = OPSET) -> Any:
    """``plan`` as a checked ``onnx.ModelProto``; weights of up to 4 bits are stored as INT4, but for TensorRT,
    whose parser takes no Cast of those.

    Raises:
        QuantError: if it cannot be translated.
    """
    model = to_onnx(plan.graph, plan.shape, dynamic=plan.dynamic, batched=plan.batched, opset=opset)
    if plan.engine != 'tensorrt':
        _pack(model, plan)
    import onnx

    onnx.checker.check_model(model)
    return model


def _translations() -> dict[Any, Any]:
    import onnx_ir
    from onnxscript import opset21 as op

    def number(value: float, dtype: Any) -> Any:
        return op.Constant(value=onnx_ir.tensor(np.array(value, dtype=dtype)))  # type: ignore[arg-type]

    def codes_of(x: Any, scale: float, zero_point: int, low: int, high: int, signed: bool) -> tuple[Any, Any, Any]:
        dtype = np.int8 if signed else np.uint8
        step, zero = number(scale, np.float32), number(zero_point, dtype)
        clips = (low, high) != ((-128, 127) if signed else (0, 255))
        if clips and signed:  # TensorRT takes nothing between the two, so its Clip stands before them
            ends = (number((end - zero_point) * scale, np.float32) for end in (low, high))
            return op.QuantizeLinear(op.Clip(x, *ends), step, zero), step, zero
        codes = op.QuantizeLinear(x, step, zero)
        if clips:
            # On the codes and not before them: a Clip in floating point would keep CPU engines from fusing the layer.
            codes = op.Clip(codes, number(low, dtype), number(high, dtype))
        return codes, step, zero

    def activation(x: Any, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Any:
        return op.DequantizeLinear(*codes_of(x, scale, zero_point, low, high, signed))

    def integers(x: Any, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Any:
        codes, _, zero = codes_of(x, scale, zero_point, low, high, signed)
        return op.DequantizeLinear(codes, number(1.0, np.float32), zero)

    def constant(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    def whole(codes: Any) -> Any:
        return op.Cast(codes, to=onnx_ir.DataType.FLOAT)

    def codes(x: Any, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Any:
        return codes_of(x, scale, zero_point, low, high, signed)[0]

    def matrix_product(x: Any, weight: Any, zero_point: int) -> Any:
        sums = op.MatMulInteger(x, weight, number(zero_point, np.uint8), number(0, np.int8))
        return op.Cast(sums, to=onnx_ir.DataType.FLOAT)

    return {
        ACTIVATION: activation, INTEGERS: integers, CODES: codes, CONSTANT: constant, WHOLE: whole,
        MATRIX_PRODUCT: matrix_product,
    }  # fmt: skip


def _strip(model: Any) -> None:
    """Leave out what the exporter notes for itself, a sixth of a quantized file: it names source files too."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ''
    for holder in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del holder.metadata_props[:]
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    model.graph.doc_string = model.doc_string = ''
    model.producer_name, model.graph.name = 'basicsr_quant', 'network'


def _pack(model: Any, plan: IntegerPlan) -> None:
    """Store weights of up to 4 bits as INT4, two a byte, and widen them at load: engines fold that into int8 weights.

    Odd codes at half the step (grids without zero) are stored as k with code = 2 k + 1.
    """
    import onnx
    from onnx import helper, numpy_helper

    packed = {f'{name}.weight_quantizer.codes': found for name, found in plan.weights.items() if found.bits <= 4}
    nodes = []
    for index, tensor in enumerate(list(model.graph.initializer)):
        found = packed.get(tensor.name)
        if found is None:
            continue
        codes = numpy_helper.to_array(tensor).astype(np.int32)
        stored = (codes - 1) // 2 if found.halved else codes
        if stored.min() < -8 or stored.max() > 7:
            continue
        name = tensor.name
        small = helper.make_tensor(f'{name}.int4', onnx.TensorProto.INT4, codes.shape, _nibbles(stored), raw=True)
        model.graph.initializer[index].CopyFrom(small)
        if not found.halved:
            nodes.append(helper.make_node('Cast', [small.name], [name], to=onnx.TensorProto.INT8, name=f'{name}.cast'))
            continue
        for constant, value in (('two', 2), ('one', 1)):
            if not any(t.name == f'int4.{constant}' for t in model.graph.initializer):
                model.graph.initializer.append(
                    helper.make_tensor(f'int4.{constant}', onnx.TensorProto.INT32, [], [value])
                )
        wide, twice, odd = (f'{name}.{part}' for part in ('wide', 'twice', 'odd'))
        nodes += [
            helper.make_node('Cast', [small.name], [wide], to=onnx.TensorProto.INT32, name=f'{name}.cast'),
            helper.make_node('Mul', [wide, 'int4.two'], [twice], name=f'{name}.mul'),
            helper.make_node('Add', [twice, 'int4.one'], [odd], name=f'{name}.add'),
            helper.make_node('Cast', [odd], [name], to=onnx.TensorProto.INT8, name=f'{name}.narrow'),
        ]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def _nibbles(codes: np.ndarray) -> bytes:
    """Two codes from -8 to 7 a byte, the first one in the lower half."""
    flat = (codes.flatten() & 15).astype(np.uint8)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about itself."""
    logger = logging.getLogger('torch.onnx')
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(before)
