"""Where the daemon is, and how to open a channel to it: address, TLS, token."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from dreamfeed import _fork

DEFAULT_PORT = 7461
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Tls:
    """How to speak TLS; each certificate is a path to a PEM file or the PEM itself as bytes.

    Args:
        ca: the authority that signed the daemon's certificate; default: the system's.
        certificate: the client's own certificate, where the daemon asks for one; goes with `key`.
        key: the private key of `certificate`.
        server_name: the name in the daemon's certificate, where it is not the host of the address.
    """

    ca: str | Path | bytes | None = None
    certificate: str | Path | bytes | None = None
    key: str | Path | bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("Tls takes certificate and key together, or neither")
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.certificate))


def _pem(source: str | Path | bytes | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()


@dataclass(frozen=True)
class Endpoint:
    """A daemon's address with everything needed to connect; can be pickled, and holds no connection."""

    target: str
    tls: Tls | None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, address: str, token: str | None = None, tls: Tls | bool | None = None) -> "Endpoint":
        """Checks `address` ("HOST:PORT", with "http://" or "https://" in front or not, or "unix:PATH").

        Raises:
            ValueError: the address is malformed, or a token would travel in the clear to another machine.
        """
        scheme, separator, rest = address.partition("://")
        if not separator:
            scheme, rest = "", address
        if scheme not in ("", "http", "https"):
            raise ValueError(
                f"address {address!r} has the scheme {scheme!r}; give HOST:PORT, http:// or https://"
            )
        target = rest.rstrip("/")
        if not target or (not target.startswith("unix:") and "/" in target):
            raise ValueError(f"address {address!r} is not HOST:PORT, for example 127.0.0.1:{DEFAULT_PORT}")
        if not target.startswith("unix:"):
            target = _with_port(address, target)
        if scheme == "http" and tls:
            raise ValueError(
                f"address {address!r} says http, but tls is set; write https:// or leave tls out"
            )
        if tls is None:
            tls = scheme == "https"
        elif tls is False and scheme == "https":
            raise ValueError(f"address {address!r} says https, but tls is False; write http://")
        settings = (Tls() if tls is True else tls) or None
        if token is not None:
            if not token or not token.isascii() or not token.isprintable():
                raise ValueError(
                    "token must be printable ASCII without line breaks (strip what you read from a file)"
                )
            if settings is None and not is_loopback(target):
                raise ValueError(
                    f"refusing to send a token unencrypted to {target}: pass tls=True (or a Tls), or reach the "
                    "daemon on loopback, for example through an SSH tunnel"
                )
        return cls(target, settings, token)

    def channel(self, *, small_window: bool = False) -> grpc.Channel:
        """A new channel, with a connection of its own. Call it in the process that uses it."""
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
            # A peer that vanished without a word is noticed; a stream may be idle for long.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        if is_loopback(self.target):
            options.append(("grpc.enable_http_proxy", 0))
        if small_window:
            options += [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10)]
        if self.tls is None:
            channel = grpc.insecure_channel(self.target, options)
        else:
            if self.tls.server_name:
                options.append(("grpc.ssl_target_name_override", self.tls.server_name))
            channel = grpc.secure_channel(self.target, self.tls.credentials(), options)
        _fork.opened()
        return channel

    def metadata(self) -> Metadata:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def _with_port(address: str, target: str) -> str:
    host, separator, port = target.rpartition(":")
    if not separator or target.endswith("]") or (":" in host and not host.startswith("[")):
        if target.count(":") > 1 and not target.startswith("["):
            target = f"[{target}]"
        return f"{target}:{DEFAULT_PORT}"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r} is not HOST:PORT, for example 127.0.0.1:{DEFAULT_PORT}")
    return target


def is_loopback(target: str) -> bool:
    """Whether `target` (HOST:PORT or unix:PATH) cannot leave this machine."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
