"""Sends requests that must be refused; after each one the same connection still reads what is there.

Arguments: the URI of a writable disk, and of a read-only export of the same disk.
"""

import errno
import sys

import nbd

disk_uri, read_only_uri = sys.argv[1:3]
MARK = b"still here" * 50


def connect(uri, structured):
    h = nbd.NBD()
    # libnbd would refuse these itself.
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    return h


def refused(h, expected, what, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errnum in expected, f"{what}: {error.errnum} {error.string}"
    else:
        raise AssertionError(f"{what}: accepted")
    assert h.pread(len(MARK), 1000) == MARK, what


def no_extents(*_):
    return 0


with_mark = connect(disk_uri, True)
with_mark.pwrite(MARK, 1000)
with_mark.shutdown()

for structured in [True, False]:
    h = connect(disk_uri, structured)
    size = h.get_size()
    top = (1 << 64) - 512
    outside = [(size, 1), (size - 1, 2), (size + 4096, 512), (1 << 63, 512), (top, 512), (top, 4096)]
    for offset, length in outside:
        # The specification: EINVAL for what reads, ENOSPC for what writes.
        place = f"at {offset:#x}, {length} bytes"
        refused(h, [errno.EINVAL], f"read {place}", h.pread, length, offset)
        refused(h, [errno.ENOSPC], f"write {place}", h.pwrite, b"w" * length, offset)
        refused(h, [errno.ENOSPC], f"zero {place}", h.zero, length, offset)
        refused(h, [errno.EINVAL, errno.ENOSPC], f"trim {place}", h.trim, length, offset)
        refused(h, [errno.EINVAL], f"cache {place}", h.cache, length, offset)
        if structured:
            refused(h, [errno.EINVAL], f"status {place}", h.block_status, length, offset, no_extents)

    # A refused write's payload is read past, a large one too.
    refused(h, [errno.ENOSPC], "large write", h.pwrite, bytes(32 << 20), size - 512)

    # Flags that are not defined, or not for this command.
    bad_flags = [
        ("read", lambda: h.pread(512, 0, 1 << 15)),
        ("read with fast_zero", lambda: h.pread(512, 0, nbd.CMD_FLAG_FAST_ZERO)),
        ("write", lambda: h.pwrite(bytes(512), 0, 1 << 14)),
        ("write with no_hole", lambda: h.pwrite(bytes(512), 0, nbd.CMD_FLAG_NO_HOLE)),
        ("zero", lambda: h.zero(512, 0, 1 << 15)),
        ("trim", lambda: h.trim(512, 0, 1 << 15)),
        ("cache", lambda: h.cache(512, 0, 1 << 15)),
        ("flush", lambda: h.flush(1 << 15)),
    ]
    for what, call in bad_flags:
        refused(h, [errno.EINVAL], f"{what}: undefined flag", call)
    if not structured:
        refused(h, [errno.EINVAL], "DF without structured replies", lambda: h.pread(512, 0, nbd.CMD_FLAG_DF))
        refused(h, [errno.EINVAL], "status without a context", lambda: h.block_status(512, 0, no_extents))
    h.shutdown()

    h = connect(read_only_uri, structured)
    mutations = [
        ("write", lambda: h.pwrite(b"no" * 4096, 1000)),
        ("zero", lambda: h.zero(4096, 0)),
        ("trim", lambda: h.trim(4096, 0)),
    ]
    for what, call in mutations:
        refused(h, [errno.EPERM], f"{what} on a read-only export", call)
    h.shutdown()
