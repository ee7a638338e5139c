"""What a VPT recording is: JSONL lines -> ticks -> (action, state) of a step, mp4 -> frames, and
both -> a clip.

A *tick* is one line of a recording (1/20 s in VPT). Line t goes with frame t; its effect is visible
in frame t+1. A *step* is what the predictor sees at once; `ends[t]` is the last frame step t shows.
Action t sums every tick from ends[t] until ends[t+1], state t is taken at ends[t]. Angles are
radians, yaw to the right and pitch downwards are positive, mouse motion is in pixels of a 1280x720
window."""

import io
import math
import os
import struct
import zlib
from typing import NamedTuple

import av
import numpy as np
import orjson
import torch
from av.sidedata.sidedata import Type as SideData

CONTINUOUS = ["mouse_dx", "mouse_dy", "yaw_diff", "pitch_diff"]
UNITS = ["pixels", "pixels", "radians", "radians"]
HOTBAR = [f"key.{n}" for n in range(1, 10)]
MOVES = [f"key.{n}" for n in ["w", "a", "s", "d", "space", "q", "f", "e", "escape", "left.shift"]]
BUTTONS = ["mouse.0", "mouse.1", "mouse.2"]
SLOTS = [f"slot.{n}" for n in range(1, 10)]
ACTION_SPACES = {
    13: CONTINUOUS + HOTBAR,  # the guides' reduced space
    36: (
        CONTINUOUS + HOTBAR + MOVES + ["key.left.control"] + BUTTONS + SLOTS
    ),  # VPT's 20 keys, 3 buttons, 9 slots
    38: (
        CONTINUOUS
        + HOTBAR
        + MOVES
        + ["key.right.shift", "key.left.control"]
        + BUTTONS
        + SLOTS
        + ["gui_open"]
    ),  # the guides' table
}
BITS = (
    HOTBAR + MOVES + ["key.left.control", "key.right.shift"] + BUTTONS + ["gui_open"]
)  # bit i of Ticks.keys
KEY_BIT = {
    "key.keyboard." + name[4:]: 1 << i for i, name in enumerate(BITS) if name.startswith("key.")
}
BUTTON_BIT = {
    n: 1 << BITS.index(f"mouse.{n}") for n in range(3)
}  # ids above 2 occur in real files and are ignored
GUI = 1 << BITS.index("gui_open")
DEGREES_PER_PIXEL = 0.15  # 360/2400, VPT's CAMERA_SCALER


def wrap(angle):
    """Radians to (-pi, pi]."""
    return np.pi - (np.pi - angle) % (2 * np.pi)


# --- lines to ticks ---


class Ticks(NamedTuple):
    """The lines of one recording: motion (n, 4) float64 = dx, dy in pixels and yaw, pitch in
    radians (absolute); keys (n,) uint32 bit set in the order of BITS; hotbar (n,) uint8 slot 0..8;
    rate in Hz; flaw: why the tail was dropped, or ''."""

    motion: np.ndarray
    keys: np.ndarray
    hotbar: np.ndarray
    rate: float
    flaw: str


def _line(line):
    """One JSONL line as a dict; what follows "inventory" is most of the bytes and says nothing
    about actions."""
    cut = line.find(b', "inventory"')
    if cut > 0 and line.endswith(b"}"):  # a torn line does not
        try:
            d = orjson.loads(line[:cut] + b"}")
            if {
                "mouse",
                "isGuiOpen",
                "pitch",
            } <= d.keys():  # else the fields stand in another order
                return d
        except orjson.JSONDecodeError:
            pass  # the words stood inside something else: the whole line decides
    return orjson.loads(line)


def parse_ticks(data):
    """The JSONL bytes of a recording -> Ticks, for contractor lines (yaw, pitch in degrees) and the
    guides' (camera in radians).

    Known flaws of real recordings: attack stuck from line 0 is released, null mouse or keyboard is
    no input, a bad line (torn, NaN, no angle) drops the rest of the recording and is named in
    `flaw`, since lines after it can no longer be trusted to match their frames. Raises ValueError
    when not one line is good, or when camera is clearly not in radians."""
    motion, keys, hotbar, times, flaw = [], [], [], [], ""
    stuck = False
    for i, line in enumerate(data.splitlines()):
        try:
            d = _line(line)
            mouse, keyboard = d.get("mouse") or {}, d.get("keyboard") or {}
            yaw, pitch = (d["yaw"], d["pitch"]) if "yaw" in d else d.get("camera")
            row = (
                float(mouse.get("dx") or 0),
                float(mouse.get("dy") or 0),
                float(yaw),
                float(pitch),
            )
            new, held = mouse.get("newButtons") or (), mouse.get("buttons") or ()
            bits = GUI if d.get("isGuiOpen") else 0
            for name in keyboard.get("keys") or ():
                bits |= KEY_BIT.get(name, 0)
            stuck = (stuck and 0 not in new) if i else new == [0]
            for button in held:
                if not (stuck and button == 0):
                    bits |= BUTTON_BIT.get(button, 0)
            slot = d.get("hotbar", 0)
            if not (math.isfinite(sum(row)) and 0 <= slot <= 8):
                raise ValueError(f"motion {row} or hotbar slot {slot} is out of range")
            times.append(float(d["timestamp"]) if "timestamp" in d else None)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
        ) as e:  # orjson.JSONDecodeError is a ValueError
            reason = (
                f"no {e}"
                if isinstance(e, KeyError)
                else "no yaw or camera"
                if "unpack" in str(e)
                else str(e)
            )
            flaw = f"line {i}: {reason}"
            break
        degrees = "yaw" in d
        motion.append(row)
        keys.append(bits)
        hotbar.append(slot)
    if not motion:
        raise ValueError(f"no usable line ({flaw or 'the file is empty'})")
    motion = np.array(motion, dtype=np.float64)
    if degrees:
        motion[:, 2:] = np.radians(motion[:, 2:])
    elif (largest := np.abs(motion[:, 2:]).max()) > 2 * np.pi + 1e-3:
        raise ValueError(
            f"camera reaches {largest:.1f}, which is no angle in radians; write yaw and pitch in"
            " degrees instead"
        )
    rate = 20.0
    if len(times) > 1 and None not in times:
        rate = 1.0 / max(float(np.median(np.diff(times))), 1e-6)
    hotbar = np.array(hotbar, dtype=np.uint8)
    keys = np.array(keys, dtype=np.uint32)
    changed = (
        np.flatnonzero(np.diff(hotbar)) + 1
    )  # the wheel leaves no key in the recording: inject the one that does the same
    keys[changed] |= np.uint32(1) << hotbar[changed].astype(np.uint32)
    return Ticks(motion, keys, hotbar, rate, flaw)


# --- ticks to steps ---


def step_size(rate, fps):
    """Ticks between two sampled frames. Raises ValueError when fps does not divide the line rate
    (within 2 %)."""
    stride = round(rate / fps)
    if stride < 1 or abs(rate / fps - stride) > 0.02 * stride:
        raise ValueError(
            f"--fps {fps:g} does not divide the recording's {rate:g} lines a second; take"
            f" {rate / max(stride, 1):g}"
        )
    return stride


def step_actions(ticks, ends, action_space=13):
    """Ticks, ends (T,) increasing tick numbers -> actions (T-1, A) unscaled float64, states (T, 2):
    yaw relative to ends[0], pitch.

    Continuous: sums of dx, dy over the ticks ends[t]..ends[t+1]-1, wrapped difference of yaw,
    difference of pitch. Keys and buttons: held on any of those ticks. Hotbar slot: at the first of
    them."""
    ends = np.asarray(ends)
    inside = ends[:-1] - ends[0]
    names = ACTION_SPACES[action_space]
    actions = np.zeros((len(ends) - 1, len(names)))
    if len(inside):
        angles = ticks.motion[ends, 2:]
        actions[:, 0:2] = np.add.reduceat(ticks.motion[ends[0] : ends[-1], :2], inside)
        actions[:, 2] = wrap(np.diff(angles[:, 0]))
        actions[:, 3] = np.diff(angles[:, 1])
        held = np.bitwise_or.reduceat(ticks.keys[ends[0] : ends[-1]], inside)
        bits = [i for i, name in enumerate(names) if name in BITS]
        shift = np.array([BITS.index(names[i]) for i in bits], dtype=np.uint32)
        actions[:, bits] = (held[:, None] >> shift) & 1
        if SLOTS[0] in names:
            actions[np.arange(len(inside)), names.index(SLOTS[0]) + ticks.hotbar[ends[:-1]]] = 1
    yaw = ticks.motion[ends, 2]
    states = np.stack([wrap(yaw - yaw[0]), ticks.motion[ends, 3]], axis=1)
    return actions, states


def flip_actions(actions, states, action_space):
    """Mirror left and right: mouse_dx, yaw_diff and yaw change sign, a and d change places. Returns
    new arrays."""
    names = ACTION_SPACES[action_space]
    actions, states = actions.copy(), states.copy()
    actions[:, [0, 2]] *= -1
    states[:, 0] = wrap(-states[:, 0])
    if "key.a" in names:
        a, d = names.index("key.a"), names.index("key.d")
        actions[:, [a, d]] = actions[:, [d, a]]
    return actions, states


# --- frames ---


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


# --- decord ---

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


# --- one clip ---


class ClipReader:
    """Cuts clips out of recordings; the same object serves indexed and streamed shards.

    The clip is a dict: video (frames_per_clip, 3, crop, crop) uint8, actions (T-1, A) float32
    (scaled if there is a scaler), states (T, 2) float32, key. T = frames_per_clip /
    frames_per_step. encode says which frame a step ends on (DESIGN: tubelet its last, else its
    first). gui="drop" leaves out clips with an open GUI. Augmentations are off at their defaults:
    horizontal_flip mirrors half of the clips, actions too; random_resize_scale is the smallest crop
    as a share of the short side; motion_shift moves the crop over the clip by up to that share of
    it; temporal_jitter moves each sampled frame by up to that many ticks; action_noise is a std in
    scaled units."""

    def __init__(
        self,
        frames_per_clip=16,
        fps=5.0,
        frames_per_step=2,
        crop_size=256,
        action_space=13,
        scaler=None,
        encode="tubelet",
        decoder="pyav",
        gui="keep",
        horizontal_flip=False,
        random_resize_scale=1.0,
        motion_shift=0.0,
        temporal_jitter=0,
        action_noise=0.0,
    ):
        if frames_per_clip % frames_per_step or frames_per_clip < 2 * frames_per_step:
            raise ValueError(
                f"--frames_per_clip {frames_per_clip} is not two or more steps of --frames_per_step"
                f" {frames_per_step}"
            )
        if action_space not in ACTION_SPACES:
            raise ValueError(f"--action_space {action_space} is not one of {list(ACTION_SPACES)}")
        self.frames, self.fps, self.frames_per_step = frames_per_clip, fps, frames_per_step
        self.crop, self.action_space = crop_size, action_space
        self.scaler, self.encode, self.decoder, self.gui, self.flip = (
            scaler,
            encode,
            decoder,
            gui,
            horizontal_flip,
        )
        self.resize, self.shift, self.jitter, self.noise = (
            random_resize_scale,
            motion_shift,
            temporal_jitter,
            action_noise,
        )

    def starts(self, ticks, frames):
        """Number of ticks at which a clip can start. Raises ValueError if the recording is too
        short, or lines and frames disagree."""
        ratio = self.frames_per_line(ticks, frames)
        lines = len(ticks.motion)
        flaw = f" ({ticks.flaw})" if ticks.flaw else ""
        if abs(lines - frames / ratio) > 5 and not (
            flaw and ticks.rate > 15
        ):  # at 20 Hz a line is a frame, however many are lost
            raise ValueError(
                f"{lines} lines{flaw} but {frames} frames: which line goes with which frame is"
                " unknown"
            )
        n = min(lines, frames // ratio) - step_size(ticks.rate, self.fps) * (self.frames - 1)
        if n < 1:
            raise ValueError(
                f"too short: {lines} usable lines{flaw} and {frames} frames, a clip needs"
                f" {lines - n + 1}"
            )
        return n

    def frames_per_line(self, ticks, frames):
        """1 in VPT, and where the video runs at the line rate; more for lines that are fewer than
        the frames of a 20 fps video."""
        ratio, lines = max(round(20 / ticks.rate), 1), len(ticks.motion)
        return ratio if abs(lines * ratio - frames) < abs(lines - frames) else 1

    def __call__(self, f, times, ticks, start, rng, key):
        """A clip from tick `start` of a recording, or None if --gui drop leaves it out. rng is used
        by the augmentations only."""
        stride = step_size(ticks.rate, self.fps)
        sampled = start + stride * np.arange(self.frames)
        if self.jitter:
            order = np.arange(
                self.frames
            )  # each frame stays after the one before, inside the recording
            last = (
                min(len(ticks.motion), len(times) // self.frames_per_line(ticks, len(times)))
                - self.frames
            )
            sampled = sampled + rng.integers(-self.jitter, self.jitter + 1, self.frames)
            sampled = np.clip(np.maximum.accumulate(sampled - order), 0, last) + order
        shown = sampled.reshape(-1, self.frames_per_step)
        ends = shown[:, -1] if self.encode == "tubelet" else shown[:, 0]
        if self.gui == "drop" and (ticks.keys[sampled[0] : sampled[-1] + 1] & GUI).any():
            return None
        actions, states = step_actions(ticks, ends, self.action_space)
        scale = rng.uniform(self.resize, 1.0) if self.resize < 1 else 1.0
        short = round(self.crop / scale * (1 + self.shift))
        video = read_frames(
            f, times, sampled * self.frames_per_line(ticks, len(times)), short, self.decoder
        )
        room = np.array([video.shape[1] - self.crop, video.shape[2] - self.crop])
        corner = room / 2 if scale == 1 and not self.shift else rng.uniform(0, 1, 2) * room
        end = (
            np.clip(corner + rng.uniform(-1, 1, 2) * self.shift * self.crop, 0, room)
            if self.shift
            else corner
        )
        corners = np.floor(
            corner + np.linspace(0, 1, self.frames)[:, None] * (end - corner)
        ).astype(int)
        video = np.stack(
            [v[y : y + self.crop, x : x + self.crop] for v, (y, x) in zip(video, corners)]
        )
        if self.flip and rng.random() < 0.5:
            video = video[:, :, ::-1]
            actions, states = flip_actions(actions, states, self.action_space)
        if self.scaler is not None:
            actions = self.scaler.transform(actions)
        if self.noise:
            actions[:, :4] += self.noise * rng.standard_normal(actions[:, :4].shape)
        return {
            "video": torch.from_numpy(np.ascontiguousarray(video.transpose(0, 3, 1, 2))),
            "actions": torch.from_numpy(actions.astype(np.float32)),
            "states": torch.from_numpy(states.astype(np.float32)),
            "key": key,
        }
