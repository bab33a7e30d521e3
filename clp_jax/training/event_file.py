"""TensorBoard event files, written without TensorFlow.

`clu.metric_writers` imports TensorFlow and TensorBoard as soon as it is imported (clu 0.0.12), which costs seconds and
half a gigabyte in every training process; TensorBoard's own writer reaches for TensorFlow's file system too. Scalars need
none of that: an event is three protocol buffer fields, framed with two checksums.

Record: ``uint64 length, masked crc32c(length), data, masked crc32c(data)`` (tensorflow/core/lib/io/record_writer.h).
Event: ``1 double wall_time, 2 int64 step, 3 string file_version, 5 Summary, 7 SessionLog`` (tensorflow/core/util/event.proto).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFileWriter:
    """Appends scalars to a new event file of a directory.

    Args:
        directory: is made where it is missing.
        purge_step: TensorBoard forgets what earlier files of the directory say from this step on.
    """

    def __init__(self, directory: Path, purge_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self.path = directory / f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by `close`
        self._write(_event(now, 0, _bytes_field(3, b"brain.Event:2")))
        started = _varint_field(1, 1)  # SessionLog.status = START
        self._write(_event(now, purge_step, _bytes_field(7, started)))
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Writes one event.

        Args:
            step: at least 0.
            values: by tag.
            wall_time: seconds since the epoch.
        """
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, tag.encode()) + _key(2, 5) + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._write(_event(wall_time, step, _bytes_field(5, summary)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(b"".join([length, _masked_crc32c(length), data, _masked_crc32c(data)]))


def _event(wall_time: float, step: int, what: bytes) -> bytes:
    return _key(1, 1) + struct.pack("<d", wall_time) + _varint_field(2, step) + what


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint_field(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # The Castagnoli polynomial, bits reversed.
        table.append(byte)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc32c(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
