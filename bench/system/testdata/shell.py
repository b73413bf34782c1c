# A walk through the protocol with libnbd. Arguments: URI, size. The volume is all zeros at the start.
import errno
import os
import random
import sys
import time

import nbd

uri, size = sys.argv[1], int(sys.argv[2])
MiB = 1 << 20


def connect(**attributes):
    h = nbd.NBD()
    for name, value in attributes.items():
        getattr(h, "set_" + name)(value)
    for context in "base:allocation", "x-ramshelf:dirty", "x-ramshelf:resident":
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h


def fails(want, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == want, (call, args, e)
    else:
        raise AssertionError((call, args, "did not fail"))


def extents(h, context, length, offset, flags=0):
    found = []

    def collect(name, off, entries, err):
        if name == context:
            found.extend(zip(entries[::2], entries[1::2]))

    h.block_status(length, offset, collect, flags)
    return found


h = connect()
h.set_strict_mode(0)  # so that wrong requests reach the server
assert h.get_size() == size
assert h.get_structured_replies_negotiated()
for context in "base:allocation", "x-ramshelf:dirty", "x-ramshelf:resident":
    assert h.can_meta_context(context), context

# Odd offsets and lengths, against a model.
random.seed(1)
span = 1 * MiB
model = bytearray(span)
base = 3 * MiB + 4096 * 7
for _ in range(2000):
    off = random.randrange(span)
    n = min(random.choice([1, 3, 511, 512, 513, 4095, 4096, 4097, 70000]), span - off)
    what = random.randrange(6)
    if what <= 2:
        data = os.urandom(n)
        h.pwrite(data, base + off, nbd.CMD_FLAG_FUA if random.random() < 0.02 else 0)
        model[off:off + n] = data
    elif what == 3:
        h.zero(n, base + off, random.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        model[off:off + n] = bytes(n)
    elif what == 4:
        flags = random.choice([0, nbd.CMD_FLAG_DF])
        assert h.pread(n, base + off, flags) == model[off:off + n], (off, n)
    else:
        h.cache(n, base + off)
assert h.pread(span, base) == model
assert h.pread(1, base - 1) == b"\0" and h.pread(1, base + span) == b"\0"
print("model ok")

# Structured replies: the chunks cover the read exactly once, holes come as holes, DF gives one chunk.
def chunks(length, offset, flags=0):
    got = []
    buf = h.pread_structured(length, offset, lambda b, off, status, err: got.append((off, len(b), status)), flags)
    at = offset
    for off, n, status in sorted(got):
        assert off == at, (off, at)
        at += n
    assert at == offset + length
    return buf, got


h.zero(2 * MiB, 64 * MiB)
h.zero(MiB, 200 * MiB)
h.pwrite(b"a" * 65536, 64 * MiB)
h.pwrite(b"b" * 65536, 65 * MiB)
buf, got = chunks(2 * MiB, 64 * MiB)
assert buf == b"a" * 65536 + bytes(MiB - 65536) + b"b" * 65536 + bytes(MiB - 65536)
assert any(status == nbd.READ_HOLE for _, _, status in got), got
buf, got = chunks(65536 + 4096, 64 * MiB + 100, nbd.CMD_FLAG_DF)
assert len(got) == 1, got
buf, got = chunks(65536, 200 * MiB)
assert buf == bytes(65536) and [s for _, _, s in got] == [nbd.READ_HOLE], got
print("structured ok")

# Trim and zero of huge lengths are extents: no time per block.
h.pwrite(os.urandom(MiB), 512 * MiB)
begin = time.monotonic()
huge = min(size - MiB, (1 << 32) - 4096) // 4096 * 4096
for _ in range(50):
    h.zero(huge, MiB)
    h.trim(huge, MiB)
took = time.monotonic() - begin
print("100 zeroings of %d MiB: %.3f s" % (huge // MiB, took))
assert took < 20, took
assert h.pread(MiB, 512 * MiB) == bytes(MiB)
assert h.pread(span, base) == bytes(span)
for _ in range(20):
    h.zero(huge, MiB, nbd.CMD_FLAG_FAST_ZERO)
h.zero(size % (1 << 31) or (1 << 31), 0, nbd.CMD_FLAG_NO_HOLE)
print("zero ok")

# Zeroing at odd edges leaves the neighbours alone.
h.pwrite(b"x" * 3 * 4096, 32 * MiB)
h.zero(4096 + 2, 32 * MiB + 4095)
assert h.pread(3 * 4096, 32 * MiB) == b"x" * 4095 + bytes(4098) + b"x" * 4095
h.pwrite(b"y" * 10, 32 * MiB + 4090)
assert h.pread(12, 32 * MiB + 4089) == b"x" + b"y" * 10 + b"\0"

# Block status: dirty and resident follow writes, base:allocation tells holes, REQ_ONE gives one extent.
h.flush()
h.pwrite(b"z" * 8192, 128 * MiB)
e = extents(h, "base:allocation", 3 * 8192, 128 * MiB)
assert e[0] == (8192, 0) and e[1][1] == 3, e
e = extents(h, "x-ramshelf:resident", 8192, 128 * MiB)
assert e[0][1] & 1 and e[0][0] >= 8192, e
e = extents(h, "base:allocation", 3 * 8192, 128 * MiB, nbd.CMD_FLAG_REQ_ONE)
assert len(e) == 1 and e[0][0] <= 3 * 8192, e
e = extents(h, "base:allocation", 1 << 31, size // 2)
assert sum(n for n, _ in e[:-1]) < 1 << 31, e
for context in "x-ramshelf:dirty", "x-ramshelf:resident":
    assert extents(h, context, (1 << 32) - 4096, MiB)
print("block status ok")

# Errors, and the connection stays in step.
fails(errno.ENOSPC, h.pwrite, b"q" * 512, size - 511)
fails(errno.EINVAL, h.pread, 512, size - 511)
fails(errno.EINVAL, h.trim, 4096, size)
fails(errno.ENOSPC, h.zero, 4096, size - 1)
fails(errno.EINVAL, h.pwrite, b"q", 0, 1 << 15)
fails(errno.EINVAL, h.pread, 1, (1 << 64) - 1)
h.pwrite(b"end", size - 3)
assert h.pread(4, size - 4) == b"\0end"
print("errors ok")

# Many requests in flight, answered in any order.
cookies = []
buffers = [nbd.Buffer(4096) for _ in range(256)]
for i in range(256):
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * 4096), 256 * MiB + i * 4096))
while cookies:
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
    if cookies:
        h.poll(-1)
for i, b in enumerate(buffers):
    cookies.append(h.aio_pread(b, 256 * MiB + i * 4096))
while cookies:
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
    if cookies:
        h.poll(-1)
for i, b in enumerate(buffers):
    assert b.to_bytearray() == bytearray([i]) * 4096, i

# A second connection sees what the first was told, also without structured replies.
other = connect(request_structured_replies=False)
assert not other.get_structured_replies_negotiated()
assert other.pread(4096, 256 * MiB + 5 * 4096) == b"\x05" * 4096
fails(errno.EINVAL, other.pread, 1, size)
other.shutdown()
h.flush()
h.shutdown()
print("done")
