"""The Gaussian initialisation of the paper's generator and discriminators (values of DCGAN)."""

from torch import nn


def gaussian_init(module: nn.Module) -> None:
    """For ``Module.apply``: convolutions N(0, 0.02), 1-D batch norms N(1, 0.02), biases 0."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm1d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
