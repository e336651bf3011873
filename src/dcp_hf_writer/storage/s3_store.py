"""Object store: Amazon S3, and what speaks its protocol."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import WriteError
from dcp_hf_writer.storage.object_contract import (
    Abilities,
    ObjectFacts,
    ObjectStore,
    SentPart,
    Upload,
)
from dcp_hf_writer.storage.object_retries import RequestFault, Retries
from dcp_hf_writer.storage.s3_bodies import BodyDigest, BufferBody, has_etag_of_parts, is_encrypted
from dcp_hf_writer.storage.s3_faults import NO_DIGEST_MATCH, UPLOAD_IS_GONE
from dcp_hf_writer.storage.s3_probes import creates_if_absent, refuses_wrong_digest
from dcp_hf_writer.storage.s3_requests import Answer, S3Requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dcp_hf_writer.storage.object_contract import Patience

_log = logging.getLogger(__name__)

# Limits of Amazon S3; other servers have the same or looser ones.
MIN_PART_NBYTES = 5 << 20
MAX_PARTS = 10_000
# Largest number of entries in one listing, and of keys in one deletion.
_PAGE = 1000

_TOKEN = "dcp-hf-token"  # noqa: S105 - a name in the metadata of objects
_EXISTS = frozenset({"PreconditionFailed", "412"})
_ABSENT = frozenset({"NoSuchKey", "404"})
# What servers say that cannot delete several objects at once.
_NO_BATCHES = frozenset({"NotImplemented", "MethodNotAllowed", "MissingContentMD5", "501", "405"})
# After so many errors of the server, ask whether the upload is there at all.
_ERRORS_TO_ASK = 3
_SMALL_NBYTES = 1 << 16


class S3Store(ObjectStore):
    """The objects below an `s3://` URL. See `ObjectStore`.

    Works in a forked child too. Refuses to be pickled: it would carry credentials.
    """

    def __init__(
        self, bucket: str, root: str, *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Connect to nothing yet.

        Args:
            bucket: Name of the bucket, or ARN of an access point.
            root: Prefix of all keys, without `/` at its ends; may be empty.
            storage_options: Options of `s3fs.S3FileSystem`.

        Raises:
            ConfigError: If an option cannot work.
        """
        self.url = f"s3://{bucket}/{root}".rstrip("/")
        self._bucket, self._root = bucket, root
        self._requests = S3Requests(storage_options or {})
        self._endpoint = str((storage_options or {}).get("endpoint_url"))
        self._sends_crc32 = False
        self._sends_md5 = _is_encrypted(storage_options or {})

    def __reduce__(self) -> tuple[Any, ...]:
        msg = "an S3Store is not pickled: it holds credentials; open the store in each process"
        raise TypeError(msg)

    @property
    def abilities(self) -> Abilities:  # type: ignore[override]
        """What the store can do; the first use in a process writes and deletes a probe."""
        return Abilities(
            shares_uploads=True,
            creates_if_absent=creates_if_absent(
                self._requests, self._endpoint, self._bucket, self._key("")
            ),
            part_nbytes=MIN_PART_NBYTES,
            max_parts=MAX_PARTS,
        )

    def put(
        self,
        key: str,
        data: Sequence[memoryview],
        *,
        token: str,
        patience: Patience,
        if_absent: bool = False,
    ) -> bool:
        """Make an object in one request; see `ObjectStore.put`.

        If the store does not refuse to replace objects, this looks first. Then two calls at the
        same moment may both find the key free, and the last one wins.
        """
        retries = self._retries("put", key, patience)
        digest = BodyDigest(data)
        wanted = _Wanted(token, sum(one.nbytes for one in data), digest)
        params = {"Key": self._key(key), "Metadata": {_TOKEN: token}}
        guarded = if_absent and self.abilities.creates_if_absent
        if if_absent and not guarded and self._head(key, patience) is not None:
            return False
        while True:
            absent = {"IfNoneMatch": "*"} if guarded else {}
            answer = self._send_body("put_object", retries, data, digest, **params, **absent)
            if not isinstance(answer, RequestFault):
                return True
            if if_absent and (answer.passes or answer.code in _EXISTS):
                head = self._head(key, patience)
                verdict = "absent" if head is None else wanted.compare(head)
                if verdict in {"ours", "foreign"}:
                    return verdict == "ours"
                # Our own object arrived damaged: replace it.
                guarded = guarded and verdict == "absent"
                if answer.code in _EXISTS:
                    answer = _changed_meanwhile(answer)
            retries.wait_after(answer)

    def begin_upload(self, key: str, *, token: str, patience: Patience) -> Upload:
        """Begin an object that is sent in parts; see `ObjectStore.begin_upload`."""
        retries = self._retries("create_multipart_upload", key, patience)
        before = self._upload_ids(key, patience)
        while True:
            asks = {"ChecksumAlgorithm": "CRC32"} if self._sends_crc32 else {}
            answer = self._send(
                "create_multipart_upload",
                patience,
                Key=self._key(key),
                Metadata={_TOKEN: token},
                **asks,
            )
            if isinstance(answer, RequestFault):
                retries.wait_after(answer)
                continue
            upload = Upload(key, answer["UploadId"], token)
            if is_encrypted(answer) and not self._sends_crc32:
                # The ETags of its parts will be no digests, and an upload takes checksums only if
                # it was begun with their algorithm.
                self._sends_crc32 = True
                self.abort(upload, patience=patience)
                continue
            if retries.failures:
                self._abort_orphans(upload, before, retries)
            return upload

    def _upload_ids(self, key: str, patience: Patience) -> set[str] | None:
        """Return the open uploads of exactly this key; `None` if they may not be listed."""
        try:
            found = self.uploads(key, patience=patience)
            return {one.upload_id for one in found if one.key == key}
        except WriteError as error:
            _log.info("open uploads of %s cannot be listed: %s", self._url(key), error.found)
            return None

    def _abort_orphans(self, upload: Upload, before: set[str] | None, retries: Retries) -> None:
        """Abort what tries began whose answers were lost.

        A listing shows no metadata, so uploads do not say who began them. Those from before this
        call are another's. More new ones than lost answers are ambiguous, and are left to `gc`.
        """
        now = self._upload_ids(upload.key, retries.patience)
        if before is None or now is None:
            return
        orphans = now - before - {upload.upload_id}
        if len(orphans) > retries.failures:
            _log.warning("%s has open uploads of several owners", self._url(upload.key))
            return
        for orphan in sorted(orphans):
            self.abort(Upload(upload.key, orphan, upload.token), patience=retries.patience)

    def send_part(
        self, upload: Upload, number: int, data: Sequence[memoryview], *, patience: Patience
    ) -> SentPart:
        """Send one part; see `ObjectStore.send_part`."""
        retries = self._retries(f"upload_part {number}", upload.key, patience)
        digest = BodyDigest(data)
        params = {**self._names(upload), "PartNumber": number}
        while True:
            answer = self._send_body("upload_part", retries, data, digest, **params)
            if not isinstance(answer, RequestFault):
                receipt = " ".join(filter(None, (answer["ETag"], answer.get("ChecksumCRC32"))))
                return SentPart(number, sum(one.nbytes for one in data), receipt)
            if self._is_gone(upload, answer, retries):
                raise self._gone(upload, retries)
            retries.wait_after(answer)

    def _is_gone(self, upload: Upload, fault: RequestFault, retries: Retries) -> bool:
        """Whether the upload was aborted. Some servers answer 500 then, so ask."""
        if fault.code != UPLOAD_IS_GONE and retries.failures == _ERRORS_TO_ASK and fault.code:
            names = self._names(upload)
            listed = self._send("list_parts", retries.patience, **names, MaxParts=1)
            return isinstance(listed, RequestFault) and listed.code == UPLOAD_IS_GONE
        return fault.code == UPLOAD_IS_GONE

    def _gone(self, upload: Upload, retries: Retries) -> WriteError:
        if retries.last_code == NO_DIGEST_MATCH:
            return WriteError(
                "the server dropped a multipart upload after a part that arrived damaged",
                path=self._url(upload.key),
                hint="save again; if this comes back, check the network and its proxies",
            )
        return WriteError(
            "a multipart upload of this save is gone: another party has aborted or completed it",
            path=self._url(upload.key),
            hint="save again; check for lifecycle rules, other jobs and clean-ups of this prefix",
        )

    def complete(self, upload: Upload, parts: Sequence[SentPart], *, patience: Patience) -> None:
        """Make the object visible; see `ObjectStore.complete`.

        Raises:
            WriteError: Also if the parts are no grid: only the last part may have another size than
                the first, and it must not be larger (Cloudflare R2, and the limits of S3).
        """
        ordered = sorted(parts, key=lambda part: part.number)
        self._check_grid(upload.key, ordered)
        retries = self._retries("complete_multipart_upload", upload.key, patience)
        wanted = _Wanted(upload.token, sum(part.nbytes for part in ordered))
        named = [_named_part(part) for part in ordered]
        etags = [str(one["ETag"]) for one in named]
        while True:
            answer = self._send(
                "complete_multipart_upload",
                patience,
                **self._names(upload),
                MultipartUpload={"Parts": named},
            )
            if not isinstance(answer, RequestFault) and has_etag_of_parts(answer, etags):
                # A HEAD could tell no more, and there are servers that hash the object for it.
                return
            if not retries.failures and isinstance(answer, RequestFault) and _refuses(answer):
                raise retries.refused(answer)
            # An error may follow success: the answer was lost, or an earlier try did it.
            head = self._head(upload.key, patience)
            if head is not None and wanted.compare(head) == "ours":
                return
            if not isinstance(answer, RequestFault):
                raise WriteError(
                    "the store completed an upload, but another object is there",
                    path=self._url(upload.key),
                    expected=f"{wanted.nbytes} bytes of this save",
                    found="no object" if head is None else wanted.describe(head),
                    hint="check whether two jobs save to one place",
                )
            if self._is_gone(upload, answer, retries):
                raise self._gone(upload, retries)
            retries.wait_after(answer)

    def _check_grid(self, key: str, parts: Sequence[SentPart]) -> None:
        numbers = [part.number for part in parts]
        sizes = {part.nbytes for part in parts[:-1]}
        problem = None
        if not parts or numbers != list(range(1, len(parts) + 1)):
            problem = f"parts with the numbers {numbers[:20]}"
        elif len(parts) > MAX_PARTS:
            problem = f"{len(parts)} parts"
        elif sizes and (len(sizes) > 1 or min(sizes) < MIN_PART_NBYTES):
            problem = f"parts of {min(sizes)} to {max(sizes)} bytes before the last"
        elif sizes and parts[-1].nbytes > max(sizes):
            problem = f"a last part of {parts[-1].nbytes} bytes after parts of {max(sizes)}"
        if problem:
            raise WriteError(
                "these parts cannot become an object",
                path=self._url(key),
                expected=f"numbers from 1 to at most {MAX_PARTS} without a gap, equal sizes of at "
                f"least {MIN_PART_NBYTES} bytes, and a last part that is not larger",
                found=problem,
            )

    def abort(self, upload: Upload, *, patience: Patience) -> None:
        """Give an upload up; see `ObjectStore.abort`."""
        retries = self._retries("abort_multipart_upload", upload.key, patience)
        self._until_done("abort_multipart_upload", retries, {UPLOAD_IS_GONE}, **self._names(upload))

    def facts_of(self, key: str, *, patience: Patience) -> ObjectFacts | None:
        """Return the facts of an object; see `ObjectStore.facts_of`."""
        head = self._head(key, patience)
        if head is None:
            return None
        return ObjectFacts(key, int(head["ContentLength"]), _token_of(head))

    def read(self, key: str, *, max_nbytes: int, patience: Patience) -> bytes | None:
        """Return the bytes of a small object; see `ObjectStore.read`."""
        retries = self._retries("get_object", key, patience)
        params = {"Key": self._key(key), "max_nbytes": max_nbytes}
        answer = self._until_done("get_object", retries, _ABSENT, **params)
        if answer is None:
            return None
        data: bytes | None = answer["Body"]
        if data is None:
            raise WriteError(
                "an object is larger than it may be",
                path=self._url(key),
                expected=f"at most {max_nbytes} bytes",
                found=f"{answer['ContentLength']} bytes",
            )
        return data

    def objects(self, prefix: str, *, patience: Patience) -> Iterator[ObjectFacts]:
        """Yield the objects below a prefix; see `ObjectStore.objects`."""
        more: dict[str, Any] = {}
        while True:
            retries = self._retries("list_objects_v2", prefix, patience)
            params = {"Prefix": self._key(prefix), "MaxKeys": _PAGE, **more}
            page = self._until_done("list_objects_v2", retries, frozenset(), **params) or {}
            for entry in page.get("Contents", ()):
                yield ObjectFacts(self._inner(entry["Key"]), int(entry["Size"]))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def uploads(self, prefix: str, *, patience: Patience) -> Iterator[Upload]:
        """Yield the open uploads below a prefix; see `ObjectStore.uploads`."""
        more: dict[str, Any] = {}
        while True:
            retries = self._retries("list_multipart_uploads", prefix, patience)
            params = {"Prefix": self._key(prefix), "MaxUploads": _PAGE, **more}
            # rclone answers this until a bucket has had its first upload.
            none = {UPLOAD_IS_GONE}
            page = self._until_done("list_multipart_uploads", retries, none, **params) or {}
            for entry in page.get("Uploads", ()):
                yield Upload(self._inner(entry["Key"]), entry["UploadId"], "")
            if not page.get("IsTruncated"):
                return
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def delete(self, keys: Sequence[str], *, patience: Patience) -> None:
        """Delete objects; see `ObjectStore.delete`."""
        for start in range(0, len(keys), _PAGE):
            self._delete_batch(list(keys[start : start + _PAGE]), patience)

    def _delete_batch(self, keys: list[str], patience: Patience) -> None:
        retries = self._retries("delete_objects", keys[0], patience)
        while keys:
            listed = {"Objects": [{"Key": self._key(key)} for key in keys], "Quiet": True}
            answer = self._send("delete_objects", patience, Delete=listed)
            if isinstance(answer, RequestFault):
                if answer.code in _NO_BATCHES:
                    self._delete_each(keys, patience)
                    return
                retries.wait_after(answer)
                continue
            errors = [one for one in answer.get("Errors", ()) if one.get("Code") not in _ABSENT]
            if not errors:
                return
            keys = [self._inner(one["Key"]) for one in errors]
            retries.path = self._url(keys[0])
            code = str(errors[0].get("Code", ""))
            passes = all(one.get("Code") in {"InternalError", "SlowDown"} for one in errors)
            text = f"{len(keys)} objects not deleted, the first with: {code}"
            retries.wait_after(RequestFault(passes, text, code))

    def _delete_each(self, keys: Sequence[str], patience: Patience) -> None:
        for key in keys:
            retries = self._retries("delete_object", key, patience)
            self._until_done("delete_object", retries, _ABSENT, Key=self._key(key))

    def close(self) -> None:
        """Close the connections of this process; see `ObjectStore.close`."""
        self._requests.close()

    def _send_body(
        self,
        operation: str,
        retries: Retries,
        data: Sequence[memoryview],
        digest: BodyDigest,
        **params: Any,
    ) -> Answer | RequestFault:
        """Send bytes once; success means that the store has confirmed their digest."""
        crc32 = digest.crc32_base64() if self._sends_crc32 else None
        body = BufferBody(data)
        answer = self._send(
            operation,
            retries.patience,
            Body=body if body.nbytes > _SMALL_NBYTES else body.read(),
            **({} if crc32 is None else {"ChecksumCRC32": crc32}),
            **({"ContentMD5": digest.md5_base64} if self._sends_md5 or crc32 else {}),
            **params,
        )
        if isinstance(answer, RequestFault):
            return answer
        verdict = digest.compare(answer, crc32=crc32)
        if verdict == "unknown" and crc32 is None:
            self._sends_crc32 = True
            return self._send_body(operation, retries, data, digest, **params)
        if verdict == "unknown" and not refuses_wrong_digest(
            self._requests, self._endpoint, self._bucket, self._key(""), retries.patience
        ):
            raise WriteError(
                "the store confirms no digest of what it was sent",
                path=retries.path,
                expected="an MD5 digest as ETag, a CRC-32, or a check of Content-MD5",
                hint="damage on the way would stay unnoticed: use a store or a setting that "
                "returns digests",
            )
        if verdict == "other":
            return RequestFault(
                passes=True, text="the store got other bytes than were sent", code=NO_DIGEST_MATCH
            )
        return answer

    def _head(self, key: str, patience: Patience) -> Answer | None:
        retries = self._retries("head_object", key, patience)
        return self._until_done("head_object", retries, _ABSENT, Key=self._key(key))

    def _until_done(
        self, operation: str, retries: Retries, absent: frozenset[str] | set[str], **params: Any
    ) -> Answer | None:
        """Send a request until it is answered; `None` for the codes in `absent`."""
        while True:
            answer = self._send(operation, retries.patience, **params)
            if not isinstance(answer, RequestFault):
                return answer
            if answer.code in absent:
                return None
            retries.wait_after(answer)

    def _send(self, operation: str, patience: Patience, **params: Any) -> Answer | RequestFault:
        return self._requests.send(operation, patience, Bucket=self._bucket, **params)

    def _retries(self, what: str, key: str, patience: Patience) -> Retries:
        return Retries(patience, path=self._url(key), what=what)

    def _names(self, upload: Upload) -> dict[str, str]:
        return {"Key": self._key(upload.key), "UploadId": upload.upload_id}

    def _key(self, key: str) -> str:
        return f"{self._root}/{key}" if self._root else key

    def _inner(self, key: str) -> str:
        return key[len(self._key("")) :]

    def _url(self, key: str) -> str:
        return f"{self.url}/{key}"


class _Wanted:
    """The object that a call makes, to be found again by a HEAD request."""

    def __init__(self, token: str, nbytes: int, digest: BodyDigest | None = None) -> None:
        self.token, self.nbytes, self.digest = token, nbytes, digest

    def compare(self, head: Answer) -> str:
        """Return `ours`, `foreign`, or `damaged` if it is ours and holds other bytes."""
        if _token_of(head) != self.token or int(head["ContentLength"]) != self.nbytes:
            return "foreign"
        return "damaged" if self.digest and self.digest.differs(head) else "ours"

    def describe(self, head: Answer) -> str:
        whose = "this" if _token_of(head) == self.token else "another"
        return f"{head['ContentLength']} bytes of {whose} save"


def _is_encrypted(options: Mapping[str, Any]) -> bool:
    """Whether connections use TLS. If so, `Content-MD5` goes with each body.

    botocore then does not hash the body with SHA-256 for the signature. Without TLS it does so
    anyway, and the server checks that: a second digest to check would only cost it time. The
    returned ETag is compared in both cases.
    """
    given = {**options, **(options.get("client_kwargs") or {})}
    endpoint = options.get("endpoint_url") or given.get("endpoint_url")
    return not str(endpoint).startswith("http://") if endpoint else given.get("use_ssl", True)


def _token_of(head: Answer) -> str | None:
    # rclone returns the names in another case.
    named = {name.lower(): value for name, value in head.get("Metadata", {}).items()}
    return named.get(_TOKEN)


def _named_part(part: SentPart) -> dict[str, Any]:
    etag, _, crc32 = part.receipt.partition(" ")
    named = {"PartNumber": part.number, "ETag": etag}
    return {**named, "ChecksumCRC32": crc32} if crc32 else named


def _refuses(fault: RequestFault) -> bool:
    """Whether the store refused; an upload that is gone may have been completed."""
    return not fault.passes and fault.code != UPLOAD_IS_GONE


def _changed_meanwhile(fault: RequestFault) -> RequestFault:
    """Return a fault that passes: the object that stood in the way is gone, or is ours."""
    return dataclasses.replace(fault, passes=True)
