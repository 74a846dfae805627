"""Modules: fusion layers with the paper's initialisation, and the generator's blocks."""
