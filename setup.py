"""Metadata is in pyproject.toml; an ahead-of-time CUDA extension will be declared here."""

from setuptools import setup

setup()
