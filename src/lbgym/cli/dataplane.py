"""``lbgym dataplane``: publish a data plane in shared memory, check a driver, and change its servers while it runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..atomic import check_writable, write_whole
from ..errors import InvalidOptionError
from ..scenarios import fixed_scenario
from ._signals import stop_on_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..drivers import Source
    from ..drivers.config import DataPlaneConfig
    from ..drivers.xdp.configured import ConfiguredBalancer

logger = logging.getLogger("lbgym")

_Interval = Annotated[float, typer.Option(help="Seconds between observations.")]
_Capacity = Annotated[
    int | None, typer.Option(help="Servers a region has room for.", show_default="64, or more if needed")
]
_Mode = Annotated[str, typer.Option(help="Permissions of the regions, octal.")]
_Group = Annotated[str | None, typer.Option(help="Owning group of the regions.", show_default="the user's")]
_MetricsPort = Annotated[
    int | None,
    typer.Option(min=0, max=65_535, help="Port of the driver's Prometheus metrics; 0: any.", show_default="no metrics"),
]
_MetricsAddress = Annotated[str | None, typer.Option(help="Address of the metrics.", show_default="127.0.0.1")]


def emulate(
    name: Annotated[
        str, typer.Option("--name", help="Name of the region; with m balancers NAME_0 to NAME_{m-1}, one for each.")
    ],
    scenario: Annotated[
        str, typer.Option("--scenario", "-s", help="Name of a scenario or path of a TOML file.")
    ] = "heterogeneous",
    speedup: Annotated[float, typer.Option(help="Simulated seconds per second.")] = 1.0,
    publish_interval: Annotated[float, typer.Option(help="Simulated seconds between observations.")] = 0.05,
    dispatch: Annotated[str | None, typer.Option(help="Dispatch rule, instead of the scenario's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the flows.", show_default="one from the operating system")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Simulated seconds until it ends.", show_default="until it is stopped")
    ] = None,
    safe_weights: Annotated[
        str | None,
        typer.Option(help="Weights in force without an agent's, separated by commas.", show_default="numbers of cores"),
    ] = None,
    capacity: _Capacity = None,
    mode: _Mode = "600",
    group: _Group = None,
) -> None:
    """Emulate a data plane: a scenario simulated in real or scaled time behind shared memory.

    Prints one line as soon as agents can attach. SIGTERM, SIGHUP or Ctrl-C end it: the regions are removed, and the
    exit code is 0. Servers are drained and undrained by `lbgym dataplane ctl`.
    """
    from ..drivers import Emulator

    chosen = fixed_scenario(scenario)
    options: dict[str, Any] = {
        "speedup": speedup,
        "publish_interval": publish_interval,
        "dispatch": dispatch,
        "seed": seed,
        "safe_weights": None if safe_weights is None else _numbers(safe_weights),
        "capacity": capacity,
        "mode": _permissions(mode),
        "group": group,
    }
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal(expected=True))
        stop.raises = True  # while it compiles and starts
        emulator = stack.enter_context(Emulator(chosen, name, **options))
        stop.raises = False
        names = [region.name for region in emulator.regions]
        typer.echo(
            f"{'region' if len(names) == 1 else 'regions'} {', '.join(names)}: {chosen.num_servers} servers, scenario "
            f"{chosen.name}, an observation every {emulator.publish_interval:g} s, {emulator.speedup:g} times real "
            f"time, seed {emulator.seed}"
        )
        emulator.run(stop, duration)
        logger.info(
            "%.6g s emulated, %d observations, %d of them late, clock stood still for %.3g s",
            emulator.time, emulator.observations, emulator.slips, emulator.lost,
        )  # fmt: skip


def xdp(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="dataplane.toml, instead of the options below.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the region.")] = None,
    vip: Annotated[
        list[str] | None, typer.Option("--vip", help="ADDRESS:PORT that clients connect to; may be repeated.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option("--server", help="NAME=ADDRESS[:PORT][,weight=W][,cores=C][,health=tcp|http]; repeated."),
    ] = None,
    interface: Annotated[
        list[str] | None, typer.Option("--interface", "-i", help="To attach to; may be repeated.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="dsr (direct server return) or dnat.", show_default="dsr")] = None,
    rule: Annotated[str | None, typer.Option(help="Dispatch rule.", show_default="sed")] = None,
    attach: Annotated[str | None, typer.Option(help="native, generic or auto.", show_default="auto")] = None,
    publish_interval: Annotated[
        float | None, typer.Option(help="Seconds between observations.", show_default="0.2")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Servers there is room for.", show_default="64, or more if needed")
    ] = None,
    group: Annotated[str | None, typer.Option(help="Owning group of the region.", show_default="the user's")] = None,
    region_mode: Annotated[
        str | None, typer.Option(help="Permissions of the region, octal.", show_default="600")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the balancer at work at the end.")] = False,
    object_file: Annotated[
        Path | None, typer.Option("--object", help="Compiled program.", show_default="compiled at first use")
    ] = None,
    build: Annotated[Path | None, typer.Option("--build", help="Only compile the program into this file.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Only remove a balancer that a driver left at work.")
    ] = False,
) -> None:
    """Balance TCP connections in the kernel, by XDP, and publish the balancer in shared memory.

    Prints one line as soon as agents can attach. SIGTERM or Ctrl-C end it: interfaces and region are as before, and the
    exit code is 0. SIGHUP reads --config again. Killed, it leaves the balancer at work for the next driver to take
    over. Needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; the agent needs neither.
    """
    from ..drivers.config import DataPlaneConfig, parse_server
    from ..drivers.xdp import XdpBalancer, XdpOptions, build_object
    from ..drivers.xdp import detach as remove
    from ..drivers.xdp.options import parse_options

    if build is not None:
        content = build_object()
        check_writable(build)
        write_whole(build, lambda stream: stream.write(content))
        typer.echo(f"{build}: {len(content)} bytes")
        return
    needed = {"--vip": vip, "--server": server, "--interface": interface}
    others = {
        "--mode": mode, "--rule": rule, "--attach": attach, "--publish-interval": publish_interval,
        "--capacity": capacity, "--group": group, "--region-mode": region_mode, "--object": object_file,
    }  # fmt: skip
    if config is not None:
        if given := [flag for flag, value in needed.items() if value]:
            raise InvalidOptionError(f"{', '.join(given)}: the servers, VIPs and interfaces are those of --config")
        if given := [flag for flag, value in others.items() if value is not None]:
            raise InvalidOptionError(f"{', '.join(given)}: set these in the file of --config")
        loaded = _loaded(config, name)
        options = parse_options(loaded.driver, f"{config}, [driver]")
        if keep:
            options = dataclasses.replace(options, keep=True)
    elif name is None:
        raise InvalidOptionError(
            "give --name, or --config" if detach else "give --config, or --name, --vip, --server and --interface"
        )
    if detach:
        where = (name, None) if config is None else (loaded.name, options)
        if not remove(*where):
            raise InvalidOptionError(f"no driver has left an XDP balancer of the name {where[0]!r} at work")
        return
    if config is None:
        assert name is not None
        if missing := [flag for flag, value in needed.items() if not value]:
            raise InvalidOptionError(f"give {', '.join(missing)}, or --config")
        options = XdpOptions(
            vips=tuple(vip or ()),
            interfaces=tuple(interface or ()),
            keep=keep,
            **_given(mode=mode, rule=rule, attach=attach, object=None if object_file is None else str(object_file)),
        )
        loaded = DataPlaneConfig(
            name=name,
            servers=tuple(parse_server(text) for text in server or ()),
            driver={},
            **_given(
                publish_interval=publish_interval,
                capacity=capacity,
                mode=None if region_mode is None else _permissions(region_mode, "--region-mode"),
                group=group,
            ),
        )
    balancer = XdpBalancer(loaded, options, config)
    _publish_configured(balancer, loaded, _balancing(balancer))


def afpacket(
    config: Annotated[Path, typer.Option("--config", "-c", help="dataplane.toml, as of lbgym dataplane xdp.")],
    name: Annotated[str | None, typer.Option("--name", help="Name of the region, instead of the file's.")] = None,
) -> None:
    """Balance TCP connections in this process, on raw sockets, and publish the balancer in shared memory.

    For where XDP is not to be had: slower, with the same file, rules and modes. It needs CAP_NET_RAW and, once, a C
    compiler. The VIPs must not be addresses of this machine, and its kernel must not forward. Prints one line as soon
    as agents can attach. SIGTERM or Ctrl-C end it: flows are forgotten, and the exit code is 0. SIGHUP reads --config
    again.
    """
    from ..drivers.afpacket import AfPacketBalancer

    loaded = _loaded(config, name)
    balancer = AfPacketBalancer(loaded, None, config)
    _publish_configured(balancer, loaded, _balancing(balancer))


def vpp_lb(
    config: Annotated[Path, typer.Option("--config", "-c", help="dataplane.toml with the VIP and its servers.")],
    name: Annotated[str | None, typer.Option("--name", help="Name of the region, instead of the file's.")] = None,
) -> None:
    """Set the weights of the stock load balancer of a running VPP, and publish its servers in shared memory.

    For VPP 26.10 or newer without lbgym's plugin. Open flows are what agents on the servers report. Prints one line as
    soon as agents can attach. SIGTERM or Ctrl-C end it: the configured weights are in force again, and the exit code is
    0. SIGHUP reads --config again. Needs no root, but the right to open VPP's API socket.
    """
    from ..drivers.vpp_lb import VppLb

    loaded = _loaded(config, name)
    balancer = VppLb(loaded, config)
    _publish_configured(
        balancer,
        loaded,
        f"{balancer.options.vip} of VPP {balancer.version}, {len(balancer.servers())} servers, weights from 0 to 100",
    )


def _balancing(balancer: ConfiguredBalancer) -> str:
    options = balancer.options
    return (
        f"{', '.join(options.vips)} on {', '.join(options.interfaces)}, {options.mode} to {len(balancer.servers())} "
        f"servers by {options.rule}"
    )


def _loaded(file: Path, name: str | None) -> DataPlaneConfig:
    """The configuration in a file, with another name for the region if one is given."""
    from ..drivers.config import load_config

    config = load_config(file)
    return config if name is None else dataclasses.replace(config, name=name, renamed=True)


def _publish_configured(balancer: Source, config: DataPlaneConfig, shown: str) -> None:
    _publish(
        {config.name: balancer},
        lambda _name, _balancer: f"{shown}, an observation every {config.publish_interval:g} s",
        publish_interval=config.publish_interval,
        capacity=config.capacity,
        lease=config.lease,
        mode=config.mode,
        group=config.group,
    )


def _publish(
    sources: Mapping[str, Source],
    shown: Callable[[str, Source], str],
    *,
    metrics: tuple[int, str] | None = None,
    **options: Any,
) -> None:
    """Publish until a signal comes, and say what of each region as soon as agents can attach.

    Args:
        sources: by region.
        shown: says what is published of a region.
        metrics: port and address of the driver's metrics; None: there are none.
        options: of the publisher.
    """
    from ..drivers import Publisher
    from ..drivers.metrics import DriverMetrics

    with ExitStack() as stack:
        for source in sources.values():
            stack.callback(source.close)
        publisher = stack.enter_context(Publisher(sources, **options))
        page = None
        if metrics is not None:
            page = stack.enter_context(closing(DriverMetrics(publisher, sources, *metrics)))
        for name, source in sources.items():
            typer.echo(f"region {name}: {shown(name, source)}")
        if page is not None:
            typer.echo(f"metrics: {page.url}")
        sys.stdout.flush()
        publisher.serve()


def haproxy(
    backend: Annotated[list[str], typer.Option("--backend", help="Backend to drive; may be repeated.")],
    name: Annotated[list[str], typer.Option("--name", help="Name of its region; one per backend, in their order.")],
    socket: Annotated[
        str | None, typer.Option("--socket", help="HAProxy's 'stats socket' with level admin: path or HOST:PORT.")
    ] = None,
    log: Annotated[
        str | None,
        typer.Option("--log", help="Where HAProxy logs to, made here: path or HOST:PORT.", show_default="no FCTs"),
    ] = None,
    agent_check: Annotated[
        str | None,
        typer.Option(help="[ADDRESS:]PORT to answer agent-checks on, instead of setting weights by the socket."),
    ] = None,
    configured_weight: Annotated[
        int, typer.Option(help="Weight of the servers in HAProxy's configuration, for agent-checks without a socket.")
    ] = 100,
    publish_interval: _Interval = 0.2,
    capacity: _Capacity = None,
    mode: _Mode = "600",
    group: _Group = None,
    metrics_port: _MetricsPort = None,
    metrics_address: _MetricsAddress = None,
) -> None:
    """Drive backends of a running HAProxy, each with a region of its own, and publish them in shared memory.

    Prints one line as soon as agents can attach. SIGTERM, SIGHUP or Ctrl-C end it: the configured weights are in force
    again, and the exit code is 0. HAProxy may be reloaded meanwhile. Needs no root.
    """
    from ..drivers.haproxy import HaproxyOptions, open_backends
    from ..drivers.proxy.places import pair_names

    publishing = _publishing(publish_interval, capacity, mode, group, metrics_port, metrics_address)
    options = HaproxyOptions(
        backends=pair_names(name, backend, "backend"),
        socket=socket,
        log=log,
        agent_check=agent_check,
        configured_weight=configured_weight,
        capacity=capacity,
    )
    way = "the runtime API" if agent_check is None else "agent-checks"
    _publish_proxy(open_backends(options), "backend", options.backends, way, **publishing)


def envoy(
    cluster: Annotated[list[str], typer.Option("--cluster", help="Cluster to drive; may be repeated.")],
    name: Annotated[list[str], typer.Option("--name", help="Name of its region; one per cluster, in their order.")],
    admin: Annotated[
        list[str] | None,
        typer.Option("--admin", help="Admin interface: http://HOST:PORT, or the path of its pipe; one per Envoy."),
    ] = None,
    eds_file: Annotated[
        list[str] | None,
        typer.Option("--eds-file", help="File of servers that Envoy watches, one per cluster; it is written."),
    ] = None,
    xds_port: Annotated[
        str | None, typer.Option(help="[ADDRESS:]PORT to serve xDS on, instead of writing files.")
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option("--servers", help="With --xds-port: file of servers, one per cluster; as --eds-file, or TOML."),
    ] = None,
    access_log: Annotated[
        str | None,
        typer.Option(
            help="Envoy's access log: path of a file, or [ADDRESS:]PORT to take it by gRPC on.", show_default="no FCTs"
        ),
    ] = None,
    publish_interval: _Interval = 0.2,
    capacity: _Capacity = None,
    mode: _Mode = "600",
    group: _Group = None,
    metrics_port: _MetricsPort = None,
    metrics_address: _MetricsAddress = None,
) -> None:
    """Drive clusters of a running Envoy by EDS, each with a region of its own, and publish them in shared memory.

    Prints one line as soon as agents can attach. SIGTERM, SIGHUP or Ctrl-C end it: the configured weights are in force
    again, and the exit code is 0. Envoy may be restarted meanwhile. Needs no root.
    """
    from ..drivers.envoy import EnvoyOptions, open_clusters
    from ..drivers.proxy.places import pair_names

    publishing = _publishing(publish_interval, capacity, mode, group, metrics_port, metrics_address)
    clusters = pair_names(name, cluster, "cluster")
    if xds_port is None and (servers or not eds_file):
        raise InvalidOptionError("give --eds-file, the file that Envoy watches; or both --xds-port and --servers")
    if xds_port is not None and (eds_file or not servers):
        raise InvalidOptionError("with --xds-port give the servers by --servers; --eds-file is for Envoy to watch")
    files = eds_file or servers or []
    if len(files) != len(cluster):
        raise InvalidOptionError(f"give one file per cluster: there are {len(cluster)} clusters and {len(files)} files")
    options = EnvoyOptions(
        clusters=clusters,
        files=dict(zip(cluster, files, strict=True)),
        admin=tuple(admin or ()),
        xds=xds_port,
        access_log=access_log,
        capacity=capacity,
    )
    way = "the EDS file" if xds_port is None else f"xDS on port {xds_port}"
    _publish_proxy(open_clusters(options), "cluster", clusters, way, **publishing)


def _publish_proxy(
    sources: Mapping[str, Source], kind: str, backends: Mapping[str, str], way: str, **options: Any
) -> None:
    def shown(name: str, source: Source) -> str:
        return (
            f"{kind} {backends[name]}, {len(source.servers())} servers, weights by {way}, an observation every "
            f"{options['publish_interval']:g} s of {', '.join(source.features) or 'nothing'}"
        )

    _publish(sources, shown, **options)


def _publishing(
    publish_interval: float, capacity: int | None, mode: str, group: str | None, port: int | None, address: str | None
) -> dict[str, Any]:
    """Options of :func:`_publish`, before anything is opened: a bad one must not be found out later."""
    if address is not None and port is None:
        raise InvalidOptionError(f"--metrics-address {address} needs --metrics-port, too")
    return {
        "publish_interval": publish_interval, "capacity": capacity, "mode": _permissions(mode), "group": group,
        "metrics": None if port is None else (port, address or "127.0.0.1"),
    }  # fmt: skip


def _given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def check(
    name: Annotated[str, typer.Argument(help="Name of the region.")],
    observations: Annotated[int, typer.Option(help="Observations to watch.")] = 24,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each.")] = 10.0,
    only_look: Annotated[bool, typer.Option("--only-look", help="Write no actions.")] = False,
    end: Annotated[bool, typer.Option("--end", help="Also end the driver by SIGTERM.")] = False,
) -> None:
    """Hold a running driver, in whatever language, to the contract: one line per check.

    It drives the region for a moment and leaves it with the safe weights in force. Exit code 1: a check failed.
    """
    from ..drivers.check import check_driver

    verdicts = check_driver(name, observations=observations, timeout=timeout, drive=not only_look, end=end)
    for verdict in verdicts:
        typer.echo(str(verdict))
    if any(verdict.passed is False for verdict in verdicts):
        raise typer.Exit(1)


#: Requests of ``ctl`` that name a server.
_OF_A_SERVER = ("add", "drain", "undrain", "remove")


def ctl(
    name: Annotated[str, typer.Argument(help="Name of the region.")],
    request: Annotated[str, typer.Argument(help="list, add, drain, undrain, remove or reload.")],
    server: Annotated[str | None, typer.Argument(help="Name of the server.", show_default=False)] = None,
    address: Annotated[str | None, typer.Option(help="Of a server to add.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Of a server to add.", show_default=False)] = None,
    weight: Annotated[float, typer.Option(help="Of a server to add: relative speed.")] = 1.0,
    cores: Annotated[int | None, typer.Option(help="Of a server to add.", show_default=False)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the driver.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the driver's answer as JSON.")] = False,
) -> None:
    """List, add, drain and remove servers of a running driver, or have it read its configuration again.

    A server that is drained or removed finishes its flows and takes no new ones; a removed one is forgotten then.
    """
    from ..drivers.control import control

    if request in _OF_A_SERVER and server is None:
        raise InvalidOptionError(f"{request} needs the name of a server: lbgym dataplane ctl {name} {request} SERVER")
    if request == "add" and address is None:
        raise InvalidOptionError("add needs --address")
    message: dict[str, Any] = {"op": request}
    if request in _OF_A_SERVER:
        message["server"] = server
    if request == "add":
        message |= {"address": address, "port": port, "weight": weight, "cores": cores}
    answer = control(name, message, timeout)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    if answer["done"]:
        typer.echo(f"{name}: {answer['done']}")
    if request == "list":
        width = max((len(row["name"]) for row in answer["servers"]), default=0)
        for row in answer["servers"]:
            typer.echo(f"{row['slot']:>5}  {row['name']:{width}}  {row['state']:8}  weight {row['weight']:g}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidOptionError(f"--safe-weights takes numbers separated by commas, got {text!r}") from None


def _permissions(text: str, option: str = "--mode") -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise InvalidOptionError(f"{option} takes octal permissions from 0 to 777, such as 600 or 660, got {text!r}")
    return mode
