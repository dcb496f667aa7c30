"""Duplicated top blocks, against a whole copy of the base whose own top blocks were changed in the same way."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from safeside import Adapter, Base, attach, create_adapter, load_adapter, make_config, save_adapter
from safeside.adapters.config import require_valid
from safeside.adapters.toplayers import TopLayers
from safeside.base.families import locate
from safeside.errors import AttachmentError, ConfigError, FormatError, InputError
from tiny import ENCODERS, FAMILY_NAMES, N_TOKENS, SPECIAL
from twin import SAME, base_states, close, mixed_logits, pad, positions_of

VARIANTS = ({"depth": 2}, {"depth": 1, "lora_rank": 4})
LENGTH = 14  # past every sliding window, which holds 8


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=VARIANTS, ids=["full", "lora"])
def options(request) -> dict[str, object]:
    return {"kind": "toplayers", **request.param}


def some_ids() -> Tensor:
    return torch.randint(len(SPECIAL), N_TOKENS, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def changed_copy(base: Base, aligner: Adapter) -> Base:
    """The base with the aligner's weights in the place of its own top blocks, updates merged."""
    copied, trunk = copy.deepcopy(base), aligner.trunk
    assert isinstance(trunk, TopLayers)
    depth = trunk.own_top.depth
    top = copied.blocks[base.n_layers - depth :]
    if not len(trunk.updates):
        for theirs, own in zip(top, trunk.own_top.blocks, strict=True):
            theirs.load_state_dict(own.state_dict())
        locate(copied.decoder, base.family.norm).load_state_dict(trunk.own_top.norm.state_dict())
        return copied
    layers = [layer for block in top for layer in block.modules() if isinstance(layer, nn.Linear | Conv1D)]
    for layer, update in zip(layers, trunk.updates, strict=True):
        product = update.up.weight @ update.down.weight
        layer.weight.add_(product.T if isinstance(layer, Conv1D) else product)
    return copied


@pytest.mark.parametrize("family", [*FAMILY_NAMES, "cohere2"])
def test_it_is_the_base_with_other_top_blocks(tiny_family, random_aligner, family: str, options) -> None:
    base, ids = tiny_family(family), some_ids()
    plain = base.model(ids).logits
    with attach(base, aligners=[create_adapter(base, make_config(base, role="align", **options))]):
        assert torch.equal(base.model(ids).logits, plain), "a fresh one is the base, bit for bit"
    aligner = random_aligner(base, **options)
    expected = changed_copy(base, aligner).model(ids).logits
    with attach(base, aligners=[aligner]):
        found = base.model(ids).logits
        cache = DynamicCache()
        steps = [base.model(part, past_key_values=cache).logits for part in ids.split([5, LENGTH - 7, 1, 1], dim=1)]
    close(found, expected)
    close(torch.cat(steps, 1), expected)
    assert (found - plain).abs().max() > 100 * SAME
    expected = mixed_logits(base, ids, [(aligner, 0.4)])
    with attach(base, aligners=[aligner], strength=0.4):
        close(base.model(ids).logits, expected)
    assert torch.equal(base.model(ids).logits, plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt-oss"])
def test_padding_changes_nothing(tiny_family, random_aligner, family: str, side: str, options) -> None:
    base, rows = tiny_family(family), [some_ids()[0].tolist(), some_ids()[1, :9].tolist()]
    ids, keep = pad(rows, side)
    with attach(base, aligners=[random_aligner(base, **options)]):
        logits = base.model(ids, attention_mask=keep.long(), position_ids=positions_of(keep)).logits
        for row, tokens in enumerate(rows):
            close(logits[row, keep[row]], base.model(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_greedy_text_is_the_same_with_and_without_a_cache(tiny_family, random_aligner, family: str, options) -> None:
    base, ids = tiny_family(family), some_ids()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = base.model.generate(ids, **settings)
    with attach(base, aligners=[random_aligner(base, **options)]):
        cached, without = (base.model.generate(ids, use_cache=is_on, **settings) for is_on in (True, False))
    assert cached.tolist() == without.tolist() != plain.tolist()


def test_it_stands_beside_other_aligners(tiny_base: Base, random_aligner) -> None:
    aligners = [
        random_aligner(tiny_base, "ladder", seed=3),
        random_aligner(tiny_base, "top", seed=4, kind="toplayers", depth=2),
        random_aligner(tiny_base, "updates", seed=5, kind="toplayers", depth=1, lora_rank=2),
        random_aligner(tiny_base, "map", seed=6, kind="state_map", bottleneck=3),
        random_aligner(tiny_base, "plus", seed=7, kind="lst_plus", cross_attention=True),
    ]
    strengths = [0.3, 0.7, 1.2, 0.5, 0.4]
    ids = some_ids()
    expected = mixed_logits(tiny_base, ids, list(zip(aligners, strengths, strict=True)))
    strength = dict(zip((aligner.name for aligner in aligners), strengths, strict=True))
    for order in (aligners, aligners[::-1]):
        with attach(tiny_base, aligners=order, strength=strength):
            close(tiny_base.model(ids).logits, expected)
            cache = DynamicCache()
            steps = [tiny_base.model(part, past_key_values=cache).logits for part in ids.split([9, 4, 1], dim=1)]
            close(torch.cat(steps, 1), expected)


def test_updates_hold_no_weight_of_the_base(tiny_base: Base, random_aligner, tmp_path: Path) -> None:
    aligner = random_aligner(tiny_base, kind="toplayers", depth=2, lora_rank=4)
    assert isinstance(aligner.trunk, TopLayers)
    own = tiny_base.blocks[-1].self_attn.q_proj.weight
    assert aligner.trunk.own_top.blocks[-1].self_attn.q_proj.weight.data_ptr() == own.data_ptr()
    names = list(aligner.state_dict())
    assert len(names) == 2 * 2 * 7
    assert all(name.startswith("trunk.updates.") for name in names)
    before = own.clone()
    aligner.bfloat16().float()  # what a run does to store in bfloat16
    assert torch.equal(own, before)
    assert own.dtype == torch.float32
    loaded = load_adapter(save_adapter(aligner, tmp_path, tiny_base), tiny_base)
    assert isinstance(loaded.trunk, TopLayers)
    assert loaded.trunk.own_top.blocks[-1].self_attn.q_proj.weight.data_ptr() == own.data_ptr()


def test_buffers_keep_their_dtype(tiny_base: Base, random_aligner) -> None:
    """Rotary frequencies that were rounded to bfloat16 would be other positions for good."""
    aligner, again = random_aligner(tiny_base, kind="toplayers"), random_aligner(tiny_base, kind="toplayers")
    again.bfloat16().float()
    for found, expected in zip(again.buffers(), aligner.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_a_copy_of_the_adapter_has_updates_of_its_own(tiny_base: Base, random_aligner, options) -> None:
    aligner, ids = random_aligner(tiny_base, **options), some_ids()

    def logits_of(one: Adapter) -> Tensor:
        with attach(tiny_base, aligners=[one]):
            return tiny_base.model(ids).logits

    copied, before = copy.deepcopy(aligner), logits_of(aligner)
    for parameter in copied.parameters():
        parameter.mul_(1.5)
    assert torch.equal(logits_of(aligner), before)
    assert not torch.equal(logits_of(copied), before)


def test_threads_do_not_meet(tiny_base: Base, random_aligner) -> None:
    aligner = random_aligner(tiny_base, kind="toplayers", depth=2)
    texts = [some_ids()[:, :length] for length in (3, 6, 9, 12)]
    found: dict[int, list[Tensor]] = {}
    with attach(tiny_base, aligners=[aligner]):
        expected = [tiny_base.model(text).logits for text in texts]

        def work(index: int) -> None:
            with torch.no_grad():
                found[index] = [tiny_base.model(texts[index]).logits for _ in range(5)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, logits in enumerate(expected):
        for other in found[index]:
            close(other, logits)


def test_training_mode_adds_no_dropout(tiny_family) -> None:
    """gpt2's configuration asks for dropout; the base itself runs without."""
    base, ids = tiny_family("gpt2"), some_ids()
    aligner = create_adapter(base, make_config(base, kind="toplayers", role="align")).train()
    with attach(base, aligners=[aligner]) as attachment:
        base.model(ids)
        assert not attachment.record.deltas["adapter"].any()


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_has_nothing_to_align(tiny_family, family: str) -> None:
    with pytest.raises(ConfigError, match="no next-token distribution to align"):
        make_config(tiny_family(family), kind="toplayers", role="align")


@pytest.mark.parametrize("depth", [0, 4, 100])
def test_there_are_only_so_many_blocks(tiny_base: Base, depth: int) -> None:
    with pytest.raises(ConfigError, match=r"needs a depth in 1\.\.3"):
        make_config(tiny_base, kind="toplayers", role="align", depth=depth)


def test_it_taps_the_state_below_its_blocks(tiny_base: Base) -> None:
    assert make_config(tiny_base, kind="toplayers", role="align").layers == (1,)
    with pytest.raises(ConfigError, match=r"layers \(3 - depth,\); got \(3,\)"):
        require_valid({**make_config(tiny_base, kind="toplayers", role="align").model_dump(), "layers": (3,)})


def test_it_needs_its_base(tiny_base: Base) -> None:
    config = make_config(tiny_base, kind="toplayers", role="align", depth=1, lora_rank=2)
    with attach(tiny_base, aligners=[Adapter(config)]), pytest.raises(AttachmentError, match="has no base yet"):
        tiny_base.model(some_ids())
    with pytest.raises(ConfigError, match="Pass the base, not a reference"):
        make_config(config.base, kind="toplayers", role="align")
    with pytest.raises(ConfigError, match="needs the base's own configuration"):
        require_valid({**config.model_dump(), "blocks": {}})


def test_it_is_not_made_under_an_attachment(tiny_base: Base, random_aligner) -> None:
    with attach(tiny_base, aligners=[random_aligner(tiny_base)]), pytest.raises(InputError, match="Detach it first"):
        create_adapter(tiny_base, make_config(tiny_base, kind="toplayers", role="align"))


@pytest.mark.parametrize(
    "change", [{"model_type": "llamma"}, {"num_hidden_layers": 0}, {"hidden_size": 32}, {"hidden_size": "wide"}]
)
def test_a_changed_configuration_is_refused(tiny_base: Base, random_aligner, tmp_path: Path, change) -> None:
    """Whoever edits the folder: what its blocks say must fit the weights beside it."""
    aligner = random_aligner(tiny_base, kind="toplayers")
    folder = save_adapter(aligner, tmp_path, tiny_base)
    path = folder / "safeside_config.json"
    values = aligner.config.model_dump(mode="json")
    path.write_text(
        aligner.config.model_validate({**values, "blocks": {**values["blocks"], **change}}).model_dump_json()
    )
    with pytest.raises(FormatError):
        load_adapter(folder, tiny_base)


def test_states_are_those_of_the_copy(tiny_base: Base, random_aligner) -> None:
    """The delta itself: the changed copy's final state minus the base's."""
    aligner, ids = random_aligner(tiny_base, kind="toplayers", depth=2), some_ids()
    expected = base_states(changed_copy(tiny_base, aligner), ids)[1]
    with attach(tiny_base, aligners=[aligner]) as attachment:
        tiny_base.model(ids)
        close(attachment.record.base_state + attachment.record.deltas["refuse"], expected)
