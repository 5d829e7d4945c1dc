"""Envoy as a data plane: ``lbgym dataplane envoy``."""

from .access_log import LOG_FORMAT, LogFile, LogService
from .admin import Envoy
from .options import EnvoyOptions, open_clusters
from .source import EnvoyCluster
from .xds import XdsServer

__all__ = [
    "LOG_FORMAT",
    "Envoy",
    "EnvoyCluster",
    "EnvoyOptions",
    "LogFile",
    "LogService",
    "XdsServer",
    "open_clusters",
]
