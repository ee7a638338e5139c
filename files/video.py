"""Videos: frame times from an mp4's index, and frames by number, by PyAV or decord.

PyAV is imported by the functions that need it, because much else that imports this file does not:
actions, states and features are read without a single frame."""

import contextlib
import functools
import io
import itertools
import os
import struct
import zlib

import numpy as np

# --- frame times ---


def mp4_times(f):
    """A seekable mp4 -> (frames,) int64 presentation times in stream units, in display order. They
    come from its index, or from every packet if the index does not tell (fragments, edit lists that
    cut frames out).

    Raises ValueError for files that are cut short or damaged: the boxes of the top level must
    include moov and mdat and end where the file ends (ISO 14496-12)."""
    size = f.seek(0, os.SEEK_END)
    if not size:
        raise ValueError("the video has zero bytes")
    top = boxes(f, (0, size))
    if not {b"moov", b"mdat"} <= top.keys():
        raise ValueError("not a whole mp4 (no moov and mdat boxes)")
    moov = boxes(f, top[b"moov"][0])
    try:
        for track in moov.get(b"trak", []):
            if not is_video(f, track):
                continue
            times = display_times(f, size, track)
            if b"moof" in top or not len(times):
                return packet_times(f)
            start = edit_start(f, moov, track, times)
            if start is None:
                return packet_times(f)
            return np.sort(times - start)
    except (KeyError, struct.error, IndexError, ZeroDivisionError) as e:
        raise ValueError(f"the mp4's index is damaged ({e!r})") from e
    raise ValueError("the mp4 has no video track")


def boxes(f, span):
    """The boxes of an mp4 that lie in a span of bytes (first, end) -> {kind: spans of their
    contents}."""
    position, end = span
    spans = {}
    while position < end:
        # a box starts with its size and kind; size 1: a wide size follows, 0: up to the end
        f.seek(position)
        head = f.read(16).ljust(16, b"\0")
        size, kind, wide_size = struct.unpack(">I4sQ", head)
        head_size = 8
        if size == 1:
            head_size = 16
            size = wide_size
        elif size == 0:
            size = end - position
        if size < head_size or position + size > end:
            raise ValueError(
                f"the mp4 is truncated or damaged: box {kind} at byte {position} claims"
                f" {size} bytes of {end - position}"
            )
        spans.setdefault(kind, []).append((position + head_size, position + size))
        position += size
    return spans


def child(f, span, *path):
    """The span of the first box at a path of kinds, inside a span."""
    for kind in path:
        span = boxes(f, span)[kind][0]
    return span


def table(f, span, dtype, wide_dtype=None):
    """The rows of a full box: version, flags, number of rows, rows. wide_dtype: of version 1."""
    f.seek(span[0])
    version, count = struct.unpack(">B3xI", f.read(8))
    dtype = np.dtype(wide_dtype if version and wide_dtype else dtype)
    return np.frombuffer(f.read(min(count * dtype.itemsize, span[1] - f.tell())), dtype)


def value_per_frame(rows, size):
    """Rows (count, value) -> the value of every frame. size: bytes of the file."""
    if rows["f0"].sum() > size:
        raise ValueError(
            "the mp4's index is damaged: it claims more frames than the file has bytes"
        )
    return np.repeat(rows["f1"], rows["f0"]).astype(np.int64)


def is_video(f, track):
    f.seek(child(f, track, b"mdia", b"hdlr")[0] + 8)
    return f.read(4) == b"vide"


def display_times(f, size, track):
    """Times of the frames of a track in the order of decoding, before its edit list applies."""
    stbl = boxes(f, child(f, track, b"mdia", b"minf", b"stbl"))
    durations = value_per_frame(table(f, stbl[b"stts"][0], ">u4,>u4"), size)
    times = np.cumsum(durations) - durations
    if b"ctts" in stbl:  # display minus decode time
        delays = value_per_frame(table(f, stbl[b"ctts"][0], ">u4,>i4"), size)
        times += delays[: len(times)]
    return times


def edit_start(f, moov, track, times):
    """The time that a track's edit list makes 0. Usually it takes off the delay that B-frames cause
    and nothing else; None if it does more."""
    if b"edts" not in boxes(f, track):
        return 0
    edits = table(f, child(f, track, b"edts", b"elst"), ">u4,>i4,>i4", ">u8,>i8,>i4")
    duration, start, _ = edits[0].tolist()
    ticks_a_second = timescale(f, child(f, track, b"mdia", b"mdhd"))
    shown = duration * ticks_a_second / timescale(f, moov[b"mvhd"][0])
    if len(edits) > 1 or times.min() != start or times.max() >= start + shown:
        return None
    return start


def timescale(f, span):
    """Ticks a second, of an mvhd or mdhd box."""
    f.seek(span[0])
    head = f.read(24)
    wide = head[0]
    return struct.unpack(">I", head[20:24] if wide else head[12:16])[0]


def memory_is_short():
    """Whether this process cannot have another 256 MB."""
    try:
        return not bytearray(1 << 28)
    except MemoryError:
        return True


@contextlib.contextmanager
def open_video(file):
    """av.open for reading. What FFmpeg finds wrong with the file is a ValueError, whatever kind of
    error PyAV makes of it, so callers need not know PyAV. Errors of the disk pass as they are."""
    import av

    try:
        # a playlist or session description opens no connection, and titles in an old encoding are
        # no fault of the video
        options = {"protocol_whitelist": "file"}
        with av.open(file, options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as e:
        # "out of memory" may also be a wrong length in a damaged file
        if isinstance(e, MemoryError) and memory_is_short():
            raise MemoryError(str(e)) from e
        raise ValueError(f"FFmpeg says: {e}") from e


def packet_times(f):
    """Presentation times of the frames that a decoder will show, by reading every packet."""
    f.seek(0)
    times = []
    with open_video(f) as container:
        is_vp8 = container.streams.video[0].name == "vp8"
        for packet in container.demux(video=0):
            hidden = packet.is_discard or (is_vp8 and packet.size and not packet_is_shown(packet))
            if packet.pts is not None and not hidden:
                times.append(packet.pts)
    return np.sort(np.array(times, dtype=np.int64))


def packet_is_shown(packet):
    """Whether a packet of VP8 is a picture, and not one that only others refer to (RFC 6386,
    9.1)."""
    return bool(memoryview(packet)[0] & 16)


# the kinds of box with which an mp4 or QuickTime file may begin
MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")


def film_times(f):
    """A seekable video in any container -> ((frames,) int64 presentation times in stream units,
    increasing, seconds of a unit). From an mp4's index; else from every packet of the file.

    Raises ValueError for what is no video that can be decoded by time."""
    f.seek(0)
    head = f.read(8)
    times = None
    if head[4:8] in MP4_STARTS:
        times = mp4_times(f)
    f.seek(0)
    with open_video(f) as container:
        if not container.streams.video:
            raise ValueError("no video track in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        unit = stream.time_base
        if not unit:
            raise ValueError("its clock has no unit: write it again as mp4, with ffmpeg")
        if container.format.name == "avi":
            check_avi(container, stream)
    if times is None:
        times = packet_times(f)
    if not len(times):
        raise ValueError("no frame of it has a time stamp: write it again as mp4, with ffmpeg")
    return np.unique(times), float(unit)


def check_avi(container, stream):
    """An AVI has no times of display. Of H.264 with B-frames FFmpeg takes those of decoding, and
    frames would be in the wrong order (ValueError). Decodes the first 64 packets."""
    times = []
    with contextlib.closing(container.demux(stream)) as packets:
        for packet in itertools.islice(packets, 64):
            times += [frame.pts for frame in packet.decode()]
    if None in times or times != sorted(times):
        raise ValueError(
            "an AVI does not say in which order its frames are shown: write it again as mp4, with"
            " ffmpeg"
        )


def video_rate(f, times):
    """Frames a second of an open video by its own clock; None with fewer than two frames. times:
    from mp4_times."""
    if len(times) < 2:
        return None
    f.seek(0)
    with open_video(f) as container:
        unit = container.streams.video[0].time_base
    interval = steady_interval(np.arange(len(times)), times)
    return float(1 / (interval * unit)) if interval and unit else None


def steady_interval(numbers, times):
    """Mean time from one frame or line to the next. numbers: which they are, increasing.

    Pauses do not count: what takes more than 2.5 times as long as most. Clocks that are set back do
    not count either. Rounding makes a step half or twice as long, no more. 0.0 if time never
    advances."""
    steps = np.diff(numbers)
    seconds = np.diff(times)
    each = seconds / steps
    forward = each > 0
    if not forward.any():
        return 0.0
    steady = forward & (each <= 2.5 * np.median(each[forward]))
    return seconds[steady].sum() / steps[steady].sum()


# --- frames, by PyAV ---


def fitting(width, height, short_side):
    """(width, height) with that short side, of the same shape."""
    scale = short_side / min(width, height)
    return max(round(width * scale), short_side), max(round(height * scale), short_side)


@functools.cache
def one_thread():
    """The option that keeps PyAV's resizer to one thread. Before version 17 it has no other."""
    from av.video.reformatter import VideoReformatter

    return {"threads": 1} if "threads" in VideoReformatter.reformat.__doc__ else {}


def upright(frame, short_side, matrix=None):
    """A decoded frame as players show it -> (H, W, 3) uint8, resized with antialias. It is turned
    and mirrored as the file asks (phones, cameras mounted upside down). Pixels that are not square
    stay as they are stored. matrix: display_matrix of a frame of the same file, or None."""
    width, height = fitting(frame.width, frame.height, short_side)

    # One thread: a frame with its side data is a reference cycle, so it is freed some time later,
    # perhaps in a loader process that was forked meanwhile. There threads of the resizer are gone,
    # and freeing it would wait for them for ever.
    picture = frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation="BILINEAR", **one_thread()
    )

    # x, y of a stored pixel are shown at (a x + c y, b x + d y)
    if matrix is None:
        matrix = display_matrix(frame)
    (a, b), (c, d) = matrix
    if not (a or d) and b and c:
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    elif b or c or not (a and d):
        raise ValueError("the file asks to be shown at an angle that is no multiple of 90 degrees")
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return picture


def display_matrix(frame):
    """The 2 x 2 part of a frame's matrix that turns and mirrors. At 90 degrees rounding leaves
    small numbers in it, which become 0."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return np.eye(2)
    matrix = np.frombuffer(bytes(data), dtype=np.int32).reshape(3, 3)[:2, :2] / 65536
    return np.where(np.abs(matrix) < 1e-3, 0.0, matrix)


class WrongDecoder(ValueError):
    """decord would give other pictures of this recording than PyAV. The recording is good: leaving
    it out would change what the run trains on."""


def read_frames(f, times, wanted, short_side, decoder="pyav"):
    """Frames by number in display order (never by time x fps) -> (len(wanted), H, W, 3) uint8, the
    short side resized with antialias.

    f: seekable file; times: from mp4_times or packet_times; wanted: increasing frame numbers.
    Raises ValueError; WrongDecoder where decord must not be used."""
    wanted = [int(i) for i in wanted]
    if decoder == "decord":
        return read_with_decord(f, times, wanted, short_side)
    pictures = {}
    missing = set(wanted)
    matrix = None
    back = 0
    f.seek(0)
    with open_video(f) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        stream.codec_context.thread_count = 1

        # Frames that cannot be decoded from the key frame before them are tried from further back:
        # leading frames of an open GOP, and all that follows a "key frame" of intra refresh.
        while missing:
            first = max(min(missing) - back, 0)
            for number, frame in frames_from(container, stream, times, first):
                if number in missing:
                    if matrix is None:
                        matrix = display_matrix(frame)
                    pictures[number] = upright(frame, short_side, matrix)
                    missing.remove(number)
                if not missing or number > max(missing):
                    break
            if not first:
                break
            back = max(8 * back, 1)
    if missing:
        raise ValueError(f"frames {sorted(missing)[:4]} cannot be decoded")
    return np.stack([pictures[i] for i in wanted])


def frames_from(container, stream, times, first):
    """(number, frame) of the whole pictures from the key frame at or before frame `first` on.

    Recovery points of intra refresh are called key frames too. What a decoder shows after one may
    be torn for a long time, whatever it promises, and nothing is yielded after them. From frame 0
    everything is yielded: there is no earlier place to start at."""
    import av

    try:
        container.seek(int(times[first]), stream=stream, backward=True, any_frame=False)
    except av.error.PermissionError:  # no key frame before it
        if first:
            return
        container.seek(int(times[0]), stream=stream, backward=True, any_frame=True)
    whole = not first
    start = None
    # PyAV loses 150 bytes for each reader that is left in the middle and not closed
    with contextlib.closing(container.demux(stream)) as packets:
        for packet in packets:
            if start is None:
                start = packet.pts
            for frame in packet.decode():
                number = len(times) if frame.pts is None else int(np.searchsorted(times, frame.pts))
                if number >= len(times) or times[number] != frame.pts:
                    raise ValueError(f"frame time {frame.pts} is not in the video's index")
                if not whole:
                    intra = frame.pict_type == av.video.frame.PictureType.I
                    whole = intra and (frame.key_frame or frame.pts == start)
                if whole:
                    yield number, frame
                elif start is None or frame.pts >= start:
                    return


# --- frames, by decord ---

# (bytes, CRC-32) of videos that were compared with PyAV -> the frames that decord can start at
COMPARED = {}


def read_with_decord(f, times, wanted, short_side):
    """read_frames by decord, which counts frames in its own way: WrongDecoder if that is not the
    index's. The first frames that are read of a video are compared with PyAV's."""
    try:
        import decord
    except ImportError as e:
        raise RuntimeError("reading video with decord needs: pip install decord2") from e

    f.seek(0)
    raw = f.read()
    video = len(raw), zlib.crc32(raw)
    starts = COMPARED.get(video) or decord_starts(raw, times)
    with open_video(io.BytesIO(raw)) as container:
        stream = container.streams.video[0]
        width, height = fitting(stream.width, stream.height, short_side)

    # read, and see whether decord's frames are those of the index
    try:
        reader = decord.VideoReader(io.BytesIO(raw), width=width, height=height, num_threads=1)
        count = len(reader)
        if count == len(times):
            pictures = decord_frames(reader, wanted, starts)
    except (decord.DECORDError, IndexError, RuntimeError, AssertionError) as e:
        read_frames(f, times, wanted, short_side)  # raises if the recording itself is damaged
        text = str(e).partition("\n")[0]
        raise WrongDecoder(f"decord cannot read what PyAV can ({text}): read it with pyav") from e
    if count != len(times):
        raise WrongDecoder(
            f"decord counts {count} frames, the mp4's index has {len(times)}: read it with pyav"
        )
    if pictures.shape[1:] != (height, width, 3):
        raise WrongDecoder(
            f"decord makes pictures of {pictures.shape[1:]} in place of {width} x {height} pixels:"
            " read it with pyav"
        )

    # once a video: see whether its pictures are PyAV's
    if video not in COMPARED:
        difference = largest_difference(pictures, read_frames(f, times, wanted, short_side))
        if difference > 6:
            raise WrongDecoder(
                f"decord shows other pictures than PyAV, which differ by {difference:.0f} of 255:"
                " read it with pyav"
            )
        if len(COMPARED) == 100_000:
            COMPARED.clear()
        COMPARED[video] = starts
    return pictures


def decord_frames(reader, wanted, starts):
    """Frames by number. decord would seek to any key frame. If decoding cannot start at all of
    them, this reads forward from the last place where it can."""
    if set(reader.get_key_indices()) <= set(starts):
        return reader.get_batch(wanted).asnumpy()
    following = max(s for s in starts if s <= wanted[0])
    reader.seek(following)
    pictures = {}
    for number in sorted(set(wanted)):
        for _ in range(number - following):  # skip_frames() would seek
            reader.next()
        pictures[number] = reader.next().asnumpy()
        following = number + 1
    return np.stack([pictures[i] for i in wanted])


def largest_difference(pictures, others):
    """The mean difference of the two pictures that differ most, over blocks of 8 pixels: inside a
    block, two ways to resize may differ."""
    size = min(8, *pictures.shape[1:3])
    rows = pictures.shape[1] // size
    columns = pictures.shape[2] // size
    means = []
    for x in (pictures, others):
        x = x[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size, 3)
        means.append(x.mean((2, 4)))
    return np.abs(means[0] - means[1]).mean((1, 2, 3)).max()


def decord_starts(raw, times):
    """Numbers of the frames of an mp4 at which decord can start: key frames that depend on nothing
    before them, with no later packet that is shown earlier. WrongDecoder if it would choose, count
    or show other frames than the index says."""

    def refused(reason):
        return WrongDecoder(f"decord would show wrong pictures, since {reason}: read it with pyav")

    with open_video(io.BytesIO(raw)) as container:
        tracks = len(container.streams.video)
        if tracks > 1:
            raise refused(f"the file has {tracks} video tracks, and it may choose another")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise ValueError("its codec is unknown")

        # every packet must be a frame of the index
        packets = [p for p in container.demux(stream) if p.size]
        if any(p.is_discard for p in packets):
            raise refused("the edit list hides frames")
        numbers = []
        for packet in packets:
            unknown = packet.pts is None
            numbers.append(len(times) if unknown else int(np.searchsorted(times, packet.pts)))
        if sorted(numbers) != list(range(len(times))):
            raise refused("the frames of the file are not those of its index")

        # decoding can start at a packet if exactly the frames shown earlier come before it
        starts = []
        codec = context.name
        extra = bytes(context.extradata or b"")
        latest = -1
        for i, packet in enumerate(packets):
            closed = numbers[i] == i and latest < i
            latest = max(latest, numbers[i])
            if not packet.is_keyframe or not closed:
                continue
            if i == 0 or is_random_access(bytes(packet), codec, extra):
                starts.append(i)
        if not starts or starts[0]:
            raise refused("its first frame is no key frame")

        # decord turns no pictures
        context.flush_buffers()
        frame = next((x for p in packets for x in p.decode()), None)
        if frame is not None and not np.array_equal(display_matrix(frame), np.eye(2)):
            raise refused("the file asks for its pictures to be turned")
    return starts


def is_random_access(packet, codec, extra):
    """Whether decoding can start at a packet. In H.264 only an IDR picture is sure to depend on
    nothing before it, in HEVC a random access picture. A packet is a row of units with their sizes
    (ISO 14496-15); extra: the stream's header, which says how many bytes a size takes."""
    if codec not in ("h264", "hevc") or not extra.startswith(b"\1"):
        return codec not in ("h264", "hevc")
    width = 1 + (extra[4 if codec == "h264" else 21] & 3)
    position = 0
    while position + width < len(packet):
        size = int.from_bytes(packet[position : position + width], "big")
        head = packet[position + width]
        h264_type = head & 31
        hevc_type = head >> 1 & 63
        if codec == "h264" and 1 <= h264_type <= 5:
            return h264_type == 5
        if codec == "hevc" and hevc_type < 32:
            return 16 <= hevc_type <= 21
        position += width + size
    return False
