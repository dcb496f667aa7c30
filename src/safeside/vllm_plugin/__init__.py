"""Guards and aligners inside vLLM; ``plan`` comes first.

Only ``register``, ``model``, ``side``, ``pooling``, ``scorer`` and the runners import vLLM.
"""

PREFIX = "Safeside"
"""Before the name of a base's architecture: the same base with adapters."""
