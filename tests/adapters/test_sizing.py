"""Costs counted by hand, and the size dial at the shapes of real models."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import Gemma2Config, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

from safeside import Adapter, Base, create_adapter, flops_share, make_config, sized_config
from safeside.adapters.adapter import DIMENSIONS, dimensions_of
from safeside.adapters.config import LADDERS
from safeside.adapters.sizing import adapter_matmuls, base_matmuls, geometry_base
from safeside.errors import ConfigError, MismatchError

# From the published config.json of each model.
GEOMETRIES = {
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064,
    ),
    "Mistral-7B-v0.1": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000,
    ),
    "gemma-2-9b": Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
        head_dim=256, vocab_size=256000,
    ),
    "Qwen2.5-14B": Qwen2Config(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
        vocab_size=152064,
    ),
}  # fmt: skip
# Parameters that the makers publish, in billions, embeddings left out; the head counts once here.
PUBLISHED = {"Qwen2.5-7B": 6.53, "Mistral-7B-v0.1": 6.98, "gemma-2-9b": 8.32, "Qwen2.5-14B": 13.2}


def on_meta(base: Base, **options: object) -> Adapter:
    with torch.device("meta"):
        return Adapter(make_config(base, **options))


@pytest.fixture(scope="module")
def geometry() -> Callable[[str], Base]:
    made = {name: geometry_base(config, name) for name, config in GEOMETRIES.items()}
    return made.__getitem__


def by_hand(config: PreTrainedConfig, head_dim: int) -> int:
    """Attention and gated feed-forward of every block, and one head pass."""
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + feed_forward) + config.vocab_size * config.hidden_size


@pytest.mark.parametrize("name", GEOMETRIES)
def test_real_bases_cost_what_their_shapes_say(name: str, geometry: Callable[[str], Base]) -> None:
    config = GEOMETRIES[name]
    head_dim = 256 if name.startswith("gemma") else config.hidden_size // config.num_attention_heads
    found = base_matmuls(geometry(name))
    assert found == by_hand(config, head_dim)
    blocks = found - config.vocab_size * config.hidden_size
    assert blocks / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("role", ["guard", "align"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_percent_is_at_most_one_percent(name: str, role: str, geometry: Callable[[str], Base]) -> None:
    base = geometry(name)
    config = sized_config(base, 0.01, role=role)
    assert config.layers == tuple(range(base.n_layers + 1))
    with torch.device("meta"):
        share, wider = (
            flops_share(base, Adapter(config)),
            Adapter(make_config(base, role=role, width=config.width + 32)),
        )
    assert 0.008 < share <= 0.01 < flops_share(base, wider)


@pytest.mark.parametrize(("n_taps", "layers"), [(1, (28,)), (4, (7, 14, 21, 28)), (28, tuple(range(1, 29)))])
def test_fewer_taps_are_wider_at_the_same_cost(
    n_taps: int, layers: tuple[int, ...], geometry: Callable[[str], Base]
) -> None:
    base = geometry("Qwen2.5-7B")
    all_layers, config = sized_config(base, 0.01), sized_config(base, 0.01, n_taps)
    assert config.layers == layers
    assert config.width >= all_layers.width
    with torch.device("meta"):
        share, wider = (
            flops_share(base, Adapter(config)),
            Adapter(make_config(base, layers=config.layers, width=config.width + 32)),
        )
    assert 0.008 < share <= 0.01 < flops_share(base, wider)
    assert sized_config(base, 0.01, 29).layers == all_layers.layers


@pytest.mark.parametrize("size", [1e-6, 0.05, 0.2, 0.5, 2.0])
def test_the_dial_takes_fewer_taps_where_those_asked_for_do_not_fit(tiny_base: Base, size: float) -> None:
    fitting = [
        (layers, width)
        for layers in ((1, 2, 3), (2, 3), (3,))
        for width in (64, 32)
        if flops_share(tiny_base, on_meta(tiny_base, layers=layers, width=width)) <= size
    ]
    config = sized_config(tiny_base, size, 3)
    assert (config.layers, config.width) == (fitting[0] if fitting else ((3,), 32))


@pytest.mark.parametrize("n_taps", [0, -1, 5])
def test_taps_without_a_layer_are_refused(tiny_base: Base, n_taps: int) -> None:
    with pytest.raises(ConfigError, match=r"n_taps must lie in 1\.\.4"):
        sized_config(tiny_base, 0.5, n_taps)


def test_a_tiny_llama_by_hand(tiny_base: Base) -> None:
    """3 blocks of width 64, 4 heads of 16, 2 key-value heads, feed-forward 96; 304 words."""
    assert base_matmuls(tiny_base) == 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96) + 304 * 64


def test_adapters_by_hand(tiny_base: Base) -> None:
    block = 4 * 32 * 32 + 3 * 32 * 96
    guard = create_adapter(tiny_base, make_config(tiny_base, width=32))
    assert adapter_matmuls(guard) == 4 * 64 * 32 + 3 * block + 32
    aligner = create_adapter(tiny_base, make_config(tiny_base, role="align", width=32, tap_rank=4))
    assert adapter_matmuls(aligner) == 4 * (64 * 4 + 4 * 32) + 3 * block + 32 * 64
    assert adapter_matmuls(create_adapter(tiny_base, make_config(tiny_base, kind="plr"))) == 64
    bypass = create_adapter(tiny_base, make_config(tiny_base, kind="rtb", bottleneck=8))
    assert adapter_matmuls(bypass) == (4 + 3) * 2 * 64 * 8 + 64


def test_aligners_by_hand(tiny_base: Base) -> None:
    """A block of the tiny llama has 64 x (64 + 32 + 32 + 64) entries of attention and 3 x 64 x 96 of feed-forward."""

    def cost(**options: object) -> int:
        return adapter_matmuls(create_adapter(tiny_base, make_config(tiny_base, role="align", **options)))

    ladder, top = 4 * 64 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 96), 64 * 192 + 3 * 64 * 96
    assert cost(kind="lst_plus", width=32) == ladder + 64 * 32 + 32 * 32 + 64 * 64
    assert cost(kind="lst_plus", width=32, cross_attention=True) == ladder + 64 * 32 + 3 * 32 * 32 + 64 * 64
    assert cost(kind="state_map", bottleneck=4) == 2 * 64 * 4
    assert cost(kind="toplayers", depth=2) == 2 * top
    updates = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert cost(kind="toplayers", depth=2, lora_rank=4) == 2 * (top + updates)


def test_a_duplicated_mixture_counts_the_experts_that_a_token_visits(tiny_family: Callable[[str], Base]) -> None:
    base = tiny_family("mixtral")
    top = create_adapter(base, make_config(base, kind="toplayers", role="align", depth=3))
    assert adapter_matmuls(top) == base_matmuls(base) - 304 * 64


def test_several_adapters_add_up(tiny_base: Base) -> None:
    guard, aligner = on_meta(tiny_base), on_meta(tiny_base, role="align")
    assert flops_share(tiny_base, guard, aligner) == pytest.approx(
        flops_share(tiny_base, guard) + flops_share(tiny_base, aligner)
    )
    assert flops_share(tiny_base) == 0.0


def test_mixtures_count_the_experts_that_a_token_visits(tiny_family: Callable[[str], Base]) -> None:
    """mixtral: 4 experts of 3 x 64 x 96, 2 of them a token, and the router of 4 x 64."""
    attention, head = 64 * (64 + 32 + 32 + 64), 304 * 64
    assert base_matmuls(tiny_family("mixtral")) == 3 * (attention + 2 * 3 * 64 * 96 + 4 * 64) + head
    assert base_matmuls(tiny_family("gpt-oss")) == 3 * (attention + 2 * 3 * 64 * 96 + 4 * 64) + head
    assert base_matmuls(tiny_family("qwen3-moe")) == 3 * (attention + 2 * 3 * 64 * 48 + 4 * 64) + head


def test_a_published_mixture_costs_its_active_parameters() -> None:
    """Qwen3-30B-A3B: 3.3 billion active, of which 0.3 are the embedding that is only looked up."""
    config = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    )  # fmt: skip
    assert base_matmuls(geometry_base(config)) / 1e9 == pytest.approx(3.35 - 0.31, rel=0.02)


def test_encoders_have_no_head(tiny_family: Callable[[str], Base]) -> None:
    assert base_matmuls(tiny_family("bert")) == 3 * (4 * 64 * 64 + 2 * 64 * 96)


@pytest.mark.parametrize("size", [1e-6, 0.05, 0.2, 0.5, 2.0])
@pytest.mark.parametrize(("step", "options"), [(32, {}), (64, {"head_dim": 64}), (64, {"query_group": 2})])
def test_the_dial_takes_the_largest_that_fits(tiny_base: Base, size: float, step: int, options: dict[str, int]) -> None:
    """Against trying every width of every stride: greatest depth first, then greatest width, else the narrowest tap."""
    fitting = [
        (layers, width)
        for layers in ((0, 1, 2, 3), (1, 3), (0, 3), (3,))
        for width in range(64, 0, -step)
        if flops_share(tiny_base, on_meta(tiny_base, layers=layers, width=width, **options)) <= size
    ]
    config = sized_config(tiny_base, size, **options)
    assert (config.layers, config.width) == (fitting[0] if fitting else ((3,), step))
    assert (config.head_dim, config.query_group) == (options.get("head_dim", 32), options.get("query_group", 1))


@pytest.mark.parametrize("group", [0, -1, "two", "2", 1.5, 2.0, True])
@pytest.mark.parametrize("width", [None, 64])
def test_a_group_has_a_head_or_more(tiny_base: Base, group: object, width: int | None) -> None:
    with pytest.raises(ConfigError, match="query_group"):
        make_config(tiny_base, query_group=group, **({} if width is None else {"width": width}))
    with pytest.raises(ConfigError, match="query_group"):
        sized_config(tiny_base, 0.5, query_group=group)


def test_a_group_wider_than_the_base_is_refused(tiny_base: Base) -> None:
    with pytest.raises(
        ConfigError, match="query_group 3 of heads 32 wide takes a width of 96 at least; the base is 64"
    ):
        make_config(tiny_base, query_group=3)
    with pytest.raises(ConfigError, match="query_group 2 of heads 64 wide takes a width of 128 at least"):
        sized_config(tiny_base, 0.5, query_group=2, head_dim=64)


def test_other_kinds_have_no_dial(tiny_base: Base) -> None:
    for kind in ("plr", "rtb"):
        with pytest.raises(ConfigError, match=f"size is for kind 'lst'; call make_config .*'{kind}'"):
            sized_config(tiny_base, 1e-5, kind=kind)


@pytest.mark.parametrize("size", [0, -1, math.nan, math.inf])
def test_a_size_is_a_share(tiny_base: Base, size: float) -> None:
    with pytest.raises(ConfigError, match="size is a share of the base's compute above 0"):
        sized_config(tiny_base, size)


@pytest.mark.parametrize("chosen", [{"width": 32}, {"layers": (1,)}, {"reduction": 4}])
def test_the_dial_takes_no_second_hand(tiny_base: Base, chosen: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"size picks width and layers; leave {next(iter(chosen))} out"):
        sized_config(tiny_base, 0.5, **chosen)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "rtb", "width": 32}, "'width' does nothing for kind 'rtb', which reads bottleneck"),
        ({"kind": "rtb", "tap_rank": 4}, "'tap_rank' does nothing for kind 'rtb'"),
        ({"kind": "rtb", "head_dim": 64}, "'head_dim' does nothing for kind 'rtb'"),
        ({"kind": "rtb", "query_group": 2}, "'query_group' does nothing for kind 'rtb'"),
        ({"kind": "rtb", "reduction": 4}, "'reduction' does nothing for a guard of kind 'rtb'. Give 'bottleneck'"),
        ({"kind": "plr", "reduction": 4}, "'reduction' does nothing for a guard of kind 'plr'. Give 'width'"),
        ({"kind": "plr", "gate": "layer"}, "'gate' does nothing for kind 'plr', which reads tap_rank, width"),
        ({"kind": "plr", "feed_forward": 64}, "'feed_forward' does nothing for kind 'plr'"),
        ({"kind": "plr", "tap_rank": 4}, "'tap_rank' does nothing for a linear probe"),
        ({"kind": "lst", "bottleneck": 8}, "'bottleneck' does nothing for kind 'lst'"),
        ({"role": "align", "readout": "attention"}, "'readout' is for guards"),
        ({"reduction": 4, "width": 32}, "'reduction' and 'width' both set the width"),
        ({"reduction": 0}, "'reduction' must be a number from 1 on; got 0"),
        ({"reduction": math.nan}, "'reduction' must be a number from 1 on"),
        ({"reduction": math.inf}, "'reduction' must be a number from 1 on"),
    ],
)
def test_no_field_is_ignored(tiny_base: Base, options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config(tiny_base, **options)


@pytest.mark.parametrize("kind", ["plr", "rtb", "lst", "lst_plus", "state_map", "toplayers"])
@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_kind_reads_exactly_the_dimensions_that_it_declares(tiny_base: Base, kind: str, name: str) -> None:
    """A dimension that is read changes the trunk's tensors (head_dim only their use); any other changes nothing."""
    start = {"plr": {"width": 32}, "lst": {"width": 64}, "lst_plus": {"width": 64}}.get(kind, {})
    other = {
        "width": 128, "feed_forward": 96, "head_dim": 64, "query_group": 2, "tap_rank": 4, "gate": "channel",
        "bottleneck": 8, "cross_attention": True, "depth": 1, "lora_rank": 2,
    }[name]  # fmt: skip
    plain = make_config(tiny_base, kind=kind, role="align", **start)
    changed = plain.model_copy(update={name: other})
    shapes = [
        {key: tensor.shape for key, tensor in Adapter(config).state_dict().items()} for config in (plain, changed)
    ]
    if name == "head_dim":
        assert (name in dimensions_of(kind)) == (kind in LADDERS)
    else:
        assert (name in dimensions_of(kind)) == (shapes[0] != shapes[1])


def test_nothing_made_for_a_geometry_loads_on_a_real_base(tiny_base: Base, tmp_path: object) -> None:
    from safeside import load_adapter, save_adapter

    base = geometry_base(tiny_base.model.config)
    assert base_matmuls(base) == base_matmuls(tiny_base)
    with pytest.raises(MismatchError, match="geometry"):
        load_adapter(save_adapter(Adapter(make_config(base)), tmp_path), tiny_base)


def test_guards_on_encoders_pool_unless_told_otherwise(tiny_family: Callable[[str], Base]) -> None:
    assert make_config(tiny_family("bert")).readout == "attention"
    assert make_config(tiny_family("bert"), readout="last").readout == "last"
    assert make_config(tiny_family("llama")).readout == "last"
    assert sized_config(tiny_family("bert"), 0.5).readout == "attention"
