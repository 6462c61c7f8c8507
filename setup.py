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
    package_data={'basicsr_quant.options': ['*.yml']},
    install_requires=['torch>=2.1', 'numpy>=1.21', 'PyYAML>=5.4'],
    extras_require={
        # BasicSR's build imports torch: install it with --no-build-isolation, or pip fetches a second torch.
        'basicsr': ['basicsr==1.4.2', 'torchvision', 'lmdb', 'opencv-python', 'tqdm'],
        'spandrel': ['spandrel==0.4.2'],  # network_g: {type: Spandrel}; Python 3.10 and newer
        'safetensors': ['safetensors'],
        'mmagic': ['mmagic', 'mmcv', 'mmengine'],
        'test': ['pytest', 'hypothesis', 'ruff', 'mypy'],
    },
    entry_points={'console_scripts': ['basicsr = basicsr_quant.cli:main']},
)
