"""The quant: block: what is accepted, and the sentence for what is not."""

from __future__ import annotations

import copy

import pytest
import yaml
from helpers import tiny

from basicsr_quant.config import CalibrationConfig, PatchConfig, read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS, method_of
from basicsr_quant.network.planning import LayerRule
from basicsr_quant.network.trace import trace

BITS = '2 to 8, or 32'


def block(text: str):
    return yaml.safe_load(text)


# ------------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize('method', list(METHODS))
def test_a_method_alone_is_enough(method):
    config = read_config({'method': method})
    assert (config.method, config.w_bits, config.a_bits, config.scope) == (method, 8, 8, 'body')
    assert config.settings['zero_point'] == METHODS[method].default_zero_point
    assert config.calibration is None and config.feature_scale is None and config.layers == {}


@pytest.mark.parametrize('method', list(METHODS))
def test_defaults_written_out_are_the_defaults(method):
    settings = read_config({'method': method}).settings
    written = {
        'method': method, 'w_bits': 8, 'a_bits': 8, 'scope': 'body', 'skip': 'fp', 'feature_scale': 'auto',
        'w_granularity': settings['w_granularity'], 'zero_point': settings['zero_point'], 'reference_compat': False,
        'layers': None, 'calibration': None, method: settings['options'],
    }  # fmt: skip
    assert read_config(yaml.safe_load(yaml.safe_dump(written))) == read_config({'method': method})


@pytest.mark.parametrize(
    ('text', 'attribute', 'value'),
    [
        ('{w_bits: 2}', 'w_bits', 2),
        ('{w_bits: "4"}', 'w_bits', 4),
        ('{a_bits: 4.0}', 'a_bits', 4),
        ('{a_bits: 32}', 'a_bits', 32),
        ('{scope: all}', 'scope', 'all'),
        ('{feature_scale: auto}', 'feature_scale', None),
        ('{feature_scale: 1e-2}', 'feature_scale', 0.01),
        ('{feature_scale: 1}', 'feature_scale', 1.0),
        ('{layers: {conv_*: fp}}', 'layers', {'conv_*': LayerRule(32, 32)}),
        ('{layers: {a: {w_bits: 8}, b: {a_bits: "2"}}}', 'layers', {'a': LayerRule(8), 'b': LayerRule(None, 2)}),
        ('{layers: {a: {w_bits: 32, a_bits: 8.0}}}', 'layers', {'a': LayerRule(32, 8)}),
        ('{layers: {}}', 'layers', {}),
        ('{calibration: {}}', 'calibration', CalibrationConfig()),
        ('{calibration: {num_images: "5", patch_size: 0}}', 'calibration', CalibrationConfig(5, 0, None)),
        ('{patch: {}}', 'patch', PatchConfig(96, 96)),
        ('{patch: {size: 64}}', 'patch', PatchConfig(64, 64)),
        ('{patch: {size: "96", stride: 90.0}}', 'patch', PatchConfig(96, 90)),
        ('{calibration: {dataset: {type: X}}}', 'calibration', CalibrationConfig(dataset={'type': 'X'})),
    ],
)
def test_keys_are_read(text, attribute, value):
    found = getattr(read_config({'method': 'odm', **block(text)}), attribute)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ('method', 'text', 'key', 'value'),
    [
        ('odm', '{mismatch_weight: 1e-6}', 'mismatch_weight', 1e-6),
        ('odm', '{mismatch_weight: 0}', 'mismatch_weight', 0.0),
        ('odm', '{regularizer: variance, weight_clipping: true}', 'regularizer', 'variance'),
        ('odm', '{granularity: global}', 'granularity', 'global'),
        ('odm', '{percentile: 99.9}', 'percentile', 99.9),
        ('odm_v1', '{weight_clipping: true}', 'weight_clipping', True),
        ('odm_v1', '{offsets_ratio: "0.5"}', 'offsets_ratio', 0.5),
        ('pams', '{range_lr: 1e2}', 'range_lr', 100.0),
        ('pams', '{init: minmax}', 'init', 'minmax'),
        ('lsq', '{init: mse}', 'init', 'mse'),
        ('minmax', '{learn: true}', 'learn', True),
        ('percentile', '{percentile: 95}', 'percentile', 95.0),
    ],
)
def test_options_of_a_method_reach_it(method, text, key, value):
    config = read_config({'method': method, method: block(text)})
    assert config.settings['options'][key] == value
    net = tiny()
    run = method_of(config.plan(net, trace(net)))
    assert getattr(run.options, key) == value and type(getattr(run.options, key)) is type(value)


def test_the_block_of_the_documentation_but_for_what_is_still_to_come():
    given = block("""
        method: odm
        w_bits: 4
        a_bits: 4
        scope: body
        skip: fp
        w_granularity: tensor
        zero_point: integer
        layers: {'first': fp, 'last': {w_bits: 8, a_bits: 8}}
        feature_scale: auto
        calibration: {num_images: 100, dataset: {type: PairedImageDataset, io_backend: {type: lmdb}}}
        reference_compat: false
        odm: {regularizer: mismatch, gate: cosine, granularity: tensor, weight_clipping: true, offsets: false,
              mismatch_weight: 1.0e-5}
    """)
    before = copy.deepcopy(given)
    config = read_config(given)
    assert given == before
    net = tiny()
    plan = config.plan(net, trace(net))
    assert [(layer.w_bits, layer.a_bits) for layer in plan] == [(32, 32), *[(4, 4)] * 4, (8, 8)]
    assert plan.settings['zero_point'] == 'integer' and plan.settings['options']['mismatch_weight'] == 1e-5


# ----------------------------------------------------------------------------------------------------- what is refused

ODM = {'method': 'odm'}
REFUSED = [
    # the block and the method
    ({}, 'quant.method is missing', ['none', 'odm_v1']),
    ({'method': None}, 'quant.method is missing', ['odm']),
    ({'method': 'odmm'}, "quant.method: 'odmm' given", ["did you mean 'odm'?", 'minmax | percentile']),
    ({'method': ['odm']}, "quant.method: ['odm'] given", ['minmax']),
    ({'method': {'odm': 1}}, 'quant.method:', ['minmax']),
    ({'method': 4}, 'quant.method: 4 given', ['minmax']),
    ({'method': True}, 'quant.method: True given', ['minmax']),
    ({**ODM, 'wbits': 4}, 'quant.wbits is not an option', ["did you mean 'w_bits'?", 'a_bits scope']),
    ({**ODM, 4: 4}, 'quant.4 is not an option', ['a_bits']),
    # bits
    ({**ODM, 'w_bits': 1}, 'quant.w_bits: 1 given', [BITS]),
    ({**ODM, 'w_bits': 9}, 'quant.w_bits: 9 given', [BITS]),
    ({**ODM, 'w_bits': 16}, 'quant.w_bits: 16 given', [BITS]),
    ({**ODM, 'w_bits': 0}, 'quant.w_bits: 0 given', [BITS]),
    ({**ODM, 'w_bits': -4}, 'quant.w_bits: -4 given', [BITS]),
    ({**ODM, 'a_bits': 2.5}, 'quant.a_bits: 2.5 given', ['a whole number']),
    ({**ODM, 'a_bits': True}, 'quant.a_bits: True given', ['a whole number']),
    ({**ODM, 'a_bits': None}, 'quant.a_bits: None given', ['a whole number']),
    ({**ODM, 'a_bits': 'four'}, "quant.a_bits: 'four' given", ['a whole number']),
    ({**ODM, 'a_bits': [4]}, 'quant.a_bits: [4] given', ['a whole number']),
    # the other scalars
    ({**ODM, 'scope': 'al'}, "quant.scope: 'al' given", ["did you mean 'all'?", 'body | all']),
    ({**ODM, 'scope': None}, 'quant.scope: None given', ['body | all']),
    ({**ODM, 'skip': 'none'}, "quant.skip: 'none' given", ['allowed: fp | quantized']),
    ({**ODM, 'engine': 'openvino'}, "quant.engine: 'openvino' given", ['skip: quantized']),
    ({**ODM, 'skip': 'quantized', 'engine': 'ncnn'}, "quant.engine: 'ncnn' given", ['openvino']),
    ({**ODM, 'w_granularity': 'channels'}, "quant.w_granularity: 'channels' given", ["'channel'", 'tensor | channel']),
    ({**ODM, 'zero_point': 'int'}, "quant.zero_point: 'int' given", ['float | integer']),
    ({**ODM, 'zero_point': 0}, 'quant.zero_point: 0 given', ['float | integer']),
    ({'method': 'pams', 'zero_point': 'float'}, "quant.zero_point: 'float' given", ["method 'pams': integer"]),
    ({'method': 'lsq', 'zero_point': 'float'}, "quant.zero_point: 'float' given", ["method 'lsq': integer"]),
    ({**ODM, 'feature_scale': 0}, 'quant.feature_scale: 0.0 given', ['auto, or a number above 0']),
    ({**ODM, 'feature_scale': -1}, 'quant.feature_scale: -1.0 given', ['auto, or a number above 0']),
    ({**ODM, 'feature_scale': 'big'}, "quant.feature_scale: 'big' given", ['auto, or a number above 0']),
    ({**ODM, 'feature_scale': float('nan')}, 'quant.feature_scale: nan given', ['a number or text']),
    ({**ODM, 'feature_scale': float('inf')}, 'quant.feature_scale: inf given', ['a number or text']),
    ({**ODM, 'feature_scale': '.inf'}, "quant.feature_scale: '.inf' given", ['auto, or a number above 0']),
    ({**ODM, 'reference_compat': 1}, 'quant.reference_compat: 1 given', ['true or false']),
    ({**ODM, 'reference_compat': True}, 'quant.reference_compat: true given', ["method 'odm'", 'leave it out']),
    # layers
    ({**ODM, 'layers': 'fp'}, 'quant.layers must hold', ["not 'fp'", '{w_bits: 8, a_bits: 8}']),
    ({**ODM, 'layers': ['first']}, 'quant.layers must hold', ["not ['first']"]),
    ({**ODM, 'layers': {'first': 'float'}}, "quant.layers.'first': 'float' given", ['fp, or {w_bits: 8, a_bits: 8}']),
    ({**ODM, 'layers': {'first': 8}}, "quant.layers.'first': 8 given", ['fp, or {w_bits: 8, a_bits: 8}']),
    ({**ODM, 'layers': {'first': None}}, "quant.layers.'first': None given", ['fp, or']),
    ({**ODM, 'layers': {'first': {'bits': 8}}}, "quant.layers.'first'.bits is not an option", ['w_bits a_bits']),
    ({**ODM, 'layers': {'first': {'w_bits': 9}}}, "quant.layers.'first'.w_bits: 9 given", [BITS]),
    ({**ODM, 'layers': {'first': {'a_bits': 'x'}}}, "quant.layers.'first'.a_bits: 'x' given", [BITS]),
    ({**ODM, 'layers': {'first': {'a_bits': None}}}, "quant.layers.'first'.a_bits: None given", [BITS]),
    ({**ODM, 'layers': {'first': {'a_bits': True}}}, "quant.layers.'first'.a_bits: True given", [BITS]),
    ({**ODM, 'layers': {'first': {'a_bits': [8]}}}, "quant.layers.'first'.a_bits: [8] given", [BITS]),
    ({**ODM, 'layers': {'first': {'a_bits': 10**400}}}, "quant.layers.'first'.a_bits:", [BITS]),
    # calibration
    ({**ODM, 'calibration': 100}, 'quant.calibration must hold', ['num_images patch_size dataset']),
    ({**ODM, 'calibration': {'images': 3}}, 'quant.calibration.images is not an option', ["mean 'num_images'?"]),
    ({**ODM, 'calibration': {'num_images': 0}}, 'quant.calibration.num_images: 0 given', ['at least 1']),
    ({**ODM, 'calibration': {'num_images': 'all'}}, "quant.calibration.num_images: 'all' given", ['at least 1']),
    ({**ODM, 'calibration': {'patch_size': -1}}, 'quant.calibration.patch_size: -1 given', ['at least 0']),
    ({**ODM, 'calibration': {'dataset': 'DIV2K'}}, "quant.calibration.dataset: 'DIV2K' given", ['key: value']),
    # options of methods
    ({'method': 'pams', 'odm': {}}, 'quant.odm is given', ["quant.method is 'pams'"]),
    ({'method': 'pams', 'odm': None}, 'quant.odm is given', ["quant.method is 'pams'"]),
    ({'method': 'odm_v1', 'odm': {'gate': 'sign'}}, 'quant.odm is given', ["quant.method is 'odm_v1'"]),
    ({**ODM, 'odm': 'fast'}, 'quant.odm must hold', ["not 'fast'", 'regularizer']),
    ({**ODM, 'odm': {'regulariser': 'variance'}}, 'quant.odm.regulariser is', ["did you mean 'regularizer'?"]),
    ({**ODM, 'odm': {'regularizer': 'var'}}, "quant.odm.regularizer: 'var' given", ['mismatch | variance']),
    ({**ODM, 'odm': {'gate': 'cos'}}, "quant.odm.gate: 'cos' given", ['cosine | sign | none']),
    ({**ODM, 'odm': {'gate': None}}, 'quant.odm.gate: None given', ['cosine | sign | none']),
    ({**ODM, 'odm': {'granularity': 'layer'}}, "quant.odm.granularity: 'layer' given", ['element | tensor | global']),
    ({**ODM, 'odm': {'offsets': 'yes'}}, "quant.odm.offsets: 'yes' given", ['true or false']),
    ({**ODM, 'odm': {'offsets_ratio': 1.5}}, 'quant.odm.offsets_ratio: 1.5 given', ['from 0 to 1']),
    ({**ODM, 'odm': {'mismatch_weight': -1}}, 'quant.odm.mismatch_weight: -1.0 given', ['at least 0']),
    ({**ODM, 'odm': {'percentile': 101}}, 'quant.odm.percentile: 101.0 given', ['from 50 to 100']),
    ({**ODM, 'odm': {'init': 'lsq'}}, "quant.odm.init: 'lsq' given", ['percentile | mse | dobi | minmax']),
    ({'method': 'mse', 'mse': {'init': 'minmax'}}, "quant.mse.init: 'minmax' given", ['allowed: mse']),
    ({'method': 'percentile', 'percentile': 99.0}, 'quant.percentile must hold', ['not 99.0']),
    ({'method': 'none', 'none': {'x': 1}}, 'quant.none.x is not an option', ['it has no options']),
    ({'method': 'daq', 'skip': 'quantized'}, "quant.skip: 'quantized' given", ["method 'daq'", 'every image']),
    ({**ODM, 'patch': {'size': 96, 'stride': 97}}, 'quant.patch.stride: 97 given', ['at most quant.patch.size = 96']),
    ({**ODM, 'patch': {'size': 4}}, 'quant.patch.size: 4 given', ['at least 8']),
    ({**ODM, 'patch': 96}, 'quant.patch must hold', ['size stride']),
]  # fmt: skip


@pytest.mark.parametrize(('given', 'path', 'said'), REFUSED, ids=[str(r[0])[:60] for r in REFUSED])
def test_a_mistake_is_one_sentence_with_path_value_and_what_is_allowed(given, path, said):
    with pytest.raises(QuantError) as raised:
        read_config(given)
    message = str(raised.value)
    assert message.startswith(path) and '\n' not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize('given', [None, 'odm', ['odm'], 4, True])
def test_a_block_that_is_no_mapping_is_refused(given):
    with pytest.raises(QuantError, match='quant must hold `key: value` pairs'):
        read_config(given)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{method: odm, w_bits: 32, a_bits: 32}', 'nothing is left to quantize: .*w_bits 32, a_bits 32'),
        ('{method: odm, layers: {"*": fp}}', 'nothing is left to quantize'),
        ('{method: odm, layers: {"nothing*": fp}}', r"quant\.layers: 'nothing\*' matches no layer"),
        ('{method: none, layers: {"nothing*": fp}}', r"quant\.layers: 'nothing\*' matches no layer"),
    ],
)
def test_a_block_that_does_not_suit_the_network_is_refused(text, message):
    net = tiny()
    with pytest.raises(QuantError, match=message):
        read_config(block(text)).plan(net, trace(net))


def test_method_none_has_nothing_to_quantize_and_that_is_meant():
    net = tiny()
    assert not read_config({'method': 'none', 'w_bits': 4}).plan(net, trace(net)).quantized
