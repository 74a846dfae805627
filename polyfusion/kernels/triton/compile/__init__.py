"""Compile what people will run, for GPUs that need not be present, and say what came out.

``shipped`` keeps a list of calls, ``fusion`` and ``block`` put theirs on it, ``gate`` compiles
them.

    TRITON_INTERPRET=0 python -m polyfusion.kernels.triton.compile           every call
    TRITON_INTERPRET=0 python -m polyfusion.kernels.triton.compile tucker    names that begin so
"""
