"""Final clamps: found in every form, taken out, and the output the same once it is clamped outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from basicsr_quant.errors import QuantError
from basicsr_quant.network.clamp_free import clamp_difference, take_out, with_clamps
from basicsr_quant.network.clamps import FinalClamp, find_final_clamps

FORMS = {  # each keeps its input within [0, 1] or less
    'torch.clamp': lambda x: torch.clamp(x, 0.0, 1.0),
    'clamp by name': lambda x: torch.clamp(input=x, min=0, max=1),
    'Tensor.clamp': lambda x: x.clamp(0, 1),
    'clip': lambda x: x.clip(min=0.0, max=1.0),
    'clamp_': lambda x: x.clamp_(0.0, 1.0),
    'clamp by tensors': lambda x: x.clamp(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)),
    'clamp_min, clamp_max': lambda x: x.clamp_min(0.0).clamp_max(1.0),
    'hardtanh': lambda x: functional.hardtanh(x, 0.0, 1.0),
    'hardtanh in place': lambda x: functional.hardtanh(x, 0.0, 1.0, inplace=True),
    'hardtanh of -1 to 1, shifted': lambda x: (functional.hardtanh(2 * x - 1) + 1) / 2,
    'relu6 of pixels': lambda x: functional.relu6(x * 6) / 6,
    'min(max())': lambda x: torch.min(torch.max(x, torch.tensor(0.0)), torch.tensor(1.0)),
    'minimum(maximum())': lambda x: torch.minimum(torch.maximum(torch.zeros_like(x), x), torch.ones_like(x)),
    'clipped relu': lambda x: functional.relu(x).clamp(max=1.0),
    'relu alone': functional.relu,
    'pixels of 255': lambda x: torch.clamp(x * 255, 0, 255).div(255),
    'negative': lambda x: 1 - torch.clamp(1 - x, 0.0, 1.0),
    'with a mean': lambda x: torch.clamp(x - 0.5, -0.5, 0.5) + torch.full((1, 1, 1, 1), 0.5),
    'wider than the range': lambda x: x.clamp(-0.25, 1.5),
}
MODULES = {
    'Hardtanh': nn.Hardtanh(0.0, 1.0),
    'Hardtanh in place': nn.Hardtanh(0.0, 1.0, inplace=True),
    'ReLU': nn.ReLU(),
    'nested': nn.Sequential(nn.ReLU(), nn.Identity(), nn.Hardtanh(-3.0, 1.0)),
}


class Tail(nn.Module):
    """A convolution, a ReLU that is called twice, a pixel shuffle, and ``form`` around the shuffle or behind it."""

    def __init__(self, form, where='last', scale=2):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.last = nn.Conv2d(8, 3 * scale**2, 3, padding=1)
        self.form, self.where, self.scale = form, where, scale

    def forward(self, x):
        y = self.last(self.act(self.act(self.conv(x)).clamp(max=2.0)))
        if self.where == 'before the shuffle':
            y = functional.pixel_shuffle(self.form(y), self.scale)
        else:
            y = self.form(functional.pixel_shuffle(y, self.scale))
        return y[:, :, : x.shape[2] * self.scale].contiguous() if self.where == 'before a crop' else y


class Form(nn.Module):
    """A module that does nothing but clamp, in a function."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


class Outer(nn.Module):
    """A network whose own forward torch.fx cannot follow, around one whose end it can."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if x.mean() > 5:
            raise ValueError
        return self.inner(x)


def large(net):
    """Weights that drive the output far out of [0, 1]."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    return net.eval()


def check(net, image=None):
    """Take the clamps out of ``net``: the output leaves [0, 1] and is the same within it."""
    image = torch.rand(2, 3, 19, 25) if image is None else image
    kind, keys = type(net), list(net.state_dict())
    with torch.no_grad():
        before = net(image.clone())
        clamps = find_final_clamps(net)
        assert torch.equal(net(image.clone()), before)
        plain = [FinalClamp(**clamp.to_plain()) for clamp in clamps]
        assert take_out(net, plain) is net
        after = net(image.clone())
        assert type(net) is kind and list(net.state_dict()) == keys
        assert after.max() > 1.5 and after.min() < -0.3
        assert torch.allclose(after.clamp(0, 1), before.clamp(0, 1), atol=1e-5)
        assert clamp_difference(net, image, 0, 1) <= 1e-5 < clamp_difference(net, image, -9, 9)
        with with_clamps(net):
            assert torch.equal(net(image.clone()), before)
        assert torch.equal(net(image.clone()), after)
        assert torch.equal(copy.deepcopy(net)(image.clone()), after)
    return clamps


@pytest.mark.parametrize('where', ['last', 'before the shuffle', 'before a crop'])
@pytest.mark.parametrize('form', FORMS)
def test_functional_forms(form, where):
    clamps = check(large(Tail(FORMS[form], where)))
    assert all(clamp.module == '' and clamp.call for clamp in clamps)


@pytest.mark.parametrize('where', ['last', 'before the shuffle', 'before a crop'])
@pytest.mark.parametrize('form', [*MODULES, *FORMS])
def test_forms_in_modules(form, where):
    module = copy.deepcopy(MODULES[form]) if form in MODULES else Form(FORMS[form])
    net = large(Tail(module, where))
    clamps = check(net)
    assert all(clamp.module.startswith('form') for clamp in clamps)
    if form in ('Hardtanh', 'torch.clamp'):
        assert clamps[0].call is None and isinstance(net.form, nn.Identity)


@pytest.mark.parametrize('form', ['torch.clamp', 'clamp_', 'min(max())'])
def test_a_forward_is_recorded_only_where_the_clamp_stands(form):
    check(large(Outer(Tail(FORMS[form]))))
    check(large(Outer(nn.Sequential(Tail(Form(FORMS[form]))))))


def test_only_the_last_clamps_go():
    net = large(Tail(FORMS['torch.clamp']))
    (clamp,) = find_final_clamps(net)
    assert (clamp.call, clamp.index, clamp.of, clamp.low, clamp.high) == ('clamp', 1, 2, 0.0, 1.0)
    take_out(net, [clamp])
    image = torch.rand(1, 3, 8, 8) * 9
    middle = []
    net.last.register_forward_pre_hook(lambda module, given: middle.append(given[0]))
    with torch.no_grad():
        net(image)
    assert float(middle[0].max()) == 2.0


def test_shared_activation_before_the_clamp_stays():
    class Shared(Tail):
        def forward(self, x):
            return torch.clamp(self.act(self.last(self.act(self.conv(x)))), max=1.0)

    (clamp,) = find_final_clamps(large(Shared(None, scale=1)))
    assert (clamp.call, clamp.high) == ('clamp', 1.0)


def test_gradient_and_training_mode_pass():
    net = large(Tail(FORMS['torch.clamp'])).train()
    take_out(net, find_final_clamps(net))
    assert net.training
    net(torch.rand(1, 3, 8, 8)).sum().backward()
    assert net.conv.weight.grad.abs().sum() > 0


class Middle(Tail):
    """The clamp is in the middle: what follows is ``after``."""

    def forward(self, x):
        return self.form(self.last(self.conv(x)).clamp(0, 1), x)


REFUSED = {
    'none': (lambda: Tail(nn.Identity()), 'has none|goes on with'),
    'a sigmoid': (lambda: Tail(torch.sigmoid), 'goes on with sigmoid'),
    'a sum after it': (lambda: Middle(torch.add, scale=1), r'after clamp\(\) in Middle, Middle goes on with add'),
    'a product after it': (lambda: Middle(lambda y, x: y * x.mean(), scale=1), 'goes on with mul'),
    'interpolation after it': (
        lambda: Middle(lambda y, x: functional.interpolate(y, scale_factor=2, mode='bilinear'), scale=1),
        'goes on with interpolate',
    ),
    'too narrow': (lambda: Tail(lambda x: x.clamp(0.1, 0.9)), r'within \[0.1, 0.9\], and the image range is \[0, 1\]'),
    'scaled': (lambda: Tail(lambda x: x.clamp(0, 1) * 2 - 0.5), None),
    'shrunk': (lambda: Tail(lambda x: x.clamp(0, 1) / 2), r'within \[0, 0.5\]'),
    'trained': (lambda: Trained(), 'goes on with mul'),
    'shared': (lambda: Twice(), "calls that module 2 times; give the last call a module of its own"),
    'two outputs': (lambda: Tail(lambda x: (x.clamp(0, 1), x)), 'one tensor as output'),
}


class Trained(Tail):
    """A trained factor after the clamp: unknown before the checkpoint is read."""

    def __init__(self):
        super().__init__(None)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.last(self.conv(x)).clamp(0, 1) * self.factor


class Twice(Tail):
    def __init__(self):
        super().__init__(nn.Hardtanh(0.0, 1.0), scale=1)

    def forward(self, x):
        return self.form(self.last(self.conv(self.form(x))))


@pytest.mark.parametrize('name', REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    net = make().eval()
    if message is None:  # [-0.5, 1.5] holds the image range
        assert find_final_clamps(net)
        return
    with pytest.raises(QuantError, match=message) as error:
        find_final_clamps(net)
    assert '\n' not in str(error.value) and "'cfqp'" in str(error.value)


def test_refused_forward():
    class Branches(Tail):
        def forward(self, x):
            if x.shape[2] % 2:
                x = functional.pad(x, (0, 0, 0, 1))
            return self.last(self.conv(x)).clamp(0, 1)

    class Modes(Tail):
        def forward(self, x):
            y = self.last(self.conv(x)).clamp(0, 1)
            return y if self.training else y * 1.0

    for kind, message in ((Branches, 'torch.fx cannot record'), (Modes, 'differs between training and testing')):
        net = kind(None, scale=1)
        before = dict(vars(net))
        with pytest.raises(QuantError, match=message):
            take_out(net, find_final_clamps(net))
        assert vars(net) == before


def test_a_plan_for_another_network_is_refused():
    clamps = find_final_clamps(Tail(FORMS['torch.clamp']))
    with pytest.raises(QuantError, match='as a Tail, in this network it is a Outer'):
        take_out(Outer(nn.Identity()), clamps)
    with pytest.raises(QuantError, match='another than the one that the plan was made for'):
        take_out(Tail(nn.Identity()), clamps)
    with pytest.raises(QuantError, match="'tail', which this network does not have"):
        take_out(Tail(nn.Identity()), [FinalClamp('tail', 'Hardtanh', None, 0, 1, 0, 0.0, 1.0)])


def test_image_range_of_255():
    net = large(Tail(lambda x: (x * 100).clamp(0, 255)))
    (clamp,) = find_final_clamps(net, 0.0, 255.0)
    assert clamp.high == 255
    with pytest.raises(QuantError, match=r'within \[0, 255\], and the image range is \[0, 300\]'):
        find_final_clamps(net, 0.0, 300.0)
