"""Training. The package is callable, so `deltatune.train(model, SFT(), ...)` and `deltatune.train.loop` both work."""

import sys
from types import ModuleType
from typing import Any


class Room(ModuleType):
    """A package and a function of the same name: calling it runs `deltatune.train.run.train`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from deltatune.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = Room
