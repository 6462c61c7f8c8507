"""Packaging. The core needs torch only; the hosts are extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
version = re.search(r"__version__ = '(.+)'", (here / 'basicsr_quant' / 'version.py').read_text()).group(1)
readme = here / 'README.md'

setup(
    name='basicsr_quant',
    version=version,
    description='Quantization and sparsity for image-restoration networks, as a plug-in of BasicSR and MMagic',
    long_description=readme.read_text() if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=[*find_packages(include=['basicsr_quant', 'basicsr_quant.*']), 'basicsr_quant.options'],
    # The option files stand at the top of the repository and are installed inside the package.
    package_dir={'basicsr_quant.options': 'options'},
    package_data={'basicsr_quant.options': ['*.yml', 'mmagic/*.py']},
    install_requires=['torch>=2.1', 'numpy>=1.21', 'PyYAML>=5.4'],
    extras_require={
        # BasicSR's build imports torch: install it with --no-build-isolation, or pip fetches a second torch.
        'basicsr': ['basicsr==1.4.2', 'torchvision', 'lmdb', 'opencv-python', 'tqdm'],
        'spandrel': ['spandrel==0.4.2'],  # network_g: {type: Spandrel}; Python 3.10 and newer
        'safetensors': ['safetensors'],
        'prune': ['torch-pruning>=1.6,<2'],
        'deploy': ['onnx>=1.17', 'onnxscript>=0.5', 'onnxruntime>=1.20', 'openvino>=2025.0'],
        # MMagic 1.2.0 does not say which versions it works with; constraints-mmagic.txt has a whole set. mmcv below 2.2
        # comes first and from OpenMMLab: mim install 'mmcv>=2.0.0,<2.2.0' (from a source package it has no operators).
        'mmagic': [
            'mmagic>=1.2.0,<2', 'mmengine>=0.10.4,<1', 'numpy<2', 'setuptools<82', 'diffusers>=0.23,<0.25',
            'huggingface_hub<0.26', 'transformers>=4.34,<4.47', 'albumentations<1.4',
        ],
        'test': ['pytest', 'hypothesis', 'ruff', 'mypy'],
    },
    entry_points={'console_scripts': ['basicsr = basicsr_quant.cli:main']},
)
