"""Who may talk to this host over TCP, and what this host believes when it talks.

Rule 1: with a TLS directory every TCP port speaks TLS 1.3 and wants a client certificate of the run's authority,
        and every connection to a peer expects the one server name that the testbed told.
Rule 2: a certificate opens one door: hosts of this run may call the Migration service, the testbed alone the
        Node service. The name in it decides, call by call: HOST.RUN.ballast and control.RUN.ballast.
Rule 3: plain text is for loopback. Elsewhere it is refused unless --insecure asks for it, and every plain port is
        told as an event.
Rule 4: nothing here prints or keeps a key; a key that others can read is refused.

gRPC's Python API sets no minimum TLS version. Its cipher list binds TLS 1.2 alone (RFC 8446 has suites of its
own), so a list of suites that need an RSA certificate, where all certificates are P-256, leaves no handshake but
TLS 1.3's. gRPC reads the list when it is imported: host/__init__.py sets it first.
"""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from host import CIPHER_SUITES_VARIABLE, NO_TLS12_SUITE
from host.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CA_FILE: Final = "ca.pem"
CERT_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
DOMAIN: Final = "ballast"
CONTROL_LABEL: Final = "control"  # the testbed; no host is called so


class TrustError(HostError):
    """TLS files that cannot be used, or plain text where it is not allowed."""


def server_name_of(label: str, run_id: str) -> str:
    """The name in the certificate of the host `label`, or of the testbed (CONTROL_LABEL)."""
    return f"{label}.{run_id}.{DOMAIN}"


def is_loopback(address: str) -> bool:
    """Whether "host:port" or "unix:path" cannot leave this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Trust:
    """One node's credentials, or their absence. Immutable.

    Args:
        directory: with ca.pem, cert.pem and key.pem; None: plain text.
        insecure: allow plain text beyond loopback.

    Raises:
        TrustError: the files cannot be used.
    """

    def __init__(self, directory: Path | None = None, *, insecure: bool = False) -> None:
        self.directory = directory
        self._insecure = insecure
        self.server_name = ""
        if directory is not None:
            self._ca, self._cert, self._key = (
                _read(directory, name) for name in (CA_FILE, CERT_FILE, KEY_FILE)
            )
            self.server_name = _name_in(self._cert, directory / CERT_FILE)
            if os.environ.get(CIPHER_SUITES_VARIABLE) != NO_TLS12_SUITE:
                raise TrustError(f"{CIPHER_SUITES_VARIABLE} was changed: TLS 1.3 could not be enforced")

    @property
    def encrypts(self) -> bool:
        """Whether TCP is TLS here."""
        return self.directory is not None

    # -- serving -------------------------------------------------------------------------------

    def bind(self, server: grpc.Server, address: str) -> str:
        """Binds a port of the server; the address with the port that was given.

        Raises:
            TrustError: plain text is not allowed on this address.
            OSError: the address cannot be bound.
        """
        path = address.removeprefix("unix:")
        try:
            if path != address:
                server.add_insecure_port(address)
                Path(path).chmod(0o600)
                return address
            if self.directory is None:
                if reason := self.why_not_plain(address):
                    raise TrustError(f"cannot listen on {address}: {reason}")
                port = server.add_insecure_port(address)
            else:
                pair = [(self._key, self._cert)]
                credentials = grpc.ssl_server_credentials(pair, self._ca, require_client_auth=True)
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:  # gRPC's; its text has the address and the reason
            raise OSError(str(error)) from error
        return f"{address.rpartition(':')[0]}:{port}"

    def why_not_plain(self, address: str) -> str:
        """Why plain text may not be spoken with this address; "" when it may."""
        if self._insecure or is_loopback(address):
            return ""
        return "plain text is for loopback only; give --tls-dir DIR, or --insecure to send pages unprotected"

    def hosts_only(self) -> list[grpc.ServerInterceptor]:
        """Of the migration server: callers that are hosts of this run."""
        return [OnlyFrom(self._no_host)] if self.encrypts else []

    def control_only(self, address: str) -> list[grpc.ServerInterceptor]:
        """Of the control server: the testbed of this run; a unix socket asks the file system instead."""
        over_tls = self.encrypts and not address.startswith("unix:")
        return [OnlyFrom(self._no_control)] if over_tls else []

    # -- calling -------------------------------------------------------------------------------

    def why_not_call(self, address: str, server_name: str) -> str:
        """Why no channel to this peer may be opened, in one line; "" when it may."""
        if self.encrypts and not server_name:
            return "this host speaks TLS between hosts: the request must name the destination's certificate"
        if server_name and not self.encrypts:
            return f"no certificate here for the connection to {server_name}: start this host with --tls-dir"
        reason = "" if self.encrypts else self.why_not_plain(address)
        return f"cannot call {address}: {reason}" if reason else ""

    def channel(self, address: str, server_name: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel to a peer whose certificate must have exactly this name; plain when the name is "".

        Raises:
            TrustError: see `why_not_call`.
        """
        if reason := self.why_not_call(address, server_name):
            raise TrustError(reason)
        if not server_name:
            return grpc.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(self._ca, self._key, self._cert)
        named = [*options, ("grpc.ssl_target_name_override", server_name)]
        return grpc.secure_channel(address, credentials, options=named)

    # -- names ---------------------------------------------------------------------------------

    def _no_host(self, names: Sequence[str]) -> str:
        label, _, rest = self.server_name.partition(".")
        for name in names:
            theirs, _, theirs_rest = name.partition(".")
            if theirs_rest == rest and theirs not in (CONTROL_LABEL, label):
                return ""
        return f"{_told(names)} is no other host of this run: only those may send a guest here"

    def _no_control(self, names: Sequence[str]) -> str:
        wanted = f"{CONTROL_LABEL}.{self.server_name.partition('.')[2]}"
        return "" if wanted in names else f"{_told(names)} may not give orders: only {wanted} may"


PLAIN: Final = Trust()


class OnlyFrom(grpc.ServerInterceptor):
    """Lets calls through whose caller's names are approved. `why_not` takes them and gives one line, or ""."""

    def __init__(self, why_not: Callable[[Sequence[str]], str]) -> None:
        self.why_not = why_not

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the method, because only a call in progress knows who calls."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        streamed_in, streamed_out = handler.request_streaming, handler.response_streaming
        kind = f"{'stream' if streamed_in else 'unary'}_{'stream' if streamed_out else 'unary'}"
        behaviour = getattr(handler, kind)

        def checked(request: Any, context: grpc.ServicerContext) -> Any:
            names: Any = context.auth_context().get(
                "x509_subject_alternative_name", ()
            )  # bytes, whatever stubs say
            if reason := self.why_not([name.decode("utf-8", "replace") for name in names]):
                context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
            return behaviour(request, context)

        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        return wrap(checked, handler.request_deserializer, handler.response_serializer)


def _told(names: Sequence[str]) -> str:
    return " ".join(names)[:200] or "a caller without a name"


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        mode = path.stat().st_mode
        if name == KEY_FILE and stat.S_IMODE(mode) & 0o077:
            raise TrustError(f"{path}: others can read this key; chmod 600 it")
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"{path}: cannot be read: {error.strerror}") from error


def _name_in(cert: bytes, path: Path) -> str:
    """The one name of our own certificate, which must be valid now."""
    from cryptography import x509  # noqa: PLC0415 - only hosts with TLS pay for it

    try:
        certificate = x509.load_pem_x509_certificate(cert)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns_names = names.get_values_for_type(x509.DNSName)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise TrustError(f"{path}: no certificate with a name: {error}") from error
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        until = certificate.not_valid_after_utc
        raise TrustError(f"{path}: this certificate is not valid now (until {until:%Y-%m-%d %H:%M} UTC)")
    if len(dns_names) != 1:
        raise TrustError(f"{path}: one name is expected in the certificate, found {len(dns_names)}")
    return dns_names[0]
