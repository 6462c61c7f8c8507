"""Files with other projects' tensor names: what loads, to the bit, and what is refused, in which words.

The names below are written from our names to theirs, the other way round than in the package.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from basicsr_quant import compat
from basicsr_quant.errors import QuantError

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture(autouse=True)
def host() -> None:
    compat.apply()


MEAN = (0.4488, 0.4371, 0.4040)
SIZES: dict[str, dict[str, Any]] = {
    'EDSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 2},
    'RCAN': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_group': 2, 'num_block': 2, 'squeeze_factor': 2},
    'MSRResNet': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 2},
    'RRDBNet': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 2, 'num_grow_ch': 2},
    'SwinIR': {'img_size': 8, 'embed_dim': 6, 'depths': [2], 'num_heads': [2], 'window_size': 8, 'mlp_ratio': 2,
               'upsampler': 'pixelshuffle'},
    'SRResNetBN': {'num_feat': 4, 'num_block': 2},
    'IMDN': {'num_feat': 16, 'num_block': 2},
    'RFDN': {'num_feat': 8, 'num_block': 2},
    'CARN': {'num_feat': 4},
    'CARNM': {'num_feat': 4},
    'RDN': {'num_feat': 4, 'num_block': 2, 'num_layer': 2, 'growth': 3},
    'IDN': {'num_feat': 16, 'num_block': 2, 'step': 4},
}  # fmt: skip


def build(kind: str, upscale: int = 4, **more: Any) -> nn.Module:
    from basicsr.archs import build_network

    import basicsr_quant.archs  # noqa: F401 (registers)

    scale = {'scale' if kind == 'RRDBNet' else 'upscale': upscale}
    return build_network({'type': kind, **SIZES[kind], **scale, **more}).eval()


def shifts(scale: float, inner: str = '') -> dict[str, Tensor]:
    eye, mean = torch.eye(3).view(3, 3, 1, 1), torch.tensor(MEAN) * scale
    names = {'sub_mean': -mean, 'add_mean': mean}
    return {f'{n}.{inner}{k}': v for n, bias in names.items() for k, v in (('weight', eye), ('bias', bias))}


def n(text: str, more: int = 0, factor: int = 1) -> str:
    return str(int(text) * factor + more)


EDSR_ENDS = {
    r'conv_first\.': 'head.0.', r'conv_after_body\.': 'body.2.', r'upsample\.': 'tail.0.', r'conv_last\.': 'tail.1.',
}
DISTILLED = {
    r'conv_first\.': 'fea_conv.', r'fusion\.': 'c.0.', r'conv_after_body\.': 'LR_conv.', r'conv_last\.': 'upsampler.0.',
}
CARN = {
    r'body\.blocks\.(\d)\.blocks\.(\d)\.conv(\d)': lambda m: f'b{n(m[1], 1)}.b{n(m[2], 1)}.body.{n(m[3], -2, 2)}',
    r'body\.blocks\.(\d)\.fusions\.(\d)\.conv': lambda m: f'b{n(m[1], 1)}.c{n(m[2], 1)}.body.0',
    r'body\.fusions\.(\d)\.conv': lambda m: f'c{n(m[1], 1)}.body.0',
    r'conv_first\.': 'entry.', r'conv_last\.': 'exit.',
}  # fmt: skip
EDSR_PYTORCH = {r'body\.(\d)\.conv1': r'body.\1.body.0', **EDSR_ENDS}
RDN_MMAGIC = {
    r'body\.(\d)\.convs\.(\d)': r'rdbs.\1.layers.\2.conv', r'body\.(\d)\.fusion': r'rdbs.\1.lff',
    r'conv_first': 'sfe1', r'conv_second': 'sfe2', r'fusion': 'gff.0', r'conv_after_body': 'gff.1',
    r'upsample': 'upscale', r'conv_last': 'output',
}  # fmt: skip
RRDB_OLD = {
    r'body\.(\d)\.rdb(\d)\.conv(\d)': r'model.1.sub.\1.RDB\2.conv\3.0', r'conv_first': 'model.0',
    r'conv_body': 'model.1.sub.2', r'conv_up1': 'model.3', r'conv_up2': 'model.6', r'conv_hr': 'model.8',
    r'conv_last': 'model.10',
}  # fmt: skip

# network, its options, their names for ours, and what their file holds beside
FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor]]] = {
    'EDSR-PyTorch': ('EDSR', {}, {**EDSR_PYTORCH, r'body\.(\d)\.conv2': r'body.\1.body.2'}, shifts(255)),
    'EDSR-PyTorch x3': ('EDSR', {'upscale': 3}, {**EDSR_PYTORCH, r'body\.(\d)\.conv2': r'body.\1.body.2'}, shifts(255)),
    'EDSR-PyTorch in 0..1': (
        'EDSR', {'img_range': 1.0}, {**EDSR_PYTORCH, r'body\.(\d)\.conv2': r'body.\1.body.2'}, shifts(1)
    ),
    'PAMS, DDTB': ('EDSR', {}, {**EDSR_PYTORCH, r'body\.(\d)\.conv2': r'body.\1.body.3'}, shifts(255)),
    'DAQ, AdaBM': ('EDSR', {}, EDSR_ENDS, shifts(255)),
    'EDSR of MMagic': (
        'EDSR', {'img_range': 1.0}, {r'upsample\.(\d)': lambda m: f'upsample.{int(m[1]) // 2}.upsample_conv'}, {}
    ),
    'RCAN of EDSR-PyTorch': ('RCAN', {}, {
        r'body\.(\d)\.residual_group\.(\d)\.rcab\.3\.attention\.(\d)':
            lambda m: f'body.{m[1]}.body.{m[2]}.body.3.conv_du.{n(m[3], -1)}',
        r'body\.(\d)\.residual_group\.(\d)\.rcab\.(\d)': r'body.\1.body.\2.body.\3',
        r'body\.(\d)\.conv': r'body.\1.body.2', **EDSR_ENDS,
    }, shifts(255)),
    'MSRResNet of KAIR': ('MSRResNet', {}, {r'body': 'recon_trunk', r'conv_hr': 'HRconv'}, {}),
    'RRDBNet of KAIR': ('RRDBNet', {}, {
        r'body\.(\d)\.rdb(\d)': r'RRDB_trunk.\1.RDB\2', r'conv_body': 'trunk_conv', r'conv_up(\d)': r'upconv\1',
        r'conv_hr': 'HRconv',
    }, {}),
    'RRDBNet, first version': ('RRDBNet', {}, RRDB_OLD, {}),
    'SRResNet tutorial': ('SRResNetBN', {}, {
        r'conv_first': 'conv_input', r'prelu_first': 'relu', r'body\.(\d)\.prelu': r'residual.\1.relu',
        r'body': 'residual', r'conv_after_body': 'conv_mid', r'bn_after_body': 'bn_mid', r'conv_last': 'conv_output',
        r'upsample\.([03])': lambda m: f'up.{int(m[1]) // 3}.conv',
        r'upsample\.([25])': lambda m: f'up.{int(m[1]) // 3}.relu',
    }, {}),
    'IMDN': ('IMDN', {}, {r'body\.(\d)': lambda m: f'IMDB{n(m[1], 1)}', **DISTILLED}, {}),
    'RFDN': ('RFDN', {}, {r'body\.(\d)': lambda m: f'B{n(m[1], 1)}', **DISTILLED}, {}),
    'CARN, one scale': ('CARN', {}, {**CARN, r'upsample\.(\d)': r'upsample.up.body.\1'}, shifts(1, 'shifter.')),
    'CARN, three scales': (
        'CARN', {'upscale': 2}, {**CARN, r'upsample\.(\d)': r'upsample.up2.body.\1'},
        {**shifts(1, 'shifter.'), 'upsample.up3.body.0.weight': torch.ones(36, 4, 3, 3)},
    ),
    'CARN-M': ('CARNM', {}, {**CARN, r'upsample\.(\d)': r'upsample.up4.body.\1'}, shifts(1, 'shifter.')),
    'RDN of EDSR-PyTorch': ('RDN', {}, {
        r'body\.(\d)\.convs\.(\d)': r'RDBs.\1.convs.\2.conv.0', r'body\.(\d)\.fusion': r'RDBs.\1.LFF',
        r'conv_first': 'SFENet1', r'conv_second': 'SFENet2', r'fusion': 'GFF.0', r'conv_after_body': 'GFF.1',
        r'upsample': 'UPNet', r'conv_last': 'UPNet.4',
    }, {}),
    'RDN of MMagic': ('RDN', {}, RDN_MMAGIC, {}),
    'IDN of CADyQ': ('IDN', {}, {
        r'body\.(\d)\.upper\.(\d)': lambda m: f'dblocks.{m[1]}.enhancement_top.{n(m[2], 0, 2)}',
        r'body\.(\d)\.lower\.(\d)': lambda m: f'dblocks.{m[1]}.enhancement_bottom.{n(m[2], 0, 2)}',
        r'body': 'dblocks', r'conv_first': 'fblock.module.0', r'conv_second': 'fblock.module.2',
        r'deconv_last': 'deconv',
    }, {}),
    'SwinIR of KAIR': ('SwinIR', {}, {}, {}),
}  # fmt: skip


def foreign(net: nn.Module, names: dict[str, Any], beside: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors by their names; each name is replaced by the first entry that begins it."""
    state = dict(beside)
    for name, tensor in net.state_dict().items():
        for pattern, target in names.items():
            renamed, found = re.subn('^' + pattern, target, name)
            if found:
                name = renamed
                break
        state[name] = tensor.clone()
    return state


def read(folder: Path, content: Any, name: str = 'net.pth') -> Any:
    from basicsr_quant.models.checkpoint import read_network_file

    if name.endswith('.safetensors'):
        pytest.importorskip('safetensors.torch').save_file(content, str(folder / name))
    else:
        torch.save(content, folder / name)
    return read_network_file(str(folder / name))


@pytest.mark.parametrize('case', FILES)
def test_their_file_gives_our_network_to_the_bit(case: str, tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state

    kind, options, names, beside = FILES[case]
    torch.manual_seed(0)
    source, net = build(kind, **options), build(kind, **options)
    with torch.no_grad():
        for buffer in source.buffers():  # a network that was trained
            if buffer.is_floating_point() and buffer.dim() == 1:
                buffer.uniform_(0.5, 1.5)
    state = foreign(source, names, beside)
    if names:
        assert set(state) - set(net.state_dict())
    named = load_state(net, read(tmp_path, state), 'params')
    assert (named is not None) == bool(names)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(net(x), source(x))


@pytest.mark.parametrize('convention', ['EDSR-PyTorch', 'RDN of MMagic'])
def test_a_quantized_network_reads_their_files_too(convention: str, tmp_path: Path) -> None:
    from basicsr_quant.methods import quantize, settings_of
    from basicsr_quant.models.checkpoint import load_state
    from basicsr_quant.network.planning import PlanRequest, make_plan

    kind, options, names, beside = FILES[convention]
    source, net = build(kind, **options), build(kind, **options)
    quantize(net, make_plan(net, PlanRequest('minmax', 8, 8, settings=settings_of('minmax'))))
    assert load_state(net, read(tmp_path, foreign(source, names, beside)), 'params')
    assert all(torch.equal(net.state_dict()[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize('convention', ['EDSR of MMagic', 'RDN of MMagic'])
def test_a_quantized_file_of_mmagic_loads_whole(convention: str, tmp_path: Path) -> None:
    from basicsr_quant.methods import quantize, settings_of
    from basicsr_quant.models.checkpoint import compare_plans, load_state
    from basicsr_quant.network.plan import Plan
    from basicsr_quant.network.planning import PlanRequest, make_plan

    kind, options, names, beside = FILES[convention]
    request = PlanRequest('minmax', 4, 4, scope='all', settings=settings_of('minmax'))
    source, net = build(kind, **options), build(kind, **options)
    plan = make_plan(source, request)
    quantize(source, plan)
    quantize(net, plan)
    for tensor in source.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else tensor)
    theirs = foreign(source, names, beside)
    layers = dict(zip(source.state_dict(), theirs))
    plain = plan.to_plain()
    for layer in plain['layers']:
        layer['layer'] = layers[f'{layer["layer"]}.weight'].removesuffix('.weight')
    assert Plan.from_plain(plain) != plan
    file = read(tmp_path, {'params': theirs, 'quant': {'plan': plain, 'calibration': {}}})
    compare_plans(file, plan, net)
    assert load_state(net, file, 'params') == 'MMagic'
    assert all(torch.equal(net.state_dict()[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize(('wrap', 'key', 'found', 'value'), [
    (lambda s, e: s, 'params', None, 1.0),
    (lambda s, e: {'params': s, 'params_ema': e}, 'params_ema', 'params_ema', 2.0),
    (lambda s, e: {'state_dict': s, 'meta': {'epoch': 3}}, 'params', 'state_dict', 1.0),
    (lambda s, e: {'model': s}, 'params', 'model', 1.0),
    (lambda s, e: {f'module.{k}': v for k, v in s.items()}, 'params', None, 1.0),
    (lambda s, e: {'state_dict': mmagic(s, e)}, 'params', 'state_dict', 1.0),
    (lambda s, e: {'state_dict': mmagic(s, e)}, 'params_ema', 'state_dict', 2.0),
    (lambda s, e: {'state_dict': {f'module.generator.{k}': v for k, v in s.items()}}, 'params', 'state_dict', 1.0),
])  # fmt: skip
def test_wrappings(wrap: Any, key: str, found: str | None, value: float, tmp_path: Path) -> None:
    plain, ema = {'c.weight': torch.tensor(1.0)}, {'c.weight': torch.tensor(2.0)}
    assert read(tmp_path, wrap(plain, ema)).state(key) == (found, {'c.weight': torch.tensor(value)})


def mmagic(state: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **{f'generator.{k}': v for k, v in state.items()}, **{f'generator_ema.{k}': v for k, v in ema.items()},
        'data_preprocessor.mean': torch.zeros(3), 'step_counter': torch.tensor(7),
    }  # fmt: skip


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from basicsr_quant.models.checkpoint import load_state, read_network_file

    kind, options, names, beside = FILES['RFDN']
    source, net = build(kind, **options), build(kind, **options)
    load_state(net, read(tmp_path, foreign(source, names, beside), 'net.safetensors'), 'params')
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())
    monkeypatch.setitem(__import__('sys').modules, 'safetensors.torch', None)
    with pytest.raises(QuantError, match='pip install safetensors'):
        read_network_file(str(tmp_path / 'net.safetensors'))
    monkeypatch.undo()
    (tmp_path / 'broken.safetensors').write_bytes(b'nothing')
    with pytest.raises(QuantError, match='cannot be read as a checkpoint'):
        read_network_file(str(tmp_path / 'broken.safetensors'))


def drop(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != name}


EDSR_STATE = {**EDSR_PYTORCH, r'body\.(\d)\.conv2': r'body.\1.body.2'}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor], Any, str]] = {
    'what did not map is listed': (
        'EDSR', {}, EDSR_STATE, {'attention.0.weight': torch.ones(1), 'gate.scale': torch.ones(1)}, None,
        'looks like EDSR with the names of EDSR-PyTorch, but 2 tensors did not map: attention.0.weight, gate.scale',
    ),
    'a tensor missing': (
        'RFDN', {}, FILES['RFDN'][2], {}, 'B1.c1_d.weight', "missing in the file, 'body.0.c1_d.weight' first"
    ),
    'another number of blocks': ('EDSR', {'num_block': 3}, EDSR_STATE, {}, None, "'body.2.conv1.weight' first"),
    'what to change': (
        'EDSR', {'num_block': 3}, EDSR_STATE, {}, None, "'body' has 2 parts in the file and 3 in the network: change n"
    ),
    'another number of channels': ('EDSR', {'num_feat': 8}, EDSR_STATE, {}, None, "is (4, 3, 3, 3) in the file"),
    'another pixel range': ('EDSR', {'img_range': 1.0}, EDSR_STATE, shifts(255), None, 'set network_g.img_range'),
    'another mean': ('EDSR', {'rgb_mean': [0.5, 0.5, 0.5]}, EDSR_STATE, shifts(255), None, '(114.4440, 111.4605, 103'),
    'colours scaled': (
        'EDSR', {}, EDSR_STATE, {**shifts(255), 'sub_mean.weight': 2 * torch.eye(3).view(3, 3, 1, 1)}, None,
        'scales colours',
    ),
    'MSRResNet of MMagic': (
        'MSRResNet', {}, {r'body': 'trunk_net', r'upconv(\d)': r'upsample\1.upsample_conv'}, {}, None,
        'no activation behind its up-samplers',
    ),
    'a scale that the file lacks': (
        'CARN', {}, {**CARN, r'upsample\.(\d)': r'upsample.up2.body.\1'}, {}, None, "'upsample.0.weight' first"
    ),
    'nothing in common': ('EDSR', {}, {r'': 'x.'}, {}, None, 'write the network_g that the file was trained with'),
}  # fmt: skip


def test_another_networks_names_are_recognised(tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state

    state = foreign(build('IMDN'), FILES['IMDN'][2], {})
    with pytest.raises(QuantError, match=r'the names are those of IMDN, so write network_g: \{type: IMDN, \.\.\.\}$'):
        load_state(build('EDSR'), read(tmp_path, state), 'params')


@pytest.mark.parametrize('case', REFUSED)
def test_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state

    kind, options, names, beside, without, words = REFUSED[case]
    state = foreign(build(kind), names, beside)
    if without is not None:
        state = drop(state, without)
    net = build(kind, **options)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(QuantError) as error:
        load_state(net, read(tmp_path, state), 'params')
    assert words in str(error.value) and '\n' not in str(error.value) and 'net.pth' in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_every_table_is_tested() -> None:
    from basicsr_quant.models.convention_tables import CONVENTIONS

    assert set(CONVENTIONS) == {case[0] for case in FILES.values()} - {'SwinIR'}
    projects = sum(len(conventions) for conventions in CONVENTIONS.values())
    read_twice = 5  # EDSR-PyTorch's EDSR in five forms counts once, CARN's in two; MMagic's MSRResNet is refused
    assert projects == len(FILES) - 1 - read_twice + 1


def test_names_inside_a_plan_are_translated_too() -> None:
    """RDN of MMagic: blocks, dense layers and up-samplers all have other names, some at other depths."""
    from basicsr_quant.models.checkpoint import NetworkFile, calibration_of
    from basicsr_quant.models.conventions import adapt_plan
    from basicsr_quant.network.plan import LayerPlan, Plan, TensorPlan

    kind, options, _, _ = FILES['RDN of MMagic']
    net = build(kind, **options)
    layers = tuple(
        LayerPlan(name, 'Conv2d', 4, 4, 'body')
        for name in (
            'sfe1', 'sfe2', 'rdbs.0.layers.0.conv', 'rdbs.0.layers.1.conv', 'rdbs.0.lff', 'rdbs.1.lff', 'output'
        )
    )
    settings = {
        'zero_point': 'float', 'output': {'low': 0.0}, 'options': {'output': 'calibrated'},
        'equalized': {'rdbs.0.layers.0.conv': 'rdbs.0.layers.1.conv', 'sfe1': 'sfe2'},
    }  # fmt: skip
    tensors = (TensorPlan('rdbs.0/add.0', 8, 'sum', ('rdbs.1.lff',)), TensorPlan('sfe1', 8, 'skip', ('sfe2',)))
    plan = Plan('minmax', layers, settings, tensors)
    own = adapt_plan(net, plan, 'file.pth')
    assert [layer.layer for layer in own] == [
        'conv_first', 'conv_second', 'body.0.convs.0', 'body.0.convs.1', 'body.0.fusion', 'body.1.fusion', 'conv_last',
    ]  # fmt: skip
    assert own.settings == {
        'zero_point': 'float', 'output': {'low': 0.0}, 'options': {'output': 'calibrated'},
        'equalized': {'body.0.convs.0': 'body.0.convs.1', 'conv_first': 'conv_second'},
    }  # fmt: skip
    assert own.tensors == (
        TensorPlan('body.0/add.0', 8, 'sum', ('body.1.fusion',)), TensorPlan('conv_first', 8, 'skip', ('conv_second',)),
    )  # fmt: skip
    choices = {'layer_bits': {'rdbs.0.lff': 1, 'output': 0}, 'mean_bits': 4.5}
    file = NetworkFile('file.pth', {}, plan, {'feature_scale': 0.5, 'choices': choices})
    assert calibration_of(file, net) == {
        'feature_scale': 0.5, 'choices': {'layer_bits': {'body.0.fusion': 1, 'conv_last': 0}, 'mean_bits': 4.5},
    }  # fmt: skip


def test_quantizers_between_layers_are_renamed_by_their_site() -> None:
    from basicsr_quant.models.conventions import adapt

    kind, options, names, beside = FILES['RDN of MMagic']
    net = build(kind, **options)
    state = foreign(net, names, beside)
    sites = {'rdbs-0/add-0': 'body-0/add-0', 'sfe1': 'conv_first', 'rdbs-1-lff': 'body-1-fusion', '/add-0': '/add-0'}
    given = {**state, **{f'tensor_quantizers.{site}.lower': torch.zeros(()) for site in sites}}
    own, project = adapt(net, given, 'file.pth')
    assert project == 'MMagic'
    assert set(own) == set(net.state_dict()) | {f'tensor_quantizers.{site}.lower' for site in sites.values()}
