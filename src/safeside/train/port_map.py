"""Linear maps from one base's states to what an adapter took from another's, folded into its down-projections.

No labels and no training: on the same text, at tokens that have read the same characters, the states of the new base
are regressed (ridge) on what each block of the old adapter was fed.  A block's input is linear in a down-projection, so
the map *is* the new down-projection.  Rungs are fitted from the bottom up, each on what the ported rungs below it leave
to explain, so a shallower base, for which rungs are dropped, and errors of lower maps are made up for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from safeside.adapters.adapter import Adapter
from safeside.adapters.blocks import TapProjection, normed
from safeside.adapters.config import LADDERS, AdapterConfig, reference_of, require_valid
from safeside.adapters.lst import Lst
from safeside.adapters.plr import Plr
from safeside.adapters.sizing import make_config, widest
from safeside.base.model import Base
from safeside.errors import ConfigError, UnsupportedError
from safeside.train.port_text import Side
from safeside.train.taps import StoredTaps

INPUT, OUTPUT = 0, 1  # of a module
_BATCH = 32


def ported_config(source: AdapterConfig, base: Base, size: float | None = None) -> AdapterConfig:
    """The same side network on ``base``, its projections of full rank; with ``size`` the widest of that share.

    Taps stay at their relative depth, so they are fewer where the base is shallower.  Of ``toplayers`` the duplicated
    blocks are those of ``base``, from that depth up; a base whose blocks cannot be built anew is an UnsupportedError.
    A size that is too small for the narrowest gives the narrowest; for kinds without heads of their own, and not above
    0, it is a ConfigError.
    """
    layers = tuple(sorted({_new_layer(layer, source, base) for layer in source.layers}))
    values = {
        **source.model_dump(),
        "tap_rank": 0,
        "layers": layers,
        "base": reference_of(base),
        "calibration": None,
        "modes": {},
        "preset": None,
    }
    if source.kind == "toplayers":
        top = make_config(base, kind="toplayers", role=source.role, depth=max(1, base.n_layers - layers[0]))
        values |= top.model_dump(include={"depth", "layers", "blocks"})
    values["allow_mismatch"] = False
    return require_valid(values) if size is None else _sized(values, source, base, size)


def _sized(values: dict[str, object], source: AdapterConfig, base: Base, size: float) -> AdapterConfig:
    """The widest configuration that costs at most ``size``; a feed-forward goes with the width again."""
    if source.kind not in LADDERS or not 0 < size < math.inf:
        raise ConfigError(
            f"size is a share of the base's compute above 0, such as 0.01, for kinds {' and '.join(LADDERS)}; got "
            f"{size} for {source.kind!r}. Leave it out."
        )

    def config_of(width: int) -> AdapterConfig:
        return require_valid({**values, "width": width, "feed_forward": 0})

    return widest(base, size, source.width_step, config_of) or config_of(source.width_step)


def _new_layer(layer: int, source: AdapterConfig, base: Base) -> int:
    return math.floor(layer * base.n_layers / source.base.n_layers + 0.5)


def _trunk_of(adapter: Adapter) -> nn.Module:
    """The trunk as the module that it is, to be asked for its class."""
    trunk: nn.Module = adapter.trunk
    return trunk


def check_mappable(adapter: Adapter) -> None:
    """Raise unless a linear map can be folded into the adapter's projections."""
    trunk = _trunk_of(adapter)
    is_probe = isinstance(trunk, Plr) and trunk.hidden is None
    if adapter.config.role != "guard" or is_probe or not isinstance(trunk, Lst | Plr):
        kind = f"its kind {adapter.config.kind!r} has no down-projection that a map could become"
        reason = "it is an aligner" if adapter.config.role == "align" else kind
        raise UnsupportedError(
            f"{adapter.name!r} cannot be ported by maps: {reason}; expected a guard of kind 'lst', or 'plr' with a "
            "width. Use --method distill."
        )


class Maps:
    """Two sides and the positions at which they have read the same text: (old, new) pairs of each row."""

    def __init__(self, old: Side, new: Side, pairs: Sequence[Sequence[tuple[int, int]]], ridge: float) -> None:
        check_mappable(old.adapter)
        self.old, self.new, self.pairs, self.ridge = old, new, pairs, ridge

    @torch.no_grad()
    def fold(self) -> None:
        """Give the new adapter the old one's blocks and head, and fit its down-projections.

        The old side is read once: what its modules take and give at the paired positions is kept, d wide each.
        """
        old, new = _trunk_of(self.old.adapter), _trunk_of(self.new.adapter)
        self.new.adapter.head.load_state_dict(self.old.adapter.head.state_dict())
        if isinstance(old, Plr) and isinstance(new, Plr):
            assert old.hidden is not None
            assert new.hidden is not None
            (wanted,) = self._wanted([(old.hidden, OUTPUT)])
            self._fit(new.hidden, new.layer, wanted, None)
        elif isinstance(old, Lst) and isinstance(new, Lst):
            self._fold_ladder(old, new)

    def _fold_ladder(self, old: Lst, new: Lst) -> None:
        """Rung by rung: a block is fed ``(x + D h) / 2``, so ``D h`` is fitted to twice the old input less ``x``."""
        source = {_new_layer(layer, self.old.adapter.config, self.new.base): layer for layer in (old.first, *old.rungs)}
        old_blocks = dict(zip(old.rungs or [old.first], old.blocks, strict=True))
        for block, layer in zip(new.blocks, new.rungs or [new.first], strict=True):
            block.load_state_dict(old_blocks[source[layer]].state_dict())
        below: nn.Module = new.taps[str(new.first)]
        if not new.rungs:
            (wanted,) = self._wanted([(old_blocks[source[new.first]], INPUT)])
            self._fit(below, new.first, wanted, None)
            return
        bottom = source[new.first]
        begins = old.taps[str(bottom)] if bottom == old.first else old_blocks[bottom]
        inputs = [(old_blocks[source[layer]], INPUT) for layer in new.rungs]
        first, *others = self._wanted([(begins, OUTPUT), *inputs])
        self._fit(below, new.first, first, None)
        for layer, block, wanted in zip(new.rungs, new.blocks, others, strict=True):
            self._fit(new.taps[str(layer)], layer, wanted, below)
            below = block

    def _wanted(self, taken: Sequence[tuple[nn.Module, int]]) -> list[Tensor]:
        """What goes into or comes out of modules of the old side at all paired positions, (n, d) each, in order."""
        parts = [
            [passed[row_of, old_at] for passed in _passing(self.old, rows, taken)]
            for rows, row_of, old_at, _ in self._batches()
        ]
        return [torch.cat(some) for some in zip(*parts, strict=True)]

    def _batches(self) -> Iterator[tuple[range, Tensor, Tensor, Tensor]]:
        """Some rows, and of their pairs the place of the row, the old position and the new one."""
        for start in range(0, len(self.pairs), _BATCH):
            rows = range(start, min(start + _BATCH, len(self.pairs)))
            places = [(place, *pair) for place, row in enumerate(rows) for pair in self.pairs[row]]
            yield (rows, *torch.tensor(places, dtype=torch.long).reshape(-1, 3).T)

    def _fit(self, tap: nn.Module, layer: int, wanted: Tensor, below: nn.Module | None) -> None:
        """Ridge regression of one down-projection from ``layer``; ``below`` feeds the other half of its block."""
        assert isinstance(tap, TapProjection)
        n_inputs = self.new.base.d_model + 1
        squares = torch.zeros(n_inputs, n_inputs, dtype=torch.float64)
        products = torch.zeros(n_inputs, self.new.adapter.config.width, dtype=torch.float64)
        done = 0
        for rows, row_of, _, new_at in self._batches():
            targets = wanted[done : done + len(row_of)].double()
            done += len(row_of)
            if below is not None:
                (given,) = _passing(self.new, rows, [(below, OUTPUT)])
                targets = 2 * targets - given[row_of, new_at].double()
            states = normed(self.new.store.read(self.new.batch(rows))[layer].float())[row_of, new_at].cpu().double()
            inputs = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], dim=1)
            squares += inputs.T @ inputs
            products += inputs.T @ targets
        penalty = self.ridge * squares.diagonal()[:-1].mean() * torch.eye(n_inputs, dtype=torch.float64)
        penalty[-1, -1] = 1e-9 * squares[-1, -1]  # the mean is not shrunk
        solution = torch.linalg.solve(squares + penalty, products)
        (projection,) = tap.project
        assert isinstance(projection, nn.Linear)
        projection.weight.copy_(solution[:-1].T)
        projection.bias.copy_(solution[-1])


def _passing(side: Side, rows: Sequence[int], taken: Sequence[tuple[nn.Module, int]]) -> list[Tensor]:
    """What goes into or comes out of modules (B, T, d) while the side's adapter reads some rows, in their order."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = inputs[0], output

    handles = [module.register_forward_hook(keep) for module, _ in taken]
    try:
        StoredTaps(side.store, side.adapter)(side.batch(rows))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[module][end].detach().float().cpu() for module, end in taken]
