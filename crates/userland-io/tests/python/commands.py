"""Sends every command that libnbd knows, with each of its flags, and reads back what it did.

Arguments: the URI of a writable disk, and of a read-only export of the same disk.
"""

import sys

import nbd

disk_uri, read_only_uri = sys.argv[1:3]
ZERO = nbd.STATE_HOLE | nbd.STATE_ZERO


def connect(uri, structured=True, block_size=True):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_request_block_size(block_size)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == structured
    return h


def status(h, length, offset, flags=0):
    runs = []

    def extent(context, at, entries, error):
        assert context == nbd.CONTEXT_BASE_ALLOCATION and at == offset and error.value == 0
        runs.extend(zip(entries[0::2], entries[1::2]))
        return 0

    h.block_status(length, offset, extent, flags)
    return runs


def everything(h):
    size = h.get_size()

    # Writes, plain and durable; over the odd end of the disk too.
    for offset, length, flags in [
        (0, 1, 0),
        (511, 1026, 0),
        (1 << 20, 3 << 20, nbd.CMD_FLAG_FUA),
        (size - 700, 700, 0),
    ]:
        data = bytes((offset + i * 7) % 251 for i in range(length))
        h.pwrite(data, offset, flags)
        assert h.pread(length, offset) == data
    h.flush()

    # Zeroes: space given back, kept, and only if that is fast.
    for flags in [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA]:
        h.pwrite(b"x" * 70000, 1 << 20)
        h.zero(69000, (1 << 20) + 500, flags)
        expected = b"x" * 500 + bytes(69000) + b"x" * 500
        assert h.pread(70000, 1 << 20) == expected, flags
    h.zero(65536, 2 << 20, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(65536, 2 << 20) == bytes(65536)

    # Trim, plain and durable.
    for flags in [0, nbd.CMD_FLAG_FUA]:
        h.pwrite(b"y" * 65536, 4 << 20)
        h.trim(65536, 4 << 20, flags)
        assert h.pread(65536, 4 << 20) == bytes(65536)

    h.cache(1 << 20, 0)
    h.flush()


def many_at_once(h):
    block = 8192
    writes = [h.aio_pwrite(bytes([i + 1]) * block, i * block) for i in range(64)]
    finish(h, writes)
    buffers = [nbd.Buffer(block) for _ in writes]
    finish(h, [h.aio_pread(buffer, i * block) for i, buffer in enumerate(buffers)])
    for i, buffer in enumerate(buffers):
        assert buffer.to_bytearray() == bytes([i + 1]) * block
    # Large ones beside small ones, mutations beside reads elsewhere.
    large = nbd.Buffer.from_bytearray(bytearray(b"L" * (8 << 20)))
    small = [nbd.Buffer(512) for _ in range(32)]
    cookies = [h.aio_pwrite(large, 8 << 20)]
    cookies += [h.aio_pread(buffer, i * block) for i, buffer in enumerate(small)]
    cookies += [h.aio_flush(), h.aio_zero(4096, 20 << 20), h.aio_trim(4096, 21 << 20), h.aio_cache(4096, 0)]
    finish(h, cookies)
    for i, buffer in enumerate(small):
        assert buffer.to_bytearray() == bytes([i + 1]) * 512
    assert h.pread(8 << 20, 8 << 20) == b"L" * (8 << 20)


def finish(h, cookies):
    waiting = set(cookies)
    while waiting:
        waiting = {cookie for cookie in waiting if not h.aio_command_completed(cookie)}
        if waiting:
            h.poll(-1)


def structured_reads(h):
    # A hole of 1 MiB with an island of data in it.
    h.trim(1 << 20, 16 << 20)
    h.pwrite(b"d" * 65536, (16 << 20) + 131072)
    chunks = []

    def chunk(data, offset, kind, error):
        assert error.value == 0
        chunks.append((offset, len(data), kind))
        return 0

    expected = bytes(131072) + b"d" * 65536 + bytes(131072)
    length = len(expected)
    assert h.pread_structured(length, 16 << 20, chunk) == expected
    assert sum(length for _, length, _ in chunks) == length
    assert [kind for _, _, kind in sorted(chunks)] == [nbd.READ_HOLE, nbd.READ_DATA, nbd.READ_HOLE], chunks

    # DF: all in one piece, or not at all.
    chunks.clear()
    assert h.pread_structured(length, 16 << 20, chunk, nbd.CMD_FLAG_DF) == expected
    assert len(chunks) == 1, chunks


def block_status(h):
    h.trim(1 << 20, 16 << 20)
    h.pwrite(b"d" * 65536, (16 << 20) + 131072)
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    runs = status(h, 327680, 16 << 20)
    assert runs[:2] == [(131072, ZERO), (65536, 0)] and runs[2][1] == ZERO, runs
    one = status(h, 327680, 16 << 20, nbd.CMD_FLAG_REQ_ONE)
    assert one == [(131072, ZERO)], one


for structured in [True, False]:
    for block_size in [True, False]:
        h = connect(disk_uri, structured, block_size)
        assert not h.is_read_only() and not h.is_rotational()
        for can in [h.can_flush, h.can_fua, h.can_trim, h.can_zero, h.can_fast_zero, h.can_cache, h.can_multi_conn]:
            assert can(), can.__name__
        assert h.can_df() == structured
        assert h.get_block_size(nbd.SIZE_MINIMUM) in ([1] if block_size else [0, 1])
        everything(h)
        many_at_once(h)
        if structured:
            structured_reads(h)
            block_status(h)
        h.shutdown()

# What one connection wrote, another reads, and its flush covers.
one, other = connect(disk_uri), connect(disk_uri)
one.pwrite(b"from one", 12345)
assert other.pread(8, 12345) == b"from one"
other.flush()
read_only = connect(read_only_uri)
assert read_only.is_read_only() and read_only.get_size() == one.get_size()
assert read_only.pread(8, 12345) == b"from one"
for h in [one, other, read_only]:
    h.shutdown()
