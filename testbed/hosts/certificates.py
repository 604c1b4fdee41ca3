"""Who belongs to a run: a certificate authority that lives as long as the run, and what it signed.

Rule 1: the authority's key never leaves this process; what is written is for one holder each.
Rule 2: files are 0600 in a directory 0700, under the run's runtime directory or wherever the caller says, never in
        the run directory, which is kept and shown to others.
Rule 3: a name says who somebody is and in which run: b.RUN.ballast is host b, control.RUN.ballast the testbed.
        Hosts let only hosts send pages and only the testbed give orders (host/tls.py).
Rule 4: certificates are short-lived: long enough for the longest run, with room for clocks that differ.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from host.tls import CA_FILE, CERT_FILE, CONTROL_LABEL, KEY_FILE, server_name_of

if TYPE_CHECKING:
    from pathlib import Path

VALIDITY: Final = timedelta(hours=24)
CLOCK_SLACK: Final = timedelta(minutes=10)  # two machines without a common clock
LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123


@dataclass(frozen=True, slots=True)
class PemFiles:
    """One holder's directory: ca.pem, cert.pem and key.pem, for a node's --tls-dir."""

    directory: Path
    server_name: str  # in the certificate, as its only subject alternative name

    @property
    def ca(self) -> Path:
        """The run's authority."""
        return self.directory / CA_FILE

    @property
    def cert(self) -> Path:
        """The holder's certificate."""
        return self.directory / CERT_FILE

    @property
    def key(self) -> Path:
        """The holder's private key."""
        return self.directory / KEY_FILE


class RunAuthority:
    """The authority of one run. Keys are P-256: the host refuses the cipher suites of any other kind."""

    def __init__(self, run_id: str, directory: Path, *, now: datetime | None = None) -> None:
        if LABEL.fullmatch(run_id) is None:
            raise ValueError(
                f"run id {run_id!r} cannot be part of a server name: letters, digits and '-' only"
            )
        self.run_id = run_id
        self._directory = directory
        self._now = now or datetime.now(UTC)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of run {run_id}")])
        self._certificate = (
            self._begun(self._name, self._key.public_key(), self._now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, host_name: str, *, now: datetime | None = None) -> PemFiles:
        """Makes DIRECTORY/HOST_NAME with a new key and its certificate, whose validity counts from `now`.

        Raises:
            ValueError: the name cannot be part of a server name.
            FileExistsError: it was issued before.
        """
        if LABEL.fullmatch(host_name) is None:
            raise ValueError(f"host name {host_name!r} cannot be part of a server name")
        key, server_name = ec.generate_private_key(ec.SECP256R1()), server_name_of(host_name, self.run_id)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, server_name)])
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._begun(subject, key.public_key(), now or self._now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(server_name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = PemFiles(self._directory / host_name, server_name)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.directory.mkdir(mode=0o700)
        _write(files.ca, self._certificate.public_bytes(serialization.Encoding.PEM))
        _write(files.cert, certificate.public_bytes(serialization.Encoding.PEM))
        _write(
            files.key,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
        return files

    def issue_control(self) -> PemFiles:
        """The testbed's own: whoever holds it may give the run's nodes orders, and may not send pages."""
        return self.issue(CONTROL_LABEL)

    def _begun(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(now + VALIDITY)
        )


def make_run_authority(run_id: str, directory: Path, *, now: datetime | None = None) -> RunAuthority:
    """A new authority. Its holders' files go below `directory`; `now` is the instant that validity counts from.

    Raises:
        ValueError: the run's id cannot be part of a name.
    """
    return RunAuthority(run_id, directory, now=now)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, data: bytes) -> None:
    """0600 from its first moment."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
