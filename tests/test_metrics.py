"""What a resumed run leaves in TensorBoard's files."""

import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog

from tinymim_jax.metrics import Writer


def events(folder) -> list:
    """Takes all events out of the folder's files: length, checksum, event, checksum."""
    found = []
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
        path.unlink()
    return found


def shown(found) -> dict[int, float]:
    """Values by step: a session's start hides what was recorded before it for its step and later ones."""
    values = {}
    for event in found:
        if event.session_log.status == SessionLog.START:
            values = {step: value for step, value in values.items() if step < event.step}
        for value in event.summary.value:
            values[event.step] = value.simple_value
    return values


def test_the_row_of_the_step_that_is_resumed_from_stays(tmp_path):
    found = []
    for start, value in ((0, 1.0), (2, 10.0)):
        with Writer(tmp_path, start_step=start, active=True) as writer:
            for step in (start + 1, start + 2, start + 3):
                writer.write(step, {"loss": value * step})
        found += events(tmp_path / "tensorboard")
    assert shown(found) == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}
