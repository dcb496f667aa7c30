"""A Triton back end that compiles nothing, so that vLLM takes runner V2 on a CPU: kernels run in Triton's interpreter.

Its folder goes on PYTHONPATH, with ``TRITON_INTERPRET=1``, for these runs alone.
"""
