"""TLS for those who have no proxy in front: a context from PEM files."""

from __future__ import annotations

import ssl

from runner.errors import ConfigurationError


def make_tls(cert: str, key: str) -> ssl.SSLContext | None:
    """What speaks TLS 1.2 and 1.3 with a certificate's chain and its key, which may be in the same file; None for none.

    ConfigurationError where the files can't be read, don't belong together, or the key has a password.
    """
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key or None, password=_no_password)
    except ssl.SSLError as error:
        why = {"KEY_VALUES_MISMATCH": "the key is not the certificate's"}.get(error.reason or "", "")
        why = why or f"no certificate and key in PEM form ({error.reason or error})"
        raise ConfigurationError(f"tls_cert {cert!r}, tls_key {key or cert!r}: {why}") from error
    except OSError as error:
        raise ConfigurationError(f"tls_cert {cert!r}, tls_key {key or cert!r}: {error.strerror}") from error
    return context


def _no_password() -> str:
    raise ConfigurationError("tls_key has a password, and nobody is there to give it: store it without one")
