"""Videos: frame times from an mp4's index, and frames by number, by PyAV or decord."""

import io
import os
import struct
import zlib

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData


def mp4_times(f):
    """A seekable mp4 -> (frames,) int64 presentation times in stream units, in display order: from
    its index, or from every packet if the index does not tell (fragments, edit lists that cut
    frames out).

    Also the guard against truncated files: the top-level boxes must hold moov and mdat and end
    where the file ends (ISO 14496-12)."""

    def boxes(span):
        at, end, out = *span, {}
        while at < end:
            f.seek(at)
            head = f.read(16)
            size, kind, wide = struct.unpack(">I4sQ", head.ljust(16, b"\0"))
            start, size = (16, wide) if size == 1 else (8, size or end - at)
            if size < start or at + size > end:
                raise ValueError(
                    f"the mp4 is truncated or damaged: box {kind} at byte {at} claims {size} bytes"
                    f" of {end - at}"
                )
            out.setdefault(kind, []).append((at + start, at + size))
            at += size
        return out

    def child(span, *path):
        for kind in path:
            span = boxes(span)[kind][0]
        return span

    def table(span, v0, v1=None):  # a full box: version, flags, row count, rows
        f.seek(span[0])
        version, count = struct.unpack(">B3xI", f.read(8))
        dtype = np.dtype(v1 if version and v1 else v0)
        return np.frombuffer(f.read(min(count * dtype.itemsize, span[1] - f.tell())), dtype)

    def spread(rows):  # (count, value) -> a value per frame
        if rows["f0"].sum() > end:
            raise ValueError(
                "the mp4's index is damaged: it claims more frames than the file has bytes"
            )
        return np.repeat(rows["f1"], rows["f0"]).astype(np.int64)

    def timescale(span):
        f.seek(span[0])
        head = f.read(24)
        return struct.unpack(">I", head[20:24] if head[0] else head[12:16])[0]

    end = f.seek(0, os.SEEK_END)
    if not end:
        raise ValueError("the video has zero bytes")
    top = boxes((0, end))
    if not {b"moov", b"mdat"} <= top.keys():
        raise ValueError("not a whole mp4 (no moov and mdat boxes)")
    moov = boxes(top[b"moov"][0])
    try:
        for track in moov.get(b"trak", []):
            f.seek(child(track, b"mdia", b"hdlr")[0] + 8)
            if f.read(4) != b"vide":
                continue
            stbl = boxes(child(track, b"mdia", b"minf", b"stbl"))
            steps = spread(table(stbl[b"stts"][0], ">u4,>u4"))
            times = np.cumsum(steps) - steps
            if b"ctts" in stbl:  # display minus decode time
                times += spread(table(stbl[b"ctts"][0], ">u4,>i4"))[: len(times)]
            if b"moof" in top or not len(times):
                return packet_times(f)
            if b"edts" in boxes(
                track
            ):  # usually takes off the delay that B-frames cause, and nothing else
                edits = table(child(track, b"edts", b"elst"), ">u4,>i4,>i4", ">u8,>i8,>i4")
                duration, start, _ = edits[0].tolist()
                shown = (
                    duration
                    * timescale(child(track, b"mdia", b"mdhd"))
                    / timescale(moov[b"mvhd"][0])
                )
                if len(edits) > 1 or times.min() != start or times.max() >= start + shown:
                    return packet_times(f)
                times -= start
            return np.sort(times)
    except (KeyError, struct.error, IndexError, ZeroDivisionError) as e:
        raise ValueError(f"the mp4's index is damaged ({e!r})") from e
    raise ValueError("the mp4 has no video track")


def packet_times(f):
    """Presentation times of the frames that a decoder will show, by reading every packet."""
    f.seek(0)
    with av.open(f) as container:
        return np.sort(
            np.array(
                [p.pts for p in container.demux(video=0) if p.pts is not None and not p.is_discard],
                dtype=np.int64,
            )
        )


def fitting(width, height, short_side):
    """(width, height) with that short side, of the same shape."""
    scale = short_side / min(width, height)
    return max(round(width * scale), short_side), max(round(height * scale), short_side)


def upright(frame, short_side):
    """A decoded frame as players show it -> (H, W, 3) uint8, resized with antialias: turned and
    mirrored as the file says (phones, cameras mounted upside down). Pixels that are not square stay
    as they are stored."""
    width, height = fitting(frame.width, frame.height, short_side)
    picture = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")

    # x, y of a stored pixel are shown at (a x + c y, b x + d y)
    (a, b), (c, d) = display_matrix(frame)
    if not (a or d) and b and c:
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    elif b or c or not (a and d):
        raise ValueError("it is to be shown at an angle that is no multiple of 90 degrees")
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return picture


def display_matrix(frame):
    """The 2 x 2 part that turns and mirrors; what rounding left of an angle of 90 degrees is 0."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return np.eye(2)
    matrix = np.frombuffer(bytes(data), dtype=np.int32).reshape(3, 3)[:2, :2] / 65536
    return np.where(np.abs(matrix) < 1e-3, 0.0, matrix)


class WrongDecoder(ValueError):
    """decord would give other pictures of this recording than PyAV. That says nothing against the
    recording: to leave it out would be another run."""


def read_frames(f, times, wanted, short_side, decoder="pyav"):
    """Frames by number in display order (never by time x fps) -> (len(wanted), H, W, 3) uint8, the
    short side resized with antialias.

    f: seekable file; times: from mp4_times or packet_times; wanted: increasing frame numbers.
    Raises ValueError or av.FFmpegError; WrongDecoder where decord must not be used."""
    wanted = [int(i) for i in wanted]
    if decoder == "decord":
        return read_with_decord(f, times, wanted, short_side)
    pictures = {}
    missing = set(wanted)
    back = 0
    f.seek(0)
    with av.open(f) as container:
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
                    pictures[number] = upright(frame, short_side)
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
    """(number, frame) from the key frame at or before frame `first` on, whole pictures only.

    Recovery points of intra refresh are called key frames too. What a decoder shows after one may
    be torn for a long time, whatever it promises, so that nothing is yielded after them. From frame
    0 on everything is: there is no earlier place to start at."""
    try:
        container.seek(int(times[first]), stream=stream, backward=True, any_frame=False)
    except av.error.PermissionError:  # no key frame before it
        if first:
            return
        container.seek(int(times[0]), stream=stream, backward=True, any_frame=True)
    whole = not first
    start = None
    for packet in container.demux(stream):
        if start is None:
            start = packet.pts
        for frame in packet.decode():
            number = len(times) if frame.pts is None else int(np.searchsorted(times, frame.pts))
            if number >= len(times) or times[number] != frame.pts:
                raise ValueError(f"frame time {frame.pts} is not in the mp4's index")
            if not whole:
                intra = frame.pict_type == av.video.frame.PictureType.I
                whole = intra and (frame.key_frame or frame.pts == start)
            if whole:
                yield number, frame
            elif start is None or frame.pts >= start:
                return


proven = {}  # (bytes, CRC-32) of videos that were compared with PyAV -> their places to start at


def read_with_decord(f, times, wanted, short_side):
    """read_frames by decord, which counts frames in its own way: WrongDecoder where that is not the
    index's. The first frames of a video that are read are compared with PyAV's."""
    try:
        import decord
    except ImportError as e:
        raise RuntimeError("--decoder decord needs: pip install decord2") from e
    f.seek(0)
    raw = f.read()
    video = len(raw), zlib.crc32(raw)
    starts = proven.get(video) or decord_starts(raw, times)
    with av.open(io.BytesIO(raw)) as container:
        stream = container.streams.video[0]
        width, height = fitting(stream.width, stream.height, short_side)
    try:
        reader = decord.VideoReader(io.BytesIO(raw), width=width, height=height, num_threads=1)
        count = len(reader)
        if count == len(times):
            pictures = decord_frames(reader, wanted, starts)
    except (decord.DECORDError, IndexError, RuntimeError, AssertionError) as e:
        read_frames(f, times, wanted, short_side)  # raises if the recording is what is damaged
        text = str(e).partition("\n")[0]
        raise WrongDecoder(f"decord cannot read what PyAV can ({text}): use --decoder pyav") from e
    if count != len(times):
        raise WrongDecoder(
            f"decord counts {count} frames, the mp4's index has {len(times)}: use --decoder pyav"
        )
    if pictures.shape[1:] != (height, width, 3):
        raise WrongDecoder(
            f"decord makes pictures of {pictures.shape[1:]} in place of {width} x {height} pixels:"
            " use --decoder pyav"
        )
    if video not in proven:
        difference = largest_difference(pictures, read_frames(f, times, wanted, short_side))
        if difference > 6:
            raise WrongDecoder(
                f"decord shows other pictures than PyAV, which differ by {difference:.0f} of 255:"
                " use --decoder pyav"
            )
        if len(proven) == 100_000:
            proven.clear()
        proven[video] = starts
    return pictures


def decord_frames(reader, wanted, starts):
    """Frames by number. decord would seek to any key frame; where decoding cannot start at all of
    them, it reads on from the last place where it can."""
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
    """The mean difference of the two pictures that differ most, over blocks of 8 pixels: inside
    them two ways to resize may differ."""
    size = min(8, *pictures.shape[1:3])
    rows, columns = (n // size for n in pictures.shape[1:3])
    means = []
    for x in (pictures, others):
        x = x[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size, 3)
        means.append(x.mean((2, 4)))
    return np.abs(means[0] - means[1]).mean((1, 2, 3)).max()


def decord_starts(raw, times):
    """Numbers of the frames of an mp4 at which decord can start: key frames that depend on nothing
    before them, with no later packet that is shown earlier. WrongDecoder where it would choose,
    count or show other frames than the index says."""

    def refused(reason):
        return WrongDecoder(f"decord would show wrong pictures, since {reason}: use --decoder pyav")

    with av.open(io.BytesIO(raw)) as container:
        tracks = len(container.streams.video)
        if tracks > 1:
            raise refused(f"the file has {tracks} video tracks, of which it may choose another")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise ValueError("its codec is unknown")
        packets = [p for p in container.demux(stream) if p.size]
        if any(p.is_discard for p in packets):
            raise refused("the edit list hides frames")
        unknown = len(times)
        shown = [unknown if p.pts is None else int(np.searchsorted(times, p.pts)) for p in packets]
        if sorted(shown) != list(range(len(times))):
            raise refused("the frames of the file are not those of its index")

        # The packets before a place to start at are those of the frames shown before it.
        starts = []
        codec, extra = context.name, bytes(context.extradata or b"")
        latest = np.maximum.accumulate([-1, *shown])
        for i, p in enumerate(packets):
            closed = shown[i] == i and latest[i] < i
            if p.is_keyframe and closed and (not i or starts_anew(bytes(p), codec, extra)):
                starts.append(i)
        if not starts or starts[0]:
            raise refused("its first frame is no key frame")

        context.flush_buffers()
        frame = next((x for p in packets for x in p.decode()), None)
        if frame is not None and not np.array_equal(display_matrix(frame), np.eye(2)):
            raise refused("the file asks for its pictures to be turned")
    return starts


def starts_anew(packet, codec, extra):
    """Whether decoding can start at a packet: in H.264 only an IDR picture is sure to depend on
    nothing before it, in HEVC a random access picture (ISO 14496-15: units with their sizes)."""
    if codec not in ("h264", "hevc") or not extra.startswith(b"\1"):
        return codec not in ("h264", "hevc")
    width = 1 + (extra[4 if codec == "h264" else 21] & 3)
    at = 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        head = packet[at + width]
        if codec == "h264" and 1 <= head & 31 <= 5:
            return head & 31 == 5
        if codec == "hevc" and (head >> 1 & 63) < 32:
            return 16 <= (head >> 1 & 63) <= 21
        at += width + size
    return False


def video_rate(f, times):
    """Frames a second of an open video by its own clock; None of fewer than two frames. times: from
    mp4_times."""
    if len(times) < 2:
        return None
    f.seek(0)
    with av.open(f) as container:
        unit = container.streams.video[0].time_base
    interval = steady_interval(np.arange(len(times)), times)
    return float(1 / (interval * unit)) if interval and unit else None


def steady_interval(at, times):
    """Mean time from one number of `at` to the next, without pauses: what takes more than 2.5 times
    as long as most, and clocks that are set back. Rounding makes a step half or twice as long, no
    more. 0.0 if time never goes on."""
    lines, seconds = np.diff(at), np.diff(times)
    each = seconds / lines
    forward = each > 0
    if not forward.any():
        return 0.0
    steady = forward & (each <= 2.5 * np.median(each[forward]))
    return seconds[steady].sum() / lines[steady].sum()
