"""The version of the library, in the one place that the build, the files it writes and `--version` read."""

__version__ = "0.4.0"
