"""The Triton kernels, imported as ``ldo.kernels``.

They live in the top-level folder ``kernels/``, which has no ``__init__.py``: with one it would shadow the Hugging Face
package ``kernels`` for everybody who runs Python from the repository's root. In a wheel they are ``ldo/kernels/``.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_HERE / "kernels", _HERE.parent / "kernels") if p.is_dir()))]
