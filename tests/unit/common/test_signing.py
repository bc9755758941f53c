"""Signatures of jobs: what they cover, how keys rotate, and that they say nothing of the keys."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq.job import Job
from rq.serializers import JSONSerializer

from mlx_serving.common.errors import BadSignature, CorruptJob, InvalidSettings
from mlx_serving.common.job.schema import JOB_FUNCTION, GenerationJob
from mlx_serving.common.protocol.fields import SIGNATURE_FIELD
from mlx_serving.common.settings import load_settings
from mlx_serving.common.signing import Signer, SigningKey
from mlx_serving.producer.envelope import seal

OLD, NEW = "o" * 32, "n" * 40
PARTS = ("id", "tally:default", b'["f", null, [{}], {}]')
JOB = GenerationJob.build(model="tally", prompt="hello", seed=1)
LIMIT = 1 << 20


def test_what_was_signed_verifies() -> None:
    signer = Signer([OLD])
    signature = signer.sign(*PARTS)
    assert signature is not None
    signer.verify(signature, *PARTS)


@pytest.mark.parametrize(
    "other",
    [
        ("other", PARTS[1], PARTS[2]),
        (PARTS[0], "tally:bulk", PARTS[2]),
        (PARTS[0], "other:default", PARTS[2]),
        (PARTS[0], PARTS[1], PARTS[2] + b" "),
        (PARTS[0], PARTS[1], PARTS[2].replace(b"f", b"g")),
        # The same bytes, cut elsewhere.
        ("idt", "ally:default", PARTS[2]),
        (PARTS[0], "tally:default[", PARTS[2][1:]),
    ],
)
def test_it_fits_no_other_job(other: tuple[str, str, bytes]) -> None:
    signer = Signer([OLD])
    with pytest.raises(BadSignature, match="does not fit"):
        signer.verify(signer.sign(*PARTS) or "", *other)


@given(st.text(max_size=120))
def test_no_other_text_verifies(text: str) -> None:
    signer = Signer([OLD])
    if text != signer.sign(*PARTS):
        with pytest.raises(BadSignature):
            signer.verify(text, *PARTS)


@given(st.integers(0, 54), st.characters(codec="utf-8"))
def test_no_single_character_may_differ(at: int, character: str) -> None:
    signer = Signer([OLD])
    right = signer.sign(*PARTS)
    assert right is not None
    wrong = right[:at] + character + right[at + 1 :]
    if wrong != right:
        with pytest.raises(BadSignature):
            signer.verify(wrong, *PARTS)


@pytest.mark.parametrize("wrong", ["", "v1", "v1.", "v1..", "v2.0.0", "v1.00000000.", "too long"])
def test_what_is_no_signature_is_refused_with_its_code(wrong: str) -> None:
    with pytest.raises(BadSignature) as refusal:
        Signer([OLD]).verify(wrong, *PARTS)
    assert refusal.value.code == "bad_signature"
    assert isinstance(refusal.value, CorruptJob)


def test_without_keys_nothing_is_signed_and_nothing_is_refused() -> None:
    signer = Signer()
    assert not signer
    assert signer.sign(*PARTS) is None
    signer.verify("", *PARTS)
    signer.verify("v1.whatever.it-is", *PARTS)


def test_keys_rotate_without_a_job_refused() -> None:
    """New key last everywhere, then first, then the old one goes."""
    phases = [Signer([OLD]), Signer([OLD, NEW]), Signer([NEW, OLD]), Signer([NEW])]
    for before, after in itertools.pairwise(phases):
        for signs, verifies in ((before, after), (after, before)):
            verifies.verify(signs.sign(*PARTS) or "", *PARTS)
    with pytest.raises(BadSignature, match="by a key that this worker does not know"):
        phases[-1].verify(phases[0].sign(*PARTS) or "", *PARTS)


def test_two_keys_of_one_id_both_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key's id is short: it only says where to look first."""
    first, second = SigningKey(b"a" * 32, "00000000"), SigningKey(b"b" * 32, "00000000")
    signer = Signer()
    monkeypatch.setattr(signer, "_keys", (first, second))
    signer.verify(f"v1.00000000.{second.mac(*PARTS)}", *PARTS)


def test_neither_a_repr_nor_a_signature_nor_an_error_shows_a_key() -> None:
    key, signer = SigningKey.of(OLD), Signer([OLD])
    with pytest.raises(BadSignature) as refusal:
        signer.verify("v1.x.y", *PARTS)
    shown = f"{key} {signer} {signer.sign(*PARTS)} {refusal.value} {refusal.value!r}"
    assert OLD not in shown
    assert hashlib.sha256(OLD.encode()).hexdigest()[:8] not in shown


def test_the_form_is_frozen() -> None:
    """Producers and workers of other releases sign and verify this very text."""
    assert Signer([OLD]).sign(*PARTS) == ("v1.077e44f1.W4lz2KhF-LigJb31wcoSCbnXxofrF_7XFttCcMzBOJk")


def test_macs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def compare(right: bytes, given: bytes) -> bool:
        seen.append((right, given))
        return right == given

    monkeypatch.setattr(hmac, "compare_digest", compare)
    signer = Signer([OLD])
    signer.verify(signer.sign(*PARTS) or "", *PARTS)
    assert len(seen) == 1


class TestSealed:
    def test_a_sealed_job_carries_the_signature_of_its_exact_payload(self) -> None:
        signer = Signer([OLD])
        entry = seal(JOB, max_payload_bytes=LIMIT, signer=signer)
        payload = zlib.decompress(bytes(entry.rq_fields["data"]))  # type: ignore[arg-type]
        assert json.loads(payload)[0] == JOB_FUNCTION
        signer.verify(str(entry.rq_fields[SIGNATURE_FIELD]), entry.job_id, entry.queue, payload)

    def test_it_costs_redis_less_than_80_bytes(self) -> None:
        plain = seal(JOB, max_payload_bytes=LIMIT).rq_fields
        signed = seal(JOB, max_payload_bytes=LIMIT, signer=Signer([OLD])).rq_fields
        assert SIGNATURE_FIELD not in plain
        added = set(signed) - set(plain)
        assert added == {SIGNATURE_FIELD}
        assert sum(len(name) + len(str(signed[name])) for name in added) < 80

    def test_rq_saves_a_signed_job_with_the_same_payload(self) -> None:
        """A stock tool that loads and saves the job packs it again: the signature still fits."""
        signer = Signer([OLD])
        entry = seal(JOB, max_payload_bytes=LIMIT, signer=signer)
        raw = {
            name.encode(): value if isinstance(value, bytes) else str(value).encode()
            for name, value in entry.rq_fields.items()
        }
        job = Job(entry.job_id, connection=object(), serializer=JSONSerializer)  # type: ignore[arg-type]
        job.restore(raw)
        assert job.func_name == JOB_FUNCTION
        again = job.to_dict()
        assert SIGNATURE_FIELD not in again  # so that its HSET leaves the field as it is
        signature = str(entry.rq_fields[SIGNATURE_FIELD])
        signer.verify(signature, entry.job_id, entry.queue, zlib.decompress(again["data"]))


class TestSettings:
    def test_keys_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLX_SERVING_JOBS_SIGNING_KEYS", f"{NEW}, {OLD}")
        keys = load_settings().jobs.signing_keys
        assert [key.get_secret_value() for key in keys] == [NEW, OLD]
        assert NEW not in f"{load_settings()}"

    def test_no_keys_by_default(self) -> None:
        assert load_settings().jobs.signing_keys == ()

    def test_a_short_key_is_refused_and_not_shown(self) -> None:
        with pytest.raises(
            InvalidSettings, match=r"jobs\.signing_keys\[1\]: .*at least 32"
        ) as refusal:
            load_settings(jobs__signing_keys=[OLD, "hunter2"])
        assert "hunter2" not in str(refusal.value)

    def test_a_toml_file_gives_a_list(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        file = f"{tmp_path}/config.toml"
        with open(file, "w") as stream:  # noqa: PTH123
            stream.write(f'[jobs]\nsigning_keys = ["{NEW}", "{OLD}"]\n')
        monkeypatch.setenv("MLX_SERVING_CONFIG", file)
        assert [key.get_secret_value() for key in load_settings().jobs.signing_keys] == [NEW, OLD]
