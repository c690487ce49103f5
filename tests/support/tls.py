"""A private certificate authority, and a certificate of it for this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class PrivateTls:
    """Paths of PEM files.

    Attributes:
        ca: certificate of the authority, for the client's ``ssl=``.
        chain, key: certificate chain and private key, for the server.
    """

    ca: str
    chain: str
    key: str

    @property
    def pair(self) -> tuple[str, str]:
        """Chain and key, as servers take them."""
        return self.chain, self.key


def private_tls(folder: Path, *names: str) -> PrivateTls:
    """Write a new authority and a certificate for ``names`` (default: this machine) into ``folder``."""
    authority = trustme.CA()
    certificate = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
    ca, chain, key = (folder / name for name in ("ca.pem", "chain.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(str(chain), append=True)
    certificate.private_key_pem.write_to_path(str(key))
    return PrivateTls(str(ca), str(chain), str(key))
