"""Signed jobs: anybody who can write to Redis can enqueue, but workers run only signed jobs.

A signature is HMAC-SHA256 (RFC 2104) over the job's id, its queue, and the exact bytes of RQ's
`[function, instance, args, kwargs]`, before compression. It is a field of RQ's job hash that RQ
neither reads nor drops, so RQ's tools work on signed jobs as on any other.

The form is `v1.<key id>.<MAC>`: 8 hex digits, then base64url without padding.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mlx_serving.common.errors import BadSignature

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION: Final = "v1"
_JOB_DOMAIN: Final = b"mlx-serving job v1"
_KEY_ID_DOMAIN: Final = b"mlx-serving key id v1"
_KEY_ID_DIGITS: Final = 8


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One secret and its id, which reveals nothing of it. The secret stays out of the repr."""

    secret: bytes = field(repr=False)
    key_id: str

    @classmethod
    def of(cls, secret: str) -> SigningKey:
        """Take a secret as settings give it."""
        raw = secret.encode()
        name = hmac.new(raw, _KEY_ID_DOMAIN, hashlib.sha256).hexdigest()
        return cls(raw, name[:_KEY_ID_DIGITS])

    def mac(self, job_id: str, queue: str, payload: bytes) -> str:
        """MAC of one job; each part comes after its length, so no two jobs give the same bytes."""
        digest = hmac.new(self.secret, digestmod=hashlib.sha256)
        for part in (_JOB_DOMAIN, job_id.encode(), queue.encode(), payload):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        return base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


class Signer:
    """Signs with the first key, verifies with all of them; without keys it does neither.

    To rotate keys, put the new one last on every worker and producer, then first everywhere, then
    remove the old one.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._keys = tuple(map(SigningKey.of, secrets))

    def __bool__(self) -> bool:
        """Whether there is any key, that is, whether jobs have to be signed."""
        return bool(self._keys)

    def sign(self, job_id: str, queue: str, payload: bytes) -> str | None:
        """Sign the uncompressed payload of a job; None without keys."""
        if not self._keys:
            return None
        key = self._keys[0]
        return f"{VERSION}.{key.key_id}.{key.mac(job_id, queue, payload)}"

    def verify(self, signature: str, job_id: str, queue: str, payload: bytes) -> None:
        """Check a job's signature, in a time that does not depend on how much of it is right.

        Raises:
            BadSignature: it is missing, unreadable, by an unknown key, or that of another job.

        """
        if not self._keys:
            return
        if not signature:
            raise BadSignature("the job is not signed, and this worker runs signed jobs only")
        version, _, rest = signature.partition(".")
        key_id, _, mac = rest.partition(".")
        if version != VERSION or not mac:
            raise BadSignature("the job's signature has a form that this worker does not know")
        known = [key for key in self._keys if key.key_id == key_id]
        if not known:
            raise BadSignature("the job is signed by a key that this worker does not know")
        expected = [key.mac(job_id, queue, payload).encode() for key in known]
        if not any(hmac.compare_digest(right, mac.encode()) for right in expected):
            raise BadSignature("the job's signature does not fit its id, queue and payload")
