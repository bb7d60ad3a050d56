"""Packages that do not sit where setuptools looks: kernels/ and recipes/ are installed as ldo.kernels and ldo.recipes.

``python setup.py build_ext`` builds the C++/CUDA extension of csrc/ in place, once there is one; all else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ldo", "ldo.*"]), "ldo.kernels", "ldo.recipes"],
    package_dir={"ldo.kernels": "kernels", "ldo.recipes": "recipes"},
    package_data={
        "ldo.recipes": ["*.yaml"],
        "ldo.report": ["style.css"],
        "ldo.sandbox": ["thresholds.json", "models/**/*.json", "models/**/*.safetensors"],
    },
)
