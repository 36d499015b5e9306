"""Walks through the handshake: options in every order that libnbd can send.

Arguments: the URI of a writable disk, and of a read-only export of the same disk.
"""

import errno
import sys

import nbd

disk_uri, read_only_uri = sys.argv[1:3]
NAMES = ["disk", "read-only"]


def negotiating():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(disk_uri)
    assert h.aio_is_negotiating()
    return h


def fails(call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        return error
    raise AssertionError(f"{call.__name__}{args} was accepted")


# List and info, in any number and order; an unknown export is an error and no more.
h = negotiating()
for _ in range(3):
    listed = []
    assert h.opt_list(lambda name, description: listed.append(name) or 0) == len(NAMES)
    assert sorted(listed) == NAMES
    for name in NAMES:
        h.set_export_name(name)
        h.opt_info()
        assert h.get_size() > 0 and h.is_read_only() == (name == "read-only")
    h.set_export_name("nobody")
    assert fails(h.opt_info).errnum == errno.ENOENT
    assert fails(h.opt_go).errnum == errno.ENOENT
    assert h.aio_is_negotiating()
h.set_export_name("disk")
h.opt_go()
assert h.pread(512, 0) is not None
h.shutdown()

# Contexts: by name, by namespace, all, and none that exists.
h = negotiating()
for queries, expected in [
    (["base:allocation"], ["base:allocation"]),
    (["base:"], ["base:allocation"]),
    ([], ["base:allocation"]),
    (["base:nothing", "other:thing"], []),
]:
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    found = []
    h.opt_list_meta_context(lambda name: found.append(name) or 0)
    assert found == expected, (queries, found)
h.clear_meta_contexts()
h.add_meta_context("base:allocation")
h.opt_go()
assert h.can_meta_context("base:allocation")
h.shutdown()

# Leaving before an export is chosen.
h = negotiating()
h.opt_abort()
assert h.aio_is_closed()

# The oldest way in, EXPORT_NAME, with and without its zeroes; an unknown name there ends the connection.
for flags in [0, nbd.HANDSHAKE_FLAG_NO_ZEROES]:
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.connect_uri(disk_uri)
    assert h.get_protocol() == "newstyle" and not h.get_structured_replies_negotiated()
    h.pwrite(b"plain", 77)
    assert h.pread(5, 77) == b"plain"
    h.shutdown()
h = nbd.NBD()
h.set_handshake_flags(0)
fails(h.connect_uri, disk_uri.replace("/disk", "/nobody", 1))

# TLS is refused where it is demanded, and done without where it is not.
if nbd.NBD().supports_tls():
    h = nbd.NBD()
    h.set_tls(nbd.TLS_REQUIRE)
    fails(h.connect_uri, disk_uri)
    h = nbd.NBD()
    h.set_tls(nbd.TLS_ALLOW)
    h.connect_uri(disk_uri)
    assert not h.get_tls_negotiated()
    h.shutdown()

# Full information.
h = nbd.NBD()
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri(read_only_uri)
h.opt_go()
assert h.get_canonical_export_name() == "read-only"
h.shutdown()
