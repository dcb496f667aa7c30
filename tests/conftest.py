"""Fixtures shared by all tests: tiny bases, each built once a session, and random adapters for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# Shapes in annotations are checked at run time, in tests only.  It must stand before the first import of safeside.
# adapters.adapter is left out: beartype cannot check type[Trunk], a protocol with attributes.
_CHECKED = (
    "mixing",
    "base.taps",
    "adapters.blocks",
    "adapters.lst",
    "adapters.plr",
    "adapters.rtb",
    "adapters.lst_plus",
    "adapters.state_map",
    "gates",
)
install_import_hook([f"safeside.{name}" for name in _CHECKED], "beartype.beartype")

from transformers.utils import logging  # noqa: E402

from command_line import adapters, run, small_suite  # noqa: E402, F401  # fixtures
from safeside import Adapter, Base, create_adapter, load_base, make_config  # noqa: E402
from safeside.adapters.adapter import DeltaHead  # noqa: E402
from safeside.adapters.config import LADDERS  # noqa: E402
from tiny import make_tiny  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: a second thread only costs
hypothesis.settings.register_profile("busy", deadline=None)  # speed is never a test: machines are shared
hypothesis.settings.load_profile("busy")
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_folder("llama")`` is the saved tiny model of a family, written on first use."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def folder(family_name: str) -> Path:
        if family_name not in made:
            made[family_name] = make_tiny(family_name, root / family_name)
        return made[family_name]

    return folder


@pytest.fixture(scope="session")
def tiny_family(tiny_folder: Callable[[str], Path]) -> Callable[[str], Base]:
    """``tiny_family("gemma2")`` is that family's tiny base, loaded once a session: detach what you attach."""
    loaded: dict[str, Base] = {}

    def base(family_name: str) -> Base:
        if family_name not in loaded:
            loaded[family_name] = load_base(tiny_folder(family_name))
        return loaded[family_name]

    return base


@pytest.fixture(scope="session")
def session_base(tiny_family: Callable[[str], Base]) -> Base:
    """The tiny llama for fixtures that outlive one test."""
    return tiny_family("llama")


@pytest.fixture(scope="session")
def pristine(session_base: Base) -> dict[str, torch.Tensor]:
    """The tiny llama's tensors as they were loaded."""
    return {name: tensor.clone() for name, tensor in tensors_of(session_base).items()}


def tensors_of(base: Base) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved (rotary frequencies) included."""
    return dict([*base.model.named_parameters(), *base.model.named_buffers()])


@pytest.fixture
def tiny_base(session_base: Base, pristine: dict[str, torch.Tensor]) -> Iterator[Base]:
    """The tiny llama; whatever a test leaves attached is detached after it, and no test may change a byte of it."""
    yield session_base
    if session_base.attachment is not None:
        session_base.attachment.detach()
    left = tensors_of(session_base)
    assert left.keys() == pristine.keys(), "the test changed the modules of the shared base"
    assert all(torch.equal(left[name], tensor) for name, tensor in pristine.items())


def default_dial(options: dict[str, object]) -> dict[str, object]:
    """Half the base's width for a ladder that is not told its own."""
    return {"reduction": 2} if options.get("kind", "lst") in LADDERS and "width" not in options else {}


@pytest.fixture(scope="session")
def random_guard() -> Callable[..., Adapter]:
    """``random_guard(base, name="harm", kind="lst", ...)``: a guard whose scores spread over (0, 1)."""

    def make(base: Base, name: str = "harm", seed: int = 1, **options: object) -> Adapter:
        options = {**default_dial(options), **options}
        guard = create_adapter(base, make_config(base, role="guard", name=name, **options), seed)
        with torch.no_grad():
            guard.head.linear.weight.mul_(4.0)
        return guard.to(base.dtype).eval()

    return make


@pytest.fixture(scope="session")
def random_aligner() -> Callable[..., Adapter]:
    """``random_aligner(base, name="refuse", kind="lst", ...)``: an aligner whose delta is as large as the state."""

    def make(base: Base, name: str = "refuse", seed: int = 2, **options: object) -> Adapter:
        options = {**default_dial(options), **options}
        aligner = create_adapter(base, make_config(base, role="align", name=name, **options), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            if isinstance(aligner.head, DeltaHead):
                up = aligner.head.up.weight
                up.copy_(torch.randn(up.shape, generator=generator) / up.shape[1] ** 0.5)
            else:  # blocks of the base, a linear map: they are zero, or give zero, as long as nothing is added
                for parameter in aligner.parameters():
                    scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.02
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return aligner.to(base.dtype).eval()

    return make
