"""The paper's Table 1: ``python -m train.table1``."""
