"""From options to sources: :func:`open_clusters`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ... import checks
from ...errors import InvalidOptionError
from ..base import DriverError
from ..proxy import shown
from ..proxy.places import canonical, check_pairs, claim, parse_port
from .access_log import LogFile, LogService
from .admin import ClusterConfig, Envoy, parse_admin, read_cluster
from .delivery import Delivery, EdsFile
from .source import EnvoyCluster
from .xds import XdsDelivery, XdsServer


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyOptions:
    """How Envoy is reached.

    Attributes:
        clusters: cluster by name of the region.
        files: by cluster, the file with its servers: the one that Envoy watches, or with ``xds`` any.
        admin: admin interfaces, http://HOST:PORT or a path, of every Envoy with these clusters whose flows count.
        xds: [ADDRESS:]PORT to serve the servers on, by default on 127.0.0.1; None: Envoy watches the files.
        access_log: where Envoy logs to: the path of a file, or [ADDRESS:]PORT of a gRPC service made here, which may be
            that of ``xds``; None: FCTs are not measured.
        capacity: servers each region has room for; None: 64, or more if needed.

    Raises:
        InvalidOptionError: for what does not go together, and a value out of its range.
    """

    clusters: Mapping[str, str]
    files: Mapping[str, str]
    admin: tuple[str, ...] = ()
    xds: str | None = None
    access_log: str | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_pairs(self.clusters, "cluster")
        if set(self.files) != set(self.clusters.values()) or len(set(self.files.values())) < len(self.files):
            raise InvalidOptionError("give each cluster a file of its own with its servers")
        if len({canonical(parse_admin(text)) for text in self.admin}) < len(self.admin):
            raise InvalidOptionError(f"give each admin interface once, got {', '.join(self.admin)}")
        if not self.admin and self.xds is None:
            raise InvalidOptionError("give admin, Envoy's admin interface; only an xDS port does without it")
        if self.xds is not None:
            parse_port(self.xds, "xds_port")
        if self.access_log is not None and "/" not in self.access_log:
            parse_port(self.access_log, "access_log, unless it is a path with a '/' in it,")
        if self.capacity is not None:
            checks.whole("capacity", self.capacity)


def open_clusters(options: EnvoyOptions, *, wait: float = 40.0) -> dict[str, EnvoyCluster]:
    """The sources of the clusters, by name of the region; they share connections, server and log.

    Args:
        options: how Envoy is reached.
        wait: seconds to wait for an Envoy to ask for servers by xDS, which it may take half a minute to do again.

    Raises:
        DriverError: if Envoy or a cluster cannot be driven; nothing is left open then, and nothing has changed.
        MissingExtraError: if the extra ``envoy`` is needed and not installed.
    """
    with ExitStack() as made:
        envoys = []
        for text in options.admin:
            envoys.append(Envoy(parse_admin(text)).share())
            made.callback(envoys[-1].close)
        # Everything that can be refused is, before anything is served or written.
        found: dict[str, list[tuple[Envoy, ClusterConfig]]] = {
            cluster: [(envoy, read_cluster(envoy, cluster)) for envoy in envoys]
            for cluster in options.clusters.values()
        }
        for cluster, configs in found.items():
            for envoy, config in configs:
                _check_source(envoy, cluster, config, None if options.xds is not None else options.files[cluster])
        resources = {cluster: configs[0][1].resource if configs else cluster for cluster, configs in found.items()}
        log, server = _listen(options, resources.values(), made)
        sources: dict[str, EnvoyCluster] = {}
        try:
            for name, cluster in options.clusters.items():
                file, configs = options.files[cluster], found[cluster]
                resource = resources[cluster]
                place = options.xds if server is not None else str(Path(file).resolve())
                with ExitStack() as begun:
                    lock = begun.enter_context(
                        claim(
                            "envoy",
                            f"{canonical(place or file)} {cluster}",
                            f"another driver drives cluster {cluster!r} by {file}",
                        )
                    )
                    delivery: Delivery = (
                        EdsFile(file, resource) if server is None else XdsDelivery(file, resource, server, cluster)
                    )
                    begun.pop_all()
                sources[name] = EnvoyCluster(
                    cluster, delivery=delivery, lock=lock, envoys=configs, log=log, capacity=options.capacity, wait=wait
                )
        except BaseException:
            for source in sources.values():
                source.close()
            raise
        return sources


def _listen(
    options: EnvoyOptions, resources: Iterable[str], made: ExitStack
) -> tuple[LogFile | LogService | None, XdsServer | None]:
    """The log and the xDS server, at one port if they are to share it."""
    log: LogFile | LogService | None = None
    service: LogService | None = None
    xds = None if options.xds is None else parse_port(options.xds, "xds_port")
    if options.access_log is not None:
        if "/" in options.access_log:
            log = LogFile(options.access_log).share()
        else:
            service = LogService()
            log = service.share()
        made.callback(log.close)
    port = None if service is None or options.access_log is None else parse_port(options.access_log, "access_log")
    server = None
    if xds is not None:
        server = XdsServer(xds, service if port == xds else None, expected=resources).share()
        made.callback(server.close)
    if service is not None and port is not None and port != xds:
        service.serve(XdsServer(port, service, xds=False).share())
    return log, server


def _check_source(envoy: Envoy, cluster: str, config: ClusterConfig, file: str | None) -> None:
    """Refuse a cluster that has its servers from somewhere else.

    Raises:
        DriverError: with where it has them from.
    """
    where = f"cluster {cluster!r} of the Envoy at {shown(envoy.place)}"
    if file is None:
        if config.file:
            raise DriverError(f"{where} reads its servers from {config.file}, not by xDS: give that as eds_file")
    elif not config.file:
        raise DriverError(f"{where} asks for its servers by gRPC, and does not read {file}: give xds_port")
    elif Path(config.file).resolve() != Path(file).resolve():
        raise DriverError(f"{where} reads its servers from {config.file}, not from {file}")


__all__ = ["EnvoyOptions", "open_clusters"]
