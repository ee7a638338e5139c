"""Packs VPT recordings (NAME.mp4 + NAME.jsonl, in any folders) into WebDataset shards. With --index
it downloads them first.

    # pack what is in the folder
    python -m prepare.shards recordings --out VPT
    # first download what OpenAI's index lists
    python -m prepare.shards recordings --out VPT --index all_7xx_Apr_6.json --max_files 100

Writes OUT/shard-%06d.tar of at most --shard_size bytes, and OUT/skipped.jsonl with the file and the
reason of what was left out. A recording is packed if its video is a whole mp4 whose first frame
decodes, if its lines are good by the loader's rules (files/vpt.py), and if it has as many lines as
frames, up to a difference of five. Run it again after a kill or when more recordings have arrived:
finished shards stay as they are."""

import argparse
import collections
import concurrent.futures
import glob
import http.client
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from typing import NamedTuple

from files.disk import READ_ERRORS, is_storage_error, storage_sentence, write_atomically
from files.progress import tqdm
from files.shards import Slice, archive_members, files_below
from files.streams import is_apple_double, member_kind
from files.video import mp4_times, read_frames, video_rate
from files.vpt import ClipReader, name_warnings, parse_ticks

# --- download ---


def fetch(url, path, retries, wait):
    """Download url to path, by way of path.part: a transfer that broke off continues where it
    stopped. Returns the number of bytes that were transferred, None for a 404.

    Failures that may pass (no connection, a transfer cut short, 429, 5xx) are tried again after
    wait, 2 wait, 4 wait... seconds; then raises OSError."""
    part = path + ".part"
    transferred = 0
    for attempt in range(retries + 1):
        # wait longer after every failure
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))

        # continue where the last attempt stopped
        have = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            before, size, expected = fetch_once(url, part, have)
            transferred += size - before
            # whole: it gets its name only now
            if expected is None or size == expected:
                os.replace(part, path)
                return transferred
            problem = f"{size} of {expected} bytes arrived"
        except urllib.error.HTTPError as e:
            # only what may pass is tried again
            problem = f"HTTP {e.code} {e.reason}"
            if e.code in (404, 410):
                return None
            if e.code == 416 and have:
                os.unlink(part)  # longer than the file is: not a piece of it
            elif e.code < 500 and e.code != 429:
                break
        except (OSError, http.client.HTTPException) as e:
            problem = str(e) or type(e).__name__
    raise OSError(f"{url}: {problem} ({attempt + 1} attempts)")


def fetch_once(url, part, have):
    """One transfer to the file `part`, which has so many bytes. Returns (bytes that were kept,
    bytes that it has now, bytes of the whole file or None)."""
    # a server may ignore the range, and then sends all of it
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        content_range = reply.headers.get("Content-Range", "")
        resumed = reply.status == 206 and content_range.startswith(f"bytes {have}-")
        kept = have if resumed else 0

        # what is counted must be on the disk, whatever happens to the machine
        length = reply.headers.get("Content-Length")
        with open(part, "ab" if resumed else "wb") as f:
            shutil.copyfileobj(reply, f, 1 << 20)
            f.flush()
            os.fsync(f.fileno())
            size = f.tell()
    return kept, size, None if length is None else kept + int(length)


def read_index(index):
    """An index file {"basedir": url, "relpaths": ["data/6.13/NAME.mp4", ...]} -> (basedir,
    relpaths)."""
    with open(index) as f:
        listing = json.load(f)
    if not isinstance(listing, dict) or not {"basedir", "relpaths"} <= listing.keys():
        raise ValueError(f"{index} is no index file: it should contain basedir and relpaths")
    return listing["basedir"], listing["relpaths"]


def download(index, folder, jobs, max_files, retries, wait):
    """Download the recordings of an index file into folder. Returns a Counter of new, there,
    missing and broken ones, and of bytes. Raises OSError if downloads broke off."""
    # the first --max_files of the list
    base_url, relpaths = read_index(index)
    relpaths = relpaths[:max_files]

    def download_one(relpath):
        """(outcome, bytes transferred) of one recording."""
        # an index must not write outside of the folder
        stem = os.path.normpath(os.path.splitext(relpath)[0])
        if stem.startswith(("..", "/")):
            raise ValueError(f"{index} lists {relpath}, which lies outside its folder")
        os.makedirs(os.path.dirname(os.path.join(folder, stem)), exist_ok=True)

        # the lines first, which are small: without them the video is useless
        transferred = 0
        for extension in (".jsonl", ".mp4"):
            path = os.path.join(folder, stem) + extension
            if os.path.exists(path):
                continue
            url = base_url.rstrip("/") + "/" + urllib.parse.quote(stem + extension)
            size = fetch(url, path, retries, wait)
            if size is None:
                return "missing", 0
            transferred += size
        return ("new" if transferred else "there"), transferred

    # several at a time; one that breaks off does not stop the others
    counts = collections.Counter()
    errors = []
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        tasks = [pool.submit(download_one, relpath) for relpath in relpaths]
        with tqdm(total=len(tasks), unit="recording", desc="download") as bar:
            for task in concurrent.futures.as_completed(tasks):
                # a path outside of the folder ends all of it, a broken transfer only itself
                try:
                    outcome, size = task.result()
                except OSError as e:
                    outcome, size = "broken", 0
                    errors.append(str(e))
                counts.update({outcome: 1, "bytes": size})
                mebibytes = counts["bytes"] / 2**20
                bar.set_postfix_str(f"{mebibytes:.0f} MiB, {counts['missing']} missing")
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)

    # the summary
    print(
        f"index       {len(relpaths):7d} recordings: {counts['new']} fetched"
        f" ({counts['bytes'] / 2**20:.1f} MiB), {counts['there']} were there, {counts['missing']}"
        " missing on the server (404)"
    )

    # nothing is packed yet: what is missing would come into later shards
    if errors:
        raise OSError(
            f"{len(errors)} downloads broke off, such as {errors[0]}; run again to continue, or"
            " without --index to pack what has arrived"
        )
    return counts


# --- pack ---


def key_of(stem):
    """The WebDataset key of a recording. It depends only on the recording's path below IN_DIR, and
    so stays the same when others are added.

    A key ends at its first dot: `6.10_a` and `6.13_b` would become one. Characters that are not
    safe become _, and a checksum keeps the keys apart."""
    # the checksum only where something had to change: most keys are readable
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", stem.replace("/", "-"))
    return safe if safe == stem else f"{safe}-{zlib.crc32(stem.encode()):08x}"


def path_of(folder, stem, kind):
    """The file STEM.mp4 of a recording below folder, or STEM.MP4 and the like."""
    # the usual spellings first: listing a folder of thousands of files takes long
    exact = os.path.join(folder, f"{stem}.{kind}")
    capitals = os.path.join(folder, f"{stem}.{kind.upper()}")
    for path in (exact, capitals):
        if os.path.lexists(path):
            return path

    # then any mixture of capitals
    parent, name = os.path.split(exact)
    name = os.path.splitext(name)[0]
    for other in sorted(os.listdir(parent)):
        if member_kind(other) == (name, kind):
            return os.path.join(parent, other)
    return exact


class Check(NamedTuple):
    """What a look at a recording showed."""

    reason: str  # why it cannot be packed, or ""
    seconds: float = 0
    unknown: dict = {}  # {unknown name: lines}


def check(folder, stem, extensions):
    """Read a recording -> Check. Raises OSError if the disk fails, which says nothing about the
    recording."""
    # both files, the lines, then the video and how it fits them
    for extension in ("mp4", "jsonl"):
        if extension not in extensions:
            return Check(f"no .{extension} beside it")
    try:
        with open(path_of(folder, stem, "jsonl"), "rb") as f:
            ticks = parse_ticks(f.read())
        if ticks.flaw:
            return Check(f"jsonl: {ticks.flaw}")

        # one frame is decoded: a file that was cut short fails here
        video = path_of(folder, stem, "mp4")
        with Slice(video, 0, os.path.getsize(video)) as f:
            times = mp4_times(f)
            if not len(times):
                return Check("the video has no frames")
            read_frames(f, times, [0], 64)
            ClipReader().frames_per_line(ticks, len(times), video_rate(f, times))
    except READ_ERRORS as e:
        # a disk that fails is no fault of the recording, which would be left out for good
        if is_storage_error(e):
            raise OSError(storage_sentence(os.path.join(folder, stem), e)) from e
        return Check(" ".join(str(e).split()))
    return Check("", len(ticks.motion) / ticks.rate, ticks.unknown)


def packed_already(out):
    """({key: {extension: size}} of the finished shards, number of the next shard). Raises
    ValueError for a shard that this program did not write: its recordings have other keys, and
    would be packed a second time."""
    packed = collections.defaultdict(dict)
    next_number = 0
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "shard-*.tar"))):
        # our own names only
        foreign = f"{path} was not written by prepare.shards"
        remedy = "give another --out, or move it away"
        number = re.fullmatch(r"shard-(\d+)\.tar", os.path.basename(path))
        if number is None:
            raise ValueError(f"{foreign}, which numbers its shards: {remedy}")
        next_number = int(number[1]) + 1

        # what it contains, by its headers
        try:
            for member, _ in archive_members(path, os.path.getsize(path)):
                name = re.fullmatch(r"([A-Za-z0-9_-]+)\.(mp4|jsonl)", member.name)
                if name is None or not member.isreg() or member.issparse():
                    raise ValueError(f"{foreign} (it holds {member.name}): {remedy}")
                key, extension = name.groups()
                packed[key][extension] = member.size
        except tarfile.TarError as e:
            raise ValueError(f"{path} is damaged ({e}): {remedy}") from e
    return packed, next_number


def find_recordings(folder, packed):
    """({path below folder without extension: {extension: size}} of the recordings, [{"file",
    "reason"}] of files that cannot be looked at).

    Links are followed, but every folder and every video is taken once. If a video has several
    names, the one whose key is in `packed` is taken, else its own name rather than a link's."""
    # every file below the folder
    recordings = collections.defaultdict(dict)
    skipped = []
    videos = {}  # what identifies a file: the recordings that it is in
    for path in files_below(folder):
        add_file(path, folder, recordings, skipped, videos)

    # of several names of one video: one that is packed, one with lines, one that is no link
    def preference(stem):
        has_lines = "jsonl" in recordings[stem]
        is_link = os.path.islink(path_of(folder, stem, "mp4"))
        return key_of(stem) not in packed, not has_lines, is_link

    # one name for each video
    for stems in videos.values():
        stems.sort(key=preference)
        for stem in stems[1:]:
            del recordings[stem]
            skipped.append({"file": stem + ".mp4", "reason": f"the same file as {stems[0]}.mp4"})
    return recordings, skipped


def add_file(path, folder, recordings, skipped, videos):
    """Add one file to the dicts and the list of find_recordings."""
    # only videos and lines count, in any capitals
    name = os.path.relpath(path, folder)
    stem, kind = member_kind(name)
    if kind not in ("mp4", "jsonl"):
        return
    if not os.path.exists(path):
        skipped.append({"file": name, "reason": "a link to nothing"})
        return

    # macOS writes a "._" file beside each file on foreign disks: it holds no recording
    if os.path.basename(path).startswith("._"):
        with open(path, "rb") as f:
            if is_apple_double(path, f.read(4)):
                return

    # on a disk that tells capitals apart, a.mp4 and a.MP4 may both be there
    if os.path.basename(path) != os.path.basename(path_of(folder, stem, kind)):
        reason = f"{stem}.{kind} is there too, in other capitals"
        skipped.append({"file": name, "reason": reason})
        return

    # two names of one file agree in all of this
    about = os.stat(path)
    recordings[stem][kind] = about.st_size
    if kind == "mp4" and about.st_ino:
        identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        videos.setdefault(identity, []).append(stem)


def unpacked_recordings(recordings, packed, folder, out):
    """The recordings that no shard holds yet, sorted. Raises ValueError if two have one key, or if
    a shard holds another recording under the same key."""
    # a key must stand for one recording, here and in the shards
    stems = {}
    unpacked = []
    for stem in sorted(recordings):
        key = key_of(stem)
        if stems.setdefault(key, stem) != stem:
            raise ValueError(f"{stems[key]} and {stem} both give the key {key}: rename one")
        if key not in packed:
            unpacked.append(stem)
        elif packed[key] != recordings[stem]:
            raise ValueError(
                f"{out} holds another recording as {key} than {os.path.join(folder, stem)}: give"
                " another --out"
            )
    return unpacked


def write_shard(path, folder, stems, bar):
    """Write recordings as one tar. The same recordings give the same bytes."""

    def write(f):
        with tarfile.open(fileobj=f, mode="w") as tar:
            for stem in stems:
                for extension in ("mp4", "jsonl"):
                    source = path_of(folder, stem, extension)
                    member = tarfile.TarInfo(f"{key_of(stem)}.{extension}")
                    member.size = os.path.getsize(source)
                    with open(source, "rb") as data:
                        tar.addfile(member, data)
                    bar.update(member.size)

    write_atomically(path, write)


def pack(folder, out, shard_size, jobs):
    """Pack every good recording below folder that no shard of out holds yet. Returns (number
    packed, [{"file", "reason"}, ...] left out)."""
    in_shards, first_number = packed_already(out)
    recordings, skipped = find_recordings(folder, in_shards)
    if not recordings:
        raise FileNotFoundError(f"no .mp4 or .jsonl below {folder}; --index downloads some")

    # only now: a typing error in the folder's name should leave nothing behind
    os.makedirs(out, exist_ok=True)

    # what a run that was killed left behind
    for path in glob.glob(os.path.join(glob.escape(out), "*.tmp")):
        os.unlink(path)
    stems = unpacked_recordings(recordings, in_shards, folder, out)

    # recordings are checked in parallel and packed in order, so a rerun gives the same shards
    packed = 0
    seconds = 0
    unknown = collections.Counter()
    number = first_number  # of the shard that is being filled
    batch = []  # its recordings
    batch_size = 0
    total = sum(sum(recordings[stem].values()) for stem in stems)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="pack")
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        checks = [pool.submit(check, folder, stem, recordings[stem]) for stem in stems]
        with bar:
            for task, stem in zip(checks, stems):
                checked = task.result()
                unknown.update(checked.unknown)
                sizes = recordings[stem]

                # not good: note it, by its video where there is one
                if checked.reason:
                    kind = "mp4" if "mp4" in sizes else "jsonl"
                    file = os.path.relpath(path_of(folder, stem, kind), folder)
                    skipped.append({"file": file, "reason": checked.reason})
                    bar.update(sum(sizes.values()))
                    continue

                # a shard is written when the next recording would make it too large
                size = sum(1024 + s for s in sizes.values())  # with a header and padding for each
                if batch and batch_size + size > shard_size:
                    write_shard(shard_path(out, number), folder, batch, bar)
                    number += 1
                    batch = []
                    batch_size = 0
                batch.append(stem)
                batch_size += size
                packed += 1
                seconds += checked.seconds

            # the last one, which is not full
            if batch:
                write_shard(shard_path(out, number), folder, batch, bar)
                number += 1
    finally:
        pool.shutdown(cancel_futures=True)

    # the summary
    skipped_path = os.path.join(out, "skipped.jsonl")
    write_atomically(skipped_path, "".join(json.dumps(s) + "\n" for s in skipped).encode())
    print(f"found       {len(recordings):7d} recordings below {folder}")
    print(
        f"packed      {packed:7d} now ({seconds / 3600:.2f} hours), in {number - first_number}"
        f" shards; {len(recordings) - len(stems)} were packed before"
    )

    # what was left out, by reason
    see = f", see {skipped_path}" if skipped else ""
    print(f"left out    {len(skipped):7d}{see}")
    reasons = collections.Counter(re.sub(r"\d+", "#", s["reason"]) for s in skipped)
    for reason, count in reasons.most_common(8):
        print(f"            {count:7d} {reason}")
    for line in name_warnings(unknown):
        print(f"WARNING: {line}")
    return packed, skipped


def shard_path(out, number):
    return os.path.join(out, f"shard-{number:06d}.tar")


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("in_dir", metavar="IN_DIR", help="folder of recordings, with its folders")
    parser.add_argument("--out", default="VPT", help="folder of the shards")
    parser.add_argument("--shard_size", type=float, default=1e9, help="bytes of a shard at most")
    parser.add_argument("--jobs", type=int, default=8, help="downloads, and checks, at a time")
    group = parser.add_argument_group("download into IN_DIR first")
    group.add_argument("--index", help='file {"basedir": url, "relpaths": [...]} of what to fetch')
    group.add_argument("--max_files", type=int, help="only that many recordings of the index")
    group.add_argument("--retries", type=int, default=5, help="further attempts of a download")
    group.add_argument("--retry_wait", type=float, default=1.0, help="seconds, doubled each time")
    args = parser.parse_args()

    # --- run ---
    # what goes wrong here is a file, a disk or a network: one sentence, no traceback
    try:
        if args.index:
            attempts = args.retries, args.retry_wait
            download(args.index, args.in_dir, args.jobs, args.max_files, *attempts)
        pack(args.in_dir, args.out, args.shard_size, args.jobs)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
