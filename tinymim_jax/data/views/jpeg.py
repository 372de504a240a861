"""The markers of a JPEG file (ITU T.81, annex B), as far as decoding less than all of it needs them."""

# Frames whose data come in rows from top to bottom: baseline and extended sequential, Huffman coded.
_SEQUENTIAL = (0xC0, 0xC1)
_OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"


def first_rows(data: bytes, rows: int) -> bytearray | None:
    """The same file, but saying that it ends a little after so many rows: those are decoded to the same pixels.

    A decoder then leaves the rest of the data unread, as "extraneous bytes". None where that would save nothing or go
    wrong: progressive files, which hold the picture in several passes, and files without an end, which may be damaged.
    """
    frame = _sequential_frame(data)
    if frame is None or _END_OF_IMAGE not in data[-1024:]:
        return None
    position, block_rows = frame
    height = int.from_bytes(data[position : position + 2])
    # A row of blocks more: its chroma goes into the last rows that are wanted.
    kept = (-(-rows // block_rows) + 1) * block_rows
    if kept >= height:
        return None
    shortened = bytearray(data)
    shortened[position : position + 2] = kept.to_bytes(2)
    return shortened


def _sequential_frame(data: bytes) -> tuple[int, int] | None:
    """Where the frame's height is written, and the rows of its blocks; None unless one scan holds all of it."""
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
