"""A run that is stopped at a given call, as by Ctrl-C."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def interrupted(module: ModuleType, name: str, call: int) -> Iterator[None]:
    """The body must end with a KeyboardInterrupt, raised in place of call number ``call`` of ``module.name``."""
    real, calls = getattr(module, name), []

    def dies(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, dies)
        yield
