"""The version of this package; the same as the library's (anyflash_version)."""

__version__ = "0.1.0"
