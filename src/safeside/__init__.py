"""Safety for language models as small, detachable adapters: guards, aligners, genes.

The public names are imported on first use, so that ``safeside --help`` does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeside.adapters.adapter import Adapter, register_adapter
    from safeside.adapters.config import AdapterConfig
    from safeside.adapters.sizing import flops_share, make_config, sized_config
    from safeside.artifact import create_adapter, load_adapter, save_adapter
    from safeside.attach import Attachment, attach
    from safeside.base.families import Family, register_family
    from safeside.base.model import Base, load_base
    from safeside.errors import SafesideError
    from safeside.mixing import fixed, mix, ramp, step
    from safeside.policies import by_category, sigmoid, strongest, timed
    from safeside.types import Completion, Message, Verdict

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Attachment",
    "Base",
    "Completion",
    "Family",
    "Message",
    "SafesideError",
    "Verdict",
    "attach",
    "by_category",
    "create_adapter",
    "fixed",
    "flops_share",
    "load_adapter",
    "load_base",
    "make_config",
    "mix",
    "ramp",
    "register_adapter",
    "register_family",
    "save_adapter",
    "sigmoid",
    "sized_config",
    "step",
    "strongest",
    "timed",
]

_HOMES = {
    "adapters.adapter": ("Adapter", "register_adapter"),
    "adapters.config": ("AdapterConfig",),
    "adapters.sizing": ("flops_share", "make_config", "sized_config"),
    "artifact": ("create_adapter", "load_adapter", "save_adapter"),
    "attach": ("Attachment", "attach"),
    "base.families": ("Family", "register_family"),
    "base.model": ("Base", "load_base"),
    "errors": ("SafesideError",),
    "mixing": ("fixed", "mix", "ramp", "step"),
    "policies": ("by_category", "sigmoid", "strongest", "timed"),
    "types": ("Completion", "Message", "Verdict"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """This package.  Importing the module ``safeside.attach`` must not hide the function ``attach``."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return vars(import_module(_HOME_OF[name]))[name]

    def __dir__() -> list[str]:
        return sorted(__all__)
