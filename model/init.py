"""Initialisation of the networks."""

from torch import nn


def gaussian_init(module: nn.Module) -> None:
    """For ``Module.apply``: convolutions N(0, 0.02), 1-D batch norms N(1, 0.02), biases 0.

    The paper starts the generator and the discriminators so (the values are DCGAN's).
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm1d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def encoder_init(module: nn.Module) -> None:
    """For ``Module.apply``: Xavier-normal weights with the gain of tanh, biases 0.

    The encodings then start at the scale of ±1. From N(0, 0.02) and PyTorch's recurrent default
    the audio encoding starts near 0.05, a tenth of the identity's, and the fused polynomial needs
    thousands of steps to notice it.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.GRU):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter, nn.init.calculate_gain("tanh"))
            else:
                nn.init.zeros_(parameter)
