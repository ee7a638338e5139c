"""Pack downloaded VPT recordings (NAME.mp4 + NAME.jsonl, in any folders) into WebDataset shards;
with --index, download them first.

    python -m prepare.shards recordings --out VPT                                            # what is in the folder
    python -m prepare.shards recordings --out VPT --index all_7xx_Apr_6.json --max_files 100 # first what OpenAI's index lists

Writes OUT/shard-%06d.tar of at most --shard_size bytes and OUT/skipped.jsonl (file and reason of
what was left out). A recording is packed if its video is a whole mp4 whose first frame decodes, its
lines are good by the loader's rules (files/vpt.py), and there are as many of them as frames, give
or take five. Run it again after a kill or when more recordings have arrived: what is in OUT already
stays."""

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

from tqdm import tqdm

from checkpoint import write_atomically
from data import READ_ERRORS, Slice, archive_members, files_below
from files.streams import disk_failed, disk_sentence, is_apple_double, member_kind
from files.vpt import (
    ClipReader,
    mp4_times,
    name_warnings,
    parse_ticks,
    read_frames,
    video_rate,
)

# --- download ---


def fetch(url, path, retries, wait):
    """Download url to path by way of path.part, going on where a broken transfer stopped. Returns
    the bytes that came, None for a 404.

    Retries what may pass (no connection, a transfer cut short, 429, 5xx) after wait, 2 wait, 4
    wait... seconds; then raises OSError."""
    part, came = path + ".part", 0
    for attempt in range(retries + 1):
        time.sleep(wait * 2 ** (attempt - 1) if attempt else 0)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                resumed = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(
                    f"bytes {have}-"
                )
                have = have if resumed else 0
                length = reply.headers.get("Content-Length")
                with open(part, "ab" if resumed else "wb") as f:
                    shutil.copyfileobj(reply, f, 1 << 20)
                    f.flush()
                    os.fsync(f.fileno())
                    got = f.tell()
            came += got - have
            if length is None or got == have + int(length):
                os.replace(part, path)
                return came
            problem = f"{got} of {have + int(length)} bytes arrived"
        except urllib.error.HTTPError as e:
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


def download(index, folder, jobs, max_files, retries, wait):
    """Fetch the recordings of an index file ({"basedir": url, "relpaths": ["data/6.13/NAME.mp4",
    ...]}) into folder. Returns a Counter."""
    with open(index) as f:
        listing = json.load(f)
    if not isinstance(listing, dict) or not {"basedir", "relpaths"} <= listing.keys():
        raise ValueError(f"{index} is no index file: it should hold basedir and relpaths")

    def one(relpath):
        stem = os.path.normpath(os.path.splitext(relpath)[0])
        if stem.startswith(("..", "/")):
            raise ValueError(f"{index} lists {relpath}, which lies outside its folder")
        os.makedirs(os.path.dirname(os.path.join(folder, stem)), exist_ok=True)
        came = 0
        for extension in (
            ".jsonl",
            ".mp4",
        ):  # the small one first: without it the video is of no use
            path = os.path.join(folder, stem) + extension
            if not os.path.exists(path):
                new = fetch(
                    listing["basedir"].rstrip("/") + "/" + urllib.parse.quote(stem + extension),
                    path,
                    retries,
                    wait,
                )
                if new is None:
                    return "missing", 0
                came += new
        return ("new" if came else "there"), came

    counts, broken = collections.Counter(), []
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        tasks = [pool.submit(one, relpath) for relpath in listing["relpaths"][:max_files]]
        with tqdm(total=len(tasks), unit="recording", desc="download") as bar:
            for task in concurrent.futures.as_completed(tasks):
                try:
                    outcome, came = task.result()
                except OSError as e:
                    outcome, came = "broken", 0
                    broken.append(str(e))
                counts.update({outcome: 1, "bytes": came})
                bar.set_postfix_str(
                    f"{counts['bytes'] / 2**20:.0f} MiB, {counts['missing']} missing"
                )
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    recordings = len(listing["relpaths"][:max_files])
    print(
        f"index       {recordings:7d} recordings: {counts['new']} fetched"
        f" ({counts['bytes'] / 2**20:.1f} MiB), {counts['there']} were there, {counts['missing']}"
        " missing on the server (404)"
    )
    if broken:
        more = "run again to go on, or without --index to pack what has come"
        raise OSError(f"{len(broken)} downloads broke off, such as {broken[0]}; {more}")
    return counts


# --- pack ---


def key_of(stem):
    """The WebDataset key of a recording: a function of its path below IN_DIR alone, so that it
    stays when others are added.

    A key ends at its first dot, so `6.10_a` and `6.13_b` would be one; what is not safe becomes _,
    and a checksum keeps the keys apart."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", stem.replace("/", "-"))
    return safe if safe == stem else f"{safe}-{zlib.crc32(stem.encode()):08x}"


def path_of(folder, stem, kind):
    """The file of a recording below folder, STEM.mp4 or STEM.MP4."""
    exact = os.path.join(folder, f"{stem}.{kind}")
    capitals = os.path.join(folder, f"{stem}.{kind.upper()}")
    for path in (exact, capitals):
        if os.path.lexists(path):
            return path
    parent, name = os.path.split(exact)
    before = os.path.splitext(name)[0]
    for other in sorted(os.listdir(parent)):
        if member_kind(other) == (before, kind):
            return os.path.join(parent, other)
    return exact


def check(folder, stem, extensions):
    """Why a recording cannot be packed, or "" if it can; its seconds; {name that nobody knows:
    lines}."""
    for extension in ("mp4", "jsonl"):
        if extension not in extensions:
            return f"no .{extension} beside it", 0, {}
    try:
        with open(path_of(folder, stem, "jsonl"), "rb") as f:
            ticks = parse_ticks(f.read())
        if ticks.flaw:
            return f"jsonl: {ticks.flaw}", 0, {}
        video = path_of(folder, stem, "mp4")
        with Slice(video, 0, os.path.getsize(video)) as f:
            times = mp4_times(f)
            if not len(times):
                return "the video has no frames", 0, {}
            read_frames(f, times, [0], 64)
            ClipReader().frames_per_line(ticks, len(times), video_rate(f, times))
    except READ_ERRORS as e:
        if disk_failed(e):  # says nothing about the recording
            raise OSError(disk_sentence(os.path.join(folder, stem), e)) from e
        return " ".join(str(e).split()), 0, {}
    return "", len(ticks.motion) / ticks.rate, ticks.unknown


def packed_already(out):
    """{key: {extension: size}} of the finished shards, and the number of the next shard. ValueError
    for a shard that this program did not write: what is in it has other keys, and would be packed a
    second time."""
    found, following = collections.defaultdict(dict), 0
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "shard-*.tar"))):
        foreign = f"{path} was not written by prepare.shards"
        remedy = "give another --out, or move it away"
        number = re.fullmatch(r"shard-(\d+)\.tar", os.path.basename(path))
        if number is None:
            raise ValueError(f"{foreign}, which numbers its shards: {remedy}")
        following = int(number[1]) + 1
        try:
            for member, _ in archive_members(path, os.path.getsize(path)):
                name = re.fullmatch(r"([A-Za-z0-9_-]+)\.(mp4|jsonl)", member.name)
                if name is None or not member.isreg() or member.issparse():
                    raise ValueError(f"{foreign} (it holds {member.name}): {remedy}")
                found[name[1]][name[2]] = member.size
        except tarfile.TarError as e:
            raise ValueError(f"{path} is damaged ({e}): {remedy}") from e
    return found, following


def find_recordings(folder, known):
    """{path below folder without extension: {extension: size}} of the recordings, and [{"file",
    "reason"}] of files that cannot be looked at. Links are followed, but every folder and every
    video is taken once, under its own name rather than a link's; under one whose key is `known` if
    there is one."""
    found, odd, videos = collections.defaultdict(dict), [], {}
    for path in files_below(folder):
        add_file(path, folder, found, odd, videos)

    def preference(stem):
        whole = "jsonl" in found[stem]
        return key_of(stem) not in known, not whole, os.path.islink(path_of(folder, stem, "mp4"))

    for stems in videos.values():
        stems.sort(key=preference)
        for stem in stems[1:]:
            del found[stem]
            odd.append({"file": stem + ".mp4", "reason": f"the same file as {stems[0]}.mp4"})
    return found, odd


def add_file(path, folder, found, odd, videos):
    """One file of find_recordings; videos: {what identifies a file: [the recordings it is in]}."""
    name = os.path.relpath(path, folder)
    stem, kind = member_kind(name)
    if kind not in ("mp4", "jsonl"):
        return
    if not os.path.exists(path):
        odd.append({"file": name, "reason": "a link to nothing"})
        return
    if os.path.basename(path).startswith("._"):
        with open(path, "rb") as f:
            if is_apple_double(path, f.read(4)):
                return
    if os.path.basename(path) != os.path.basename(path_of(folder, stem, kind)):
        odd.append({"file": name, "reason": f"{stem}.{kind} is there too, in other capitals"})
        return
    about = os.stat(path)
    found[stem][kind] = about.st_size
    if kind == "mp4" and about.st_ino:
        same = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        videos.setdefault(same, []).append(stem)


def write_shard(path, folder, recordings, bar):
    """Write recordings [(key, stem, sizes)] as one tar; the same recordings give the same bytes."""

    def write(f):
        with tarfile.open(fileobj=f, mode="w") as tar:
            for key, stem, _ in recordings:
                for extension in ("mp4", "jsonl"):
                    source = path_of(folder, stem, extension)
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = os.path.getsize(source)
                    with open(source, "rb") as data:
                        tar.addfile(member, data)
                    bar.update(member.size)

    write_atomically(path, write)


def pack(folder, out, shard_size, jobs):
    """Pack every good recording below folder that no shard of out holds. Returns the number packed,
    [{"file", "reason"}, ...] left out."""
    done, number = packed_already(out)
    found, odd = find_recordings(folder, done)
    if not found:
        raise FileNotFoundError(f"no .mp4 or .jsonl below {folder}; --index downloads some")
    os.makedirs(out, exist_ok=True)
    for rest in glob.glob(os.path.join(glob.escape(out), "*.tmp")):  # of a run that was killed
        os.unlink(rest)
    keys, todo, before = {}, [], 0
    for stem in sorted(found):
        key = key_of(stem)
        if keys.setdefault(key, stem) != stem:
            raise ValueError(f"{keys[key]} and {stem} both give the key {key}: rename one")
        if key not in done:
            todo.append(stem)
        elif done[key] == found[stem]:
            before += 1
        else:
            raise ValueError(
                f"{out} holds another recording as {key} than {os.path.join(folder, stem)}: give"
                " another --out"
            )

    skipped, batch, filled, packed, seconds, first = odd, [], 0, 0, 0, number
    unknown = collections.Counter()
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    total = sum(sum(found[stem].values()) for stem in todo)
    try:
        checks = [pool.submit(check, folder, stem, found[stem]) for stem in todo]
        with tqdm(total=total, unit="B", unit_scale=True, desc="pack") as bar:
            for i, stem in enumerate(todo):
                reason, length, names = checks[i].result()
                unknown.update(names)
                size = sum(
                    1024 + s for s in found[stem].values()
                )  # a header and padding for each member
                if reason:
                    kind = "mp4" if "mp4" in found[stem] else "jsonl"
                    file = os.path.relpath(path_of(folder, stem, kind), folder)
                    skipped.append({"file": file, "reason": reason})
                    bar.update(sum(found[stem].values()))
                    continue
                if batch and filled + size > shard_size:
                    write_shard(os.path.join(out, f"shard-{number:06d}.tar"), folder, batch, bar)
                    number, batch, filled = number + 1, [], 0
                batch.append((key_of(stem), stem, found[stem]))
                packed, seconds, filled = packed + 1, seconds + length, filled + size
            if batch:
                write_shard(os.path.join(out, f"shard-{number:06d}.tar"), folder, batch, bar)
                number += 1
    finally:
        pool.shutdown(cancel_futures=True)
    write_atomically(
        os.path.join(out, "skipped.jsonl"), "".join(json.dumps(s) + "\n" for s in skipped).encode()
    )

    kinds = collections.Counter(re.sub(r"\d+", "#", s["reason"]) for s in skipped)
    print(f"found       {len(found):7d} recordings below {folder}")
    print(
        f"packed      {packed:7d} now ({seconds / 3600:.2f} hours), in {number - first} shards;"
        f" {before} were packed before"
    )
    print(
        f"left out    {len(skipped):7d}"
        + (f", see {os.path.join(out, 'skipped.jsonl')}" if skipped else "")
    )
    for kind, n in kinds.most_common(8):
        print(f"            {n:7d} {kind}")
    for line in name_warnings(unknown):
        print(f"WARNING: {line}")
    return packed, skipped


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "in_dir",
        metavar="IN_DIR",
        help="folder of recordings, searched recursively; --index downloads into it",
    )
    parser.add_argument("--out", default="VPT", help="folder of the shards")
    parser.add_argument(
        "--shard_size",
        type=float,
        default=1e9,
        help="bytes a shard may hold (one recording at least)",
    )
    parser.add_argument("--jobs", type=int, default=8, help="downloads, and checks, at a time")
    parser.add_argument(
        "--index", help='file {"basedir": url, "relpaths": [...]} that says what to download'
    )
    parser.add_argument("--max_files", type=int, help="take only that many recordings of the index")
    parser.add_argument(
        "--retries", type=int, default=5, help="further attempts at a download that broke off"
    )
    parser.add_argument(
        "--retry_wait",
        type=float,
        default=1.0,
        help="seconds before the first of them; doubled each time",
    )
    args = parser.parse_args()

    # --- run ---
    try:
        if args.index:
            download(
                args.index, args.in_dir, args.jobs, args.max_files, args.retries, args.retry_wait
            )
        pack(args.in_dir, args.out, args.shard_size, args.jobs)
    except (OSError, ValueError) as e:
        sys.exit(str(e))
