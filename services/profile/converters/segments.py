"""Segments: protobuf to domain and back."""

from __future__ import annotations

from shopkeeper.profile.v1 import profile_service_pb2 as pb
from shopkeeper.profile.v1 import segment_pb2

from services.profile.converters.profiles import invalid, timestamp
from services.profile.converters.segment_language import parse_filter
from services.profile.domain.segments import (
    MAX_DESCRIPTION,
    MAX_DISPLAY_NAME,
    SEGMENT_ID,
    Segment,
    SegmentChange,
)
from shared.tokens import TokenSigner

_SEGMENTS_PAGE = "segments-page"
_USERS_PAGE = "segment-users-page"
_FIELDS = ("display_name", "description", "filter")


class SegmentConverter:
    """Converts requests and answers about segments."""

    def __init__(self, signer: TokenSigner) -> None:
        self._signer = signer

    def new_segment(self, request: pb.CreateSegmentRequest) -> Segment:
        """Returns the segment to create; raises InvalidInput naming the bad field."""
        segment = request.segment
        segment_id(segment.segment_id, "segment.segment_id")
        if len(request.request_id) > 64 or "\0" in request.request_id:
            raise invalid("request_id", "must have at most 64 characters, and no NUL.")
        _check_texts(segment)
        parse_filter(segment.filter, "segment.filter")
        return Segment(segment.segment_id, segment.display_name, segment.description, segment.filter)

    def change(self, request: pb.UpdateSegmentRequest) -> SegmentChange:
        """Returns the change; raises InvalidInput naming the bad field."""
        segment = request.segment
        segment_id(segment.segment_id, "segment.segment_id")
        paths = list(request.update_mask.paths) or [name for name in _FIELDS if getattr(segment, name)]
        for path in paths:
            if path not in _FIELDS:
                raise invalid("update_mask", f"names {path}; fields that change are {', '.join(_FIELDS)}.")
        if not paths:
            raise invalid("update_mask", f"and the segment are empty; set one of {', '.join(_FIELDS)}.")
        _check_texts(segment)
        if "filter" in paths:
            parse_filter(segment.filter, "segment.filter")
        values = {name: getattr(segment, name) for name in paths}
        return SegmentChange(segment.segment_id, revision=revision(segment.etag), **values)

    def segment(self, segment: Segment) -> segment_pb2.Segment:
        """Returns the message of a segment."""
        return segment_pb2.Segment(
            segment_id=segment.segment_id,
            display_name=segment.display_name,
            description=segment.description,
            filter=segment.filter,
            version=segment.version,
            create_time=timestamp(segment.create_us),
            update_time=timestamp(segment.update_us),
            etag=str(segment.revision),
        )

    def page(self, request: pb.ListSegmentsRequest) -> tuple[str, int]:
        """Returns the id that the page begins behind, and its size."""
        after = ""
        if request.page_token:
            after = self._signer.verify(_SEGMENTS_PAGE, request.page_token, "page_token").decode()
        return after, _page_size(request.page_size, 100, 1_000)

    def page_token(self, after: str) -> str:
        """Returns the token of the segments behind an id."""
        return self._signer.sign(_SEGMENTS_PAGE, after.encode())

    def users_page(self, request: pb.ListUsersInSegmentRequest) -> tuple[int, bytes, int]:
        """Returns the version that the listing goes by (0: the newest), the key before, and the size."""
        version, after = 0, b""
        if request.page_token:
            kind = f"{_USERS_PAGE}:{request.segment_id}"
            payload = self._signer.verify(kind, request.page_token, "page_token")
            version, after = int.from_bytes(payload[:8], "big"), payload[8:]
        return version, after, _page_size(request.page_size, 1_000, 10_000)

    def users_page_token(self, segment: Segment, after: bytes) -> str:
        """Returns the token of the members behind a key, by the same version of the filter."""
        payload = segment.version.to_bytes(8, "big") + after
        return self._signer.sign(f"{_USERS_PAGE}:{segment.segment_id}", payload)


def segment_id(value: str, field: str = "segment_id") -> str:
    """Returns the id of a segment unchanged; raises InvalidInput for one that none can have."""
    if not SEGMENT_ID.fullmatch(value):
        raise invalid(field, f"must match {SEGMENT_ID.pattern}.")
    return value


def version_wanted(version: int) -> int:
    """Returns the version asked for; 0 is the newest."""
    if version < 0:
        raise invalid("version", f"is {version}; send 1 or more, or 0 for the newest.")
    return version


def revision(etag: str) -> int | None:
    """Returns the revision that an etag stands for; None for an empty one, -1 for one that never was."""
    if not etag:
        return None
    return int(etag) if etag.isascii() and etag.isdigit() and len(etag) < 19 else -1


def _check_texts(segment: segment_pb2.Segment) -> None:
    for name, most in (("display_name", MAX_DISPLAY_NAME), ("description", MAX_DESCRIPTION)):
        text: str = getattr(segment, name)
        if len(text) > most or "\0" in text:
            raise invalid(f"segment.{name}", f"must have at most {most} characters, and no NUL.")


def _page_size(page_size: int, default: int, most: int) -> int:
    if page_size < 0:
        raise invalid("page_size", f"is {page_size}; send 0 for {default}, or 1 to {most}.")
    return min(page_size or default, most)
