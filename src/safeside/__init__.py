"""Safety for language models as small, detachable adapters: guards, aligners, genes."""

from safeside.adapters.adapter import Adapter, register_adapter
from safeside.adapters.config import AdapterConfig
from safeside.adapters.sizing import flops_share, make_config, sized_config
from safeside.artifact import create_adapter, load_adapter, save_adapter
from safeside.attach import Attachment, attach
from safeside.base.families import Family, register_family
from safeside.base.model import Base, load_base
from safeside.errors import SafesideError
from safeside.mixing import fixed, mix, ramp, step
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
    "sized_config",
    "step",
]
