"""What a training run leaves: its directory, checkpoint, pictures, curves and profile."""
