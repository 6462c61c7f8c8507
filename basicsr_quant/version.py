"""The version of the package, in one place for setup.py, the result files and `basicsr --version`."""

__version__ = '0.1.0'
