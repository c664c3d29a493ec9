"""Everything secret that a suite of containers needs, as files: `shopkeeper prepare`. For development and tests.

keys/            see shared/keys.py
certs/<name>/    see shared/cli/certs.py
DATABASE_URL     read through SHOPKEEPER_SECRETS
"""

from __future__ import annotations

import secrets
from pathlib import Path

from shared.cli.certs import issue_certificates, replace_file
from shared.errors import FailedPrecondition
from shared.keys import ensure_development_keys


def prepare_secrets(directory: Path, password_file: Path, *, database: str, hosts: list[str]) -> list[Path]:
    """Creates what is missing and renews the certificates; returns what there is now.

    Args:
        directory: gets `keys/`, `certs/` and `DATABASE_URL`.
        password_file: of the database's login, read by the database's own container as another user.
        database: `user@host:port/name`.
        hosts: more names of the services, for their certificates.

    Raises:
        FailedPrecondition: SECRETS_NOT_WRITTEN, or the existing ones cannot be used.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not password_file.exists():
            # Readable by others: the volume that it lies in is mounted by the database alone.
            replace_file(password_file, secrets.token_urlsafe(32).encode(), 0o444)
            password_file.parent.chmod(0o755)
        login, _, place = database.partition("@")
        url = f"postgresql://{login}:{password_file.read_text().strip()}@{place}"
        replace_file(directory / "DATABASE_URL", url.encode(), 0o400)
        ensure_development_keys(directory / "keys")
    except OSError as error:
        raise FailedPrecondition(
            "SECRETS_NOT_WRITTEN",
            f"{error.filename or directory} cannot be written: {error.strerror}. Is the volume this user's?",
        ) from error
    return [password_file, directory / "DATABASE_URL", directory / "keys", *issue_certificates(
        directory / "certs", hosts=hosts
    )]  # fmt: skip
