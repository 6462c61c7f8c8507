"""The photographs that the demo works on: those inside the wheels of scikit-image and scikit-learn, no download.

The two lists never meet: what is held out is in no training set and no calibration set.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from basicsr_quant.errors import QuantError

HELD_OUT = ('coffee.png', 'chelsea.png', 'rocket.jpg')
"""Measured on, never learned from (scikit-image)."""

TRAINING = (
    'astronaut.png',
    'hubble_deep_field.jpg',
    'ihc.png',
    'motorcycle_left.png',
    'motorcycle_right.png',
    'retina.jpg',
)
"""What the demo fine-tunes on and calibrates with (scikit-image, colour)."""

REDISTRIBUTABLE = {
    'skimage': (
        'astronaut.png',
        'camera.png',
        'clock_motion.png',
        'coins.png',
        'hubble_deep_field.jpg',
        'ihc.png',
        'retina.jpg',
    ),
    'sklearn': ('china.jpg', 'flower.jpg'),
}
"""What the demo's network is trained on: photographs whose stated terms allow passing them on (tools/demo/CARD.md)."""

_FOLDERS = {'skimage': ('scikit-image', 'data'), 'sklearn': ('scikit-learn', 'datasets/images')}


def folder(package: str) -> Path:
    """Return the folder in which ``skimage`` or ``sklearn`` keeps its photographs.

    Raises:
        QuantError: If the package is not installed.
    """
    distribution, inside = _FOLDERS[package]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise QuantError(f'the photographs lie in {distribution}, which is missing: pip install {distribution}')
    return Path(spec.origin).parent / inside


def read(name: str, package: str = 'skimage') -> NDArray[np.uint8]:
    """Return a photograph, BGR uint8 of shape (H, W, 3) as OpenCV and BasicSR hold images; gray becomes three channels.

    Raises:
        QuantError: If the installed package has no such file.
    """
    path = folder(package) / name
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise QuantError(f'{_FOLDERS[package][0]} as installed here has no photograph {path}')
    return image
