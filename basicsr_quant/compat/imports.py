"""Mends that must come before ``import basicsr``: what the host imports and today's packages no longer have."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import sys
from types import ModuleType

import torch
from torch.torch_version import TorchVersion

# torch drops an operator when the library object that declared it dies.
_libraries: list[torch.library.Library] = []


def torchvision_operators() -> bool:
    """Declare ``nms`` and ``qnms``: torchvision names them at import although its binary part did not load."""
    if 'torchvision' in sys.modules or _operators_load():
        return False
    library = torch.library.Library('torchvision', 'DEF')
    for name in ('nms', 'qnms'):
        library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _libraries.append(library)
    return True


def _operators_load() -> bool:
    """Load torchvision's binary part as torchvision itself does; True also where torchvision is not installed."""
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return True
    if hasattr(torch.ops.torchvision, 'nms'):
        return True
    names = ('_C.so', '_C*.so', '_C*.pyd')
    found = [path for name in names for path in glob.glob(os.path.join(spec.submodule_search_locations[0], name))]
    if not found:
        return False
    try:
        torch.ops.load_library(found[0])
    except (ImportError, OSError):
        return False
    return True


def functional_tensor() -> bool:
    """Give back ``torchvision.transforms.functional_tensor``: gone since 0.17, ``basicsr.data`` imports it."""
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False
    module = importlib.import_module('torchvision.transforms._functional_tensor')
    sys.modules[name] = module
    setattr(importlib.import_module('torchvision.transforms'), 'functional_tensor', module)  # noqa: B010
    return True


def distutils_version() -> bool:
    """Give back ``distutils.version.LooseVersion``: gone since Python 3.12, ``basicsr.archs.arch_util`` wants it."""
    try:
        importlib.import_module('distutils.version')
        return False
    except ImportError:
        pass
    package, module = ModuleType('distutils'), ModuleType('distutils.version')
    module.LooseVersion = TorchVersion  # type: ignore[attr-defined]
    package.version = module  # type: ignore[attr-defined]
    sys.modules['distutils'], sys.modules['distutils.version'] = package, module
    return True


def scipy_filters() -> bool:
    """Give back ``scipy.ndimage.filters``: SciPy 2 drops it, ``basicsr.metrics.niqe`` wants it."""
    name = 'scipy.ndimage.filters'
    if importlib.util.find_spec(name) is not None:
        return False
    sys.modules[name] = importlib.import_module('scipy.ndimage')
    return True


MENDS = (torchvision_operators, functional_tensor, distutils_version, scipy_filters)
