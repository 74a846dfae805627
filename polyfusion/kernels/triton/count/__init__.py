"""Count what the kernels ask of a GPU at the paper's sizes, without one.

``calls`` has the operators, ``traffic`` counts their loads and stores in Triton's interpreter,
``compiled`` looks at what the compiler made of them, ``table`` puts both together, ``page`` writes
them down for people.

    python -m polyfusion.kernels.triton.count TABLE.json PAGE.md    everything but the host
    python -m polyfusion.kernels.triton.count.host                  microseconds of the host
"""
