"""Scenarios from recordings: :func:`fit_recording` estimates the twin of a recorded cluster."""

from .twin import MEASURES, Fit, FittedServer, HeldOut, fit_recording

__all__ = ["MEASURES", "Fit", "FittedServer", "HeldOut", "fit_recording"]
