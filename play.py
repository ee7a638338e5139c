"""Play inside a world model, in a browser: keys and mouse go to the predictor, and what it expects
is shown as pictures.

    python play.py --checkpoint out/demo --decoder out/decoder --data 'demo/features/val/*.tar' \\
        --video 'demo/val/*.tar'

Then open the address that it prints. Reads a run of train_ac.py, train_lewm.py or train_lora.py,
held-out recordings to start from and to compare with, and a run of train_decoder.py. Without a
decoder the nearest recorded frame is the picture. Writes nothing; films are downloaded from the
page. The page is served to this machine alone, unless --host says otherwise."""

import argparse

from evaluation.flags import Help

# names of torch, which is not imported yet
DTYPES = ["float32", "bfloat16", "float16"]


# --- flags ---


def parse_flags():
    """The flags. Ends the program for those that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
    )
    repeated = {"nargs": "+", "action": "append"}

    # which model is played, and what it is shown with
    flag = parser.add_argument_group("run and data").add_argument
    flag("--checkpoint", required=True, help="a run folder, or one of its checkpoints")
    flag("--decoder", help="a run of train_decoder.py (default: the nearest recorded frame)")
    flag("--data", "--data_path", **repeated, help="held-out data (default: the run's)")
    flag("--video", nargs="+", help="shards that features were made from, to show their frames")
    flag("--encoder", help="weights of the encoder, for video (default: what the run used)")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what the run trained in)")

    # how it is played
    flag = parser.add_argument_group("play").add_argument
    flag("--window", type=int, help="steps that the predictor sees (default: as in training)")
    flag("--rate", type=float, help="steps a second (default: those of the run)")
    flag("--clips", type=int, default=256, help="recorded clips to start from and compare with")
    flag("--seed", type=int, default=0, help="seed of the choice of clips")

    # who may play
    flag = parser.add_argument_group("page").add_argument
    flag("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 lets everybody play")
    flag("--port", type=int, default=8000, help="port; 0 takes a free one")
    flag("--clients", type=int, default=8, help="browsers that may play at once")
    flag("--open", action="store_true", help="open the page in a browser")

    # one check, one message
    args = parser.parse_args()
    for name, least in (("clips", 2), ("clients", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least {least}")
    if args.rate is not None and not 0 < args.rate <= 1000:
        parser.error(f"--rate {args.rate:g} is no rate: above 0, at most 1000 steps a second")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is no port: 0 to 65535")
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = parse_flags()

import asyncio
import concurrent.futures
import errno
import functools
import ipaddress
import json
import os
import signal
import socket
import sys
import urllib.parse
import webbrowser

from aiohttp import WSCloseCode, WSMsgType, web

import checkpoint
from evaluation.decoded import Decoder
from evaluation.held_out import precision_text
from evaluation.playing import (
    LONGEST_FILM,
    Player,
    Sliders,
    film_of,
    open_playground,
)
from evaluation.runs import load_run
from files.logs import count_text

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluation", "play.html")

# bytes of a message of the page
LONGEST_MESSAGE = 4096

# the page is one file that loads nothing from anywhere
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src"
    " 'unsafe-inline'; img-src blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri"
    " 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


# --- what the page says and is told ---


def introduction(ground, rate):
    """What a page must know before the first picture, as a dict for JSON."""
    # a start is named by its recording and the time in it
    T = ground.real.z.shape[1]
    starts = []
    for clip in range(len(ground.real.recordings)):
        recording, seconds = ground.real.name_of(clip * T, ground.seconds)
        starts.append({"recording": recording, "seconds": round(seconds, 1)})

    # what the player may do
    controls = ground.new_controls()
    sliders = []
    if isinstance(controls, Sliders):
        units = ground.run.scaler.meta.get("units") or [""] * len(controls.names)
        for name, unit, most in zip(controls.names, units, controls.most):
            sliders.append({"name": name, "unit": unit, "most": most})
    return {
        "type": "hello",
        "run": os.path.dirname(ground.run.path) or ".",
        "seconds": ground.seconds,
        "rate": rate,
        "window": ground.window,
        "decoded": ground.decoder is not None,
        "frames": bool(ground.real.frames),
        "can_hold": getattr(controls, "can_hold", []),
        "sliders": sliders,
        "starts": starts,
        "distance_band": ground.real.distance_band,
        "structure_band": ground.real.structure_band,
        "longest_film": LONGEST_FILM,
        "binary": [],
    }


# --- a browser ---


class Session:
    """One browser: its player, what it has asked for, and the newest picture. All of it is
    bounded: a wish replaces the wish before it, and a picture that is not fetched is replaced by
    the next."""

    def __init__(self, ground, rate, thread):
        self.ground = ground
        self.period = 1 / rate
        self.thread = thread
        self.player = Player(ground)

        # wishes of the page
        self.wake = asyncio.Event()
        self.wanted_start = 0
        self.paused = False
        self.one_step = False
        self.ended_film = None  # of Player.take_film, and whether it was full

        # number of the last key or motion, and of the one that the newest picture knows of
        self.last_input = 0
        self.known_input = 0

        # for the page: a picture and what is said about it, and a film
        self.news = asyncio.Event()
        self.newest = None
        self.film = None
        self.seen = asyncio.Event()

    # --- what the page says ---

    def hear(self, text):
        """A message of the page. ValueError, with what is wrong, for any that makes no sense."""
        try:
            message = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as e:
            raise ValueError("a message is no JSON") from e
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise ValueError("a message is a JSON object with a type")

        # the picture that was sent has been shown
        kind = message["type"]
        if kind == "shown":
            self.seen.set()
            return

        if kind == "start":
            number = message.get("number")
            count = len(self.ground.real.recordings)
            if type(number) is not int or not 0 <= number < count:
                raise ValueError(f"number of a start: a whole number from 0 to {count - 1}")
            self.wanted_start = number
        elif kind in ("pause", "film"):
            on = message.get("on")
            if not isinstance(on, bool):
                raise ValueError(f"{kind}: on is true or false")
            if kind == "pause":
                self.paused = on
            elif on:
                self.player.start_film()
            else:
                # taken at once: another film may begin before this one is encoded
                self.ended_film = (self.player.take_film(), False)
        elif kind == "step":
            self.paused = True
            self.one_step = True
        else:
            # what only a player of this ground knows: keys, mouse, sliders
            number = message.get("input")
            if type(number) is not int or not 0 <= number < 2**53:
                raise ValueError("input of a message: its number, from 0 on")
            self.player.controls.hear(message)
            self.last_input = number
        self.wake.set()

    # --- what the ground does ---

    async def play(self):
        """Step after step at the rate of the run, until it is cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            # until the next step is due, or the page wants something
            idle = self.paused and not self.one_step
            if self.wanted_start is None and self.ended_film is None:
                try:
                    await asyncio.wait_for(self.wake.wait(), None if idle else due - loop.time())
                except asyncio.TimeoutError:
                    pass
            self.wake.clear()

            # a film ends when it is asked for, or when it is full
            if self.player.film_is_full():
                self.ended_film = (self.player.take_film(), True)
            if self.ended_film is not None:
                await self.finish_film()

            # start again, or one step
            now = loop.time()
            if self.wanted_start is not None:
                work = functools.partial(self.player.begin, self.wanted_start)
                self.wanted_start = None
            elif self.one_step or (not self.paused and now >= due):
                work = functools.partial(self.player.step, self.player.take())
                self.one_step = False
            else:
                continue
            self.known_input = self.last_input
            shown = await loop.run_in_executor(self.thread, work)
            self.tell(shown, loop.time() - now)

            # a little late makes nothing later; what was missed is not made up for
            due += self.period
            if not now <= due <= now + self.period:
                due = now + self.period

    async def finish_film(self):
        """The film so far becomes an mp4 for the page."""
        film, full = self.ended_film
        self.ended_film = None
        if film:
            mp4 = await asyncio.to_thread(film_of, film, self.ground)
            self.film = (mp4, full)
            self.news.set()

    def tell(self, shown, took):
        """A step becomes the newest news; one that was not fetched is forgotten."""
        real = self.ground.real
        recording, seconds = real.name_of(shown.nearest, self.ground.seconds)
        blobs = {}
        if shown.predicted is not None:
            blobs["predicted"] = shown.predicted
        if real.frames:
            blobs["nearest"] = real.frames[shown.nearest]
        status = {
            "type": "picture",
            "start": shown.start,
            "step": shown.step,
            "distance": shown.distance,
            "structure": shown.structure,
            "gap": shown.gap,
            "nearest": {"recording": recording, "seconds": round(seconds, 1)},
            "input": self.known_input,
            "milliseconds": round(1000 * took, 1),
            "filmed": len(self.player.film),
        }
        self.newest = (status, blobs)
        self.news.set()

    # --- what the page gets ---

    async def show(self, channel):
        """Send the newest picture whenever the page has shown the one before."""
        await send(channel, introduction(self.ground, 1 / self.period), {})
        while True:
            await self.news.wait()
            self.news.clear()
            if self.film is not None:
                film, full = self.film
                self.film = None
                await send(channel, {"type": "film", "full": full}, {"film": film})
            if self.newest is not None:
                newest = self.newest
                self.newest = None
                self.seen.clear()
                await send(channel, *newest)
                await self.seen.wait()


async def send(channel, status, blobs):
    """A status as JSON, which names the binary messages that follow it."""
    text = json.dumps(status | {"binary": list(blobs)}, allow_nan=False)
    await channel.send_str(text)
    for blob in blobs.values():
        await channel.send_bytes(blob)


# --- the server ---


def address_of(url):
    """The parts of a URL; those of none for what is no URL."""
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:
        return urllib.parse.urlsplit("")


def is_allowed(host, served, own_name):
    """Whether a page may be asked for under this Host header. A page elsewhere can let its own name
    point to this machine; then the browser takes our page for one of its own. A plain address
    cannot be such a name. served: --host."""
    name = address_of(f"//{host}").hostname
    if name in ("localhost", "127.0.0.1", "::1"):
        return True
    if served in ("localhost", "127.0.0.1", "::1"):
        return False
    if name in (served.lower(), own_name.lower()):
        return True
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return False
    return True


class Server:
    """The page, and a Session for each browser that opened it."""

    def __init__(self, ground, rate, host, clients):
        self.ground = ground
        self.rate = rate
        self.host = host
        self.clients = clients
        self.sessions = set()

        # one after another: a step uses all cores
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        with open(PAGE, encoding="utf-8") as f:
            self.page = f.read()

    def app(self):
        """The aiohttp application."""
        app = web.Application(middlewares=[self.check])
        app.router.add_get("/", self.give_page)
        app.router.add_get("/play", self.talk)
        app.on_shutdown.append(self.close)
        return app

    @web.middleware
    async def check(self, request, handler):
        """403 for what another site asks for: see is_allowed."""
        host = request.headers.get("Host", "")
        if not is_allowed(host, self.host, socket.gethostname()):
            remedy = (
                "use the machine's address in numbers, or start play.py with --host and this name"
            )
            raise web.HTTPForbidden(text=f"Host {host[:80]!r} is not served here: {remedy}\n")
        origin = request.headers.get("Origin")
        if origin is not None and address_of(origin).netloc != host:
            raise web.HTTPForbidden(text=f"Origin {origin[:80]!r} is another site\n")
        return await handler(request)

    async def give_page(self, request):
        """The one page."""
        return web.Response(text=self.page, content_type="text/html", headers=HEADERS)

    async def talk(self, request):
        """The socket of a browser, until it leaves or says something wrong."""
        channel = web.WebSocketResponse(max_msg_size=LONGEST_MESSAGE, heartbeat=20, compress=False)
        await channel.prepare(request)
        if len(self.sessions) >= self.clients:
            players = count_text(self.clients, "player")
            await channel.close(code=WSCloseCode.TRY_AGAIN_LATER, message=sentence(players))
            return channel

        session = Session(self.ground, self.rate, self.thread)
        self.sessions.add(channel)
        parts = [session.play(), session.show(channel), listen(channel, session)]
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            # the first to end is the listener, or a fault
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ConnectionResetError:
            pass  # the browser has left while a picture was sent
        finally:
            self.sessions.discard(channel)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return channel

    async def close(self, app):
        """Say goodbye to all browsers."""
        for channel in list(self.sessions):
            await channel.close(code=WSCloseCode.GOING_AWAY, message=b"play.py has ended")
        self.thread.shutdown(cancel_futures=True)


def sentence(players):
    """Why a browser that is one too many is sent away."""
    return f"{players} at once are enough: --clients allows more".encode()


async def listen(channel, session):
    """Hear what a page says, until it leaves. What makes no sense closes the socket."""
    async for message in channel:
        if message.type == WSMsgType.TEXT:
            try:
                session.hear(message.data)
            except ValueError as e:
                reason = str(e).encode()[:120]
                await channel.close(code=WSCloseCode.POLICY_VIOLATION, message=reason)
        elif message.type == WSMsgType.BINARY:
            reason = b"messages are text"
            await channel.close(code=WSCloseCode.UNSUPPORTED_DATA, message=reason)


async def serve(server, host, port, show_page):
    """Serve until Ctrl-C or SIGTERM. show_page: open it in a browser. ValueError if the address
    cannot be had."""
    runner = web.AppRunner(server.app(), shutdown_timeout=5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as e:
        await runner.cleanup()
        if e.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port {port} is taken on {host}: choose another one, or 0 for a free one"
            ) from e
        raise ValueError(f"--host {host} --port {port}: {e.strerror or e}") from e

    # the port that was given for 0
    address = runner.addresses[0]
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{address[1]}"
    if host not in ("localhost", "127.0.0.1", "::1"):
        print(f"WARNING: everybody who reaches {host} can play, and costs time on this machine")
    print(f"play at {url} (Ctrl-C ends it)", flush=True)
    if show_page:
        webbrowser.open(url)

    # until somebody ends it
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()
    await runner.cleanup()


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook

    # --- run and data ---
    run = load_run(args.checkpoint, args.dtype)
    decoder = Decoder(args.decoder, run.device) if args.decoder else None
    ground = open_playground(
        run,
        decoder,
        args.data,
        args.video,
        args.encoder,
        args.window,
        args.clips,
        args.seed,
    )
    rate = args.rate or 1 / ground.seconds
    print(f"{run.path}: {precision_text(run.dtype, run.device, run.predictor, ground.window)}")
    recordings = count_text(len(set(ground.real.recordings)), "recording")
    print(f"{count_text(len(ground.real.recordings), 'clip')} of {recordings} to start from")
    print(f"a step is {1000 * ground.seconds:.0f} ms of play; {rate:g} are shown a second")

    # --- page ---
    server = Server(ground, rate, args.host, args.clients)
    asyncio.run(serve(server, args.host, args.port, args.open))
    print(f"peak memory {checkpoint.peak_memory(run.device):.0f} MiB")
