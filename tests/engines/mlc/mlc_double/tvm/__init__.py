"""As much of TVM as the probe of an installation asks for."""

__version__ = "0.26.0"
