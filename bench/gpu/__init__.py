"""The first minutes on a GPU: ``python -m bench.gpu --out DIR``.

``__main__`` has the stages in their order, ``stage`` runs each in processes of its own, ``report``
makes a table of what they wrote. A stage is a module here with a function ``cases(setting, ...)``.
"""

#: What the command wants besides the packages of a machine for deep learning: pure Python, so that
#: a folder made elsewhere serves. The line is printed where one of them is missing.
CARRIED = ("tyro", "docstring_parser", "typeguard")
CARRY = (
    f"pip install --no-deps --target carried {' '.join(CARRIED)}   # where there is a network; "
    "then PYTHONPATH=carried python -m bench.gpu --out DIR"
)
