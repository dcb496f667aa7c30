"""What is refused before any work is done, while the model is still unharmed."""

from __future__ import annotations

import torch
from torch import nn

from safeside.base.families import has_lora, refused_reason
from safeside.base.fingerprint import architecture_settings
from safeside.base.model import Base
from safeside.base.updates import has_live_updates, linear_layer, widths_of
from safeside.errors import InputError, MismatchError, UnsupportedError
from safeside.genes.gene import Gene, GeneFamily

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def family_of(base: Base) -> GeneFamily:
    """The family that ``base`` belongs to."""
    fingerprint = base.fingerprint
    return GeneFamily(
        base=base.name,
        architecture=fingerprint.architecture,
        tokenizer=fingerprint.tokenizer,
        settings=architecture_settings(base.folder),
        n_layers=base.n_layers,
        n_weights=sum(parameter.numel() for parameter in base.model.parameters()),
    )


def check_model(base: Base) -> None:
    """Raise unless genes can work inside ``base``: a causal model of plain, finite weights on one device."""
    if base.is_encoder:
        raise UnsupportedError(f"{base.name} is an encoder: it has no answers to make safe. Genes need a causal model.")
    reason = refused_reason(base.model)
    if reason is not None:
        raise UnsupportedError(f"Genes cannot be used in {base.name}: {reason}")
    packed = sorted({type(module).__name__ for module in base.model.modules() if _is_packed(module)})
    if packed or base.model.config.to_dict().get("quantization_config") is not None:
        found = f" ({', '.join(packed)})" if packed else ""
        raise UnsupportedError(
            f"{base.name} has quantised weights{found}; a gene adds to weights of float32, bfloat16 or float16. Load "
            "the model unquantised, apply the gene, and quantise the copy."
        )
    broken = [name for name, parameter in base.model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise InputError(
            f"{base.name} has weights with NaN or infinity, such as {broken[0]}; expected finite ones. Get the "
            "checkpoint again, or train it again."
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether the module keeps weights in another form than floats: packed ones, or none that are parameters."""
    dtypes = {parameter.dtype for parameter in module.parameters(recurse=False)}
    return not dtypes <= set(_DTYPES) or "quantized" in type(module).__module__


def check_fits(gene: Gene, base: Base) -> None:
    """Raise a MismatchError that names the first thing in which ``base`` is not of the gene's family."""
    where = f"Gene {gene.name!r} was extracted on {gene.config.family.base} and does not fit {base.name}"
    difference = _first_difference(gene.config.family, family_of(base))
    if difference:
        raise MismatchError(f"{where}: {difference}. Use a model of the family, or extract a gene for this one.")
    for point in gene.config.modules:
        try:
            module = linear_layer(base.model, point.name)
            widths = widths_of(module)
        except (AttributeError, TypeError) as error:
            raise MismatchError(
                f"{where}: expected a linear layer {point.name}, but {error}. Genes need the modules under the names "
                "that they were extracted with."
            ) from error
        if widths != (point.n_in, point.n_out):
            raise MismatchError(
                f"{where}: {point.name} goes from {widths[0]} to {widths[1]} and not from {point.n_in} to "
                f"{point.n_out}. Use a model of the same architecture."
            )
        if point.layer > base.n_layers or module not in set(base.blocks[point.layer - 1].modules()):
            raise MismatchError(f"{where}: {point.name} is not in layer {point.layer}. Get the gene again.")


def check_pair(aligned: Base, degraded: Base) -> None:
    """Raise unless the two are models of one family that genes can be extracted from."""
    for base in (aligned, degraded):
        check_model(base)
        check_plain(base)
        if has_lora(base.model):
            raise UnsupportedError(f"{base.name} has a LoRA in it. Merge and save it, or unload it, to extract a gene.")
    difference = _first_difference(family_of(aligned), family_of(degraded))
    if difference:
        raise MismatchError(
            f"{aligned.name} and {degraded.name} are no pair: {difference}. A gene is the difference of two models of "
            "one architecture and tokenizer: degrade a copy of the aligned model."
        )
    theirs = degraded.model.state_dict()
    if all(torch.equal(tensor, theirs[name].to(tensor)) for name, tensor in aligned.model.state_dict().items()):
        raise InputError(
            f"{aligned.name} and {degraded.name} hold the same weights; expected a copy that lost something. Fine-tune "
            "a copy of the aligned model a little, and check that both paths are right."
        )


def _first_difference(wanted: GeneFamily, found: GeneFamily) -> str | None:
    """The first thing in which the second family is another one, in words: the kind of model, if that differs."""
    settings = set(wanted.settings) | set(found.settings)
    for setting in sorted(settings, key=lambda name: (name != "model_type", name)):
        expected, given = wanted.settings.get(setting), found.settings.get(setting)
        if expected != given:
            return f"{setting} is {given!r} where {expected!r} is expected"
    if wanted.architecture != found.architecture:
        return "its architecture is another one"
    return "its tokenizer is another one" if wanted.tokenizer != found.tokenizer else None


def check_plain(base: Base) -> None:
    """Raise when something is in ``base`` that would be learnt around.  A LoRA of the user's own may stay."""
    if base.attachment is not None:
        raise UnsupportedError(f"{base.name} has guards or aligners attached. Detach them first.")
    if has_live_updates(base.model):
        raise UnsupportedError(f"{base.name} has a gene in it already. Unapply it first.")
