"""The version, alone so that build tools and deep modules read it without importing the package."""

__version__ = "0.1.0"
