"""Data: prepared clips on disk, the media reader and writer, face alignment, the corpora."""
