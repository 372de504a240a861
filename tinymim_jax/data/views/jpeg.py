"""Shortens JPEG files (ITU T.81, annex B) so that a decoder stops after the first rows."""

# Frame types that store the rows from top to bottom: baseline and extended sequential, Huffman coded.
_SEQUENTIAL = (0xC0, 0xC1)
_OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"


def first_rows(data: bytes, rows: int) -> bytearray | None:
    """A copy of the file whose header states a smaller height; its first `rows` rows decode to the same pixels.

    The decoder then ignores the rest of the data as "extraneous bytes". Returns None if that saves nothing or is not
    safe: for progressive files, which store the image in several passes, and for files without an end marker, which
    may be damaged.
    """
    frame = _sequential_frame(data)
    if frame is None or _END_OF_IMAGE not in data[-1024:]:
        return None
    position, block_rows = frame
    height = int.from_bytes(data[position : position + 2])
    # One more row of blocks, since chroma upsampling uses it for the last rows that are needed.
    kept = (-(-rows // block_rows) + 1) * block_rows
    if kept >= height:
        return None
    shortened = bytearray(data)
    shortened[position : position + 2] = kept.to_bytes(2)
    return shortened


def _sequential_frame(data: bytes) -> tuple[int, int] | None:
    """Offset of the height in the frame header, and rows per block; None unless a single scan holds the whole image."""
    frame, components = None, -1
    at = 2
    while at + 12 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in _SEQUENTIAL and at + 2 + length < len(data):
            components = data[at + 9]
            samplings = data[at + 11 : at + 11 + 3 * components : 3]
            frame = at + 5, 8 * max((sampling & 15 for sampling in samplings), default=1)
        elif marker in _OTHER_FRAMES:
            return None
        elif marker == _START_OF_SCAN:
            return frame if data[at + 4] == components else None
        at += 2 + length
    return None
