"""The paper's metrics. Each module says where its definition comes from and what its traps are."""
