"""The Triton kernels, imported as ``ldo.kernels``.

They live in the top-level folder ``kernels/``, which has no ``__init__.py``: it would shadow the Hugging Face package
``kernels`` for everyone who runs Python from the repository's root. In a wheel they are ``ldo/kernels/``.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
# the wheel's folder first, then the checkout's
_PLACES = (_HERE / "kernels", _HERE.parent / "kernels")
__path__ = [str(next(folder for folder in _PLACES if folder.is_dir()))]
