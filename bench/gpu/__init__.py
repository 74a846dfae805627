"""The first minutes on a GPU: ``python -m bench.gpu --out DIR``.

``__main__`` has the stages in their order, ``stage`` runs each in processes of its own, ``report``
makes a table of what they wrote. A stage is a module here with a function ``cases(setting, ...)``.
"""
