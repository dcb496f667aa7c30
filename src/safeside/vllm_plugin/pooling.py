"""What a pooling engine gives of a prompt: the guards' scores of every token, or those of its last token alone."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import LastPool, SequencePooler
from vllm.model_executor.layers.pooler.tokwise import AllPool, TokenPooler
from vllm.v1.pool.metadata import PoolingMetadata

from safeside.vllm_plugin.plan import Pooled


def guard_pooler(task: Pooled) -> DispatchPooler:
    """vLLM's own pooler of ``forward``'s scores, for one task: an engine has no other.

    vLLM reads no prefix cache for ``token_classify``, because tokens found there have no scores.  For ``classify`` it
    does: what it finds never covers the last token.
    """
    pooler = TokenPooler(AllPool(), _newest) if task == "token_classify" else SequencePooler(LastPool(), _unchanged)
    return DispatchPooler({task: pooler})


def _newest(scores: list[Tensor | None], metadata: PoolingMetadata) -> list[Tensor | None]:
    """As many rows as each prompt has tokens: one that was preempted within its prompt began again behind the old."""
    lengths = metadata.prompt_lens.tolist()
    return [None if rows is None else rows[-length:] for rows, length in zip(scores, lengths, strict=True)]


def _unchanged(scores: Tensor, metadata: PoolingMetadata) -> Tensor:
    return scores
