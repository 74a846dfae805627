"""Count what the kernels ask of a GPU at the paper's sizes, without one.

``calls`` has the operators, ``traffic`` counts their loads and stores in Triton's interpreter,
``compiled`` looks at what the compiler made of them, ``host`` times Python before a launch,
``table`` puts all together, ``page`` writes it down for people.

    python -m polyfusion.kernels.triton.count TABLE.json PAGE.md
"""
