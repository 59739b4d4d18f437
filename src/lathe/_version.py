"""The version, in the one place it is written; the build and the command line read it here."""

__version__ = "0.1.0"
