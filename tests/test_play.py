"""play.py and evaluation/playing.py: the sliding window is the plain predictor; keys mean what they
meant in recordings; a server that keeps strangers out and forgets what is late; a real browser."""

import asyncio
import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import types

import aiohttp
import av
import numpy as np
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from evaluation.closed_loop import seen_from_first
from evaluation.decoded import Decoder
from evaluation.held_out import states_from
from evaluation.playing import (
    LONGEST_FILM,
    Keyboard,
    Limits,
    Player,
    Sliders,
    Window,
    open_playground,
    share,
    structure,
    usual_and_band,
)
from evaluation.runs import load_run
from files.vpt import ACTION_SPACES
from model import Predictor, compose_states, normalize_features, predict
from play import Server, Session, is_allowed
from tests.harness import LIMIT, Run, fails, run

pytestmark = pytest.mark.usefixtures("forkserver")
LIMITS = Limits(turn=100.0, most=300.0, pitch=(-0.5, 0.25))


# --- the window ---


@pytest.mark.parametrize("size", [1, 2, 5])
@torch.no_grad()
def test_the_window_is_the_plain_predictor_on_its_steps(size):
    """Bug: keys and values of steps that were forgotten, positions that do not start from 0, yaw
    that counts from the start of play, the cache of the action that was not done."""
    torch.manual_seed(0)
    predictor = Predictor(24, 5, 2, (2, 3), pred_dim=24, depth=2, num_heads=2)
    for p in predictor.parameters():
        torch.nn.init.normal_(p, std=0.3)
    scaler = types.SimpleNamespace(mean=np.full(4, 0.1), scale=np.full(4, 0.5))
    compose = states_from(compose_states, scaler, torch.device("cpu"))
    run = types.SimpleNamespace(predictor=predictor, autocast=contextlib.nullcontext)

    # half a window of true steps, then three windows of imagined ones
    count = (size + 1) // 2
    z = normalize_features(torch.randn(count, 6, 24))
    states = torch.tensor([[0.3, 0.1]]).repeat(count, 1)
    window = Window(run, compose, size)
    window.begin(z, torch.randn(count - 1, 5), states)
    history = list(z)
    lengths = []
    for _ in range(3 * size + 2):
        actions = torch.randn(2, 5)
        state = window.states[-1:]
        both = window.step(actions)
        history.append(both[0])
        seen = len(window.z) - 1
        lengths.append(seen)
        torch.testing.assert_close(window.z, torch.stack(history[-seen - 1 :]))
        for action, predicted in zip(actions, both):
            of_window = torch.cat([window.actions[:-1], action[None]])[None]
            yaw = seen_from_first(window.states[None, :-1])
            expected = predict(predictor, window.z[None, :-1], of_window, yaw)[0, -1]
            torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)

        # where the player looks follows from what was done
        moved = actions[:1, 2:4] * 0.5 + 0.1
        torch.testing.assert_close(window.states[-1:, 1], state[:, 1] + moved[:, 1])
    assert max(lengths) == size and min(lengths[size:]) == count


# --- what a player does ---


def test_keys_mean_what_they_meant_in_recordings():
    """Bug: left is right, a camera that does not follow the mouse, a tap between two steps that is
    lost, a slot that opens in the step of its key."""
    names = ACTION_SPACES[36]
    keyboard = Keyboard(names, LIMITS)
    recorded = np.zeros(36)
    recorded[names.index("slot.3")] = 1
    keyboard.begin(recorded)

    def take(state=(0.0, 0.0)):
        return [dict(zip(names, row)) for row in keyboard.take(state)]

    # held for a moment, and two motions
    keyboard.hear({"type": "held", "names": ["key.w", "mouse.0", "key.7"]})
    keyboard.hear({"type": "held", "names": ["key.w"]})
    keyboard.hear({"type": "mouse", "dx": 20, "dy": 4})
    keyboard.hear({"type": "mouse", "dx": 20.5, "dy": 6})
    now, rest = take()
    pressed = {name for name, x in now.items() if name.startswith(("key", "mouse.")) and x}
    assert pressed == {"key.w", "mouse.0", "key.7"} and now["slot.3"] == 1 and now["slot.7"] == 0
    assert (now["mouse_dx"], now["mouse_dy"]) == (40.5, 10)
    assert np.isclose(now["yaw_diff"], np.radians(40.5 * 0.15))
    assert np.isclose(now["pitch_diff"], np.radians(1.5))
    assert {name for name, x in rest.items() if x} == {"slot.3"}

    # what is held stays, what was tapped and moved does not
    now, _ = take()
    assert {name for name, x in now.items() if x} == {"key.w", "slot.7"}
    keyboard.hear({"type": "held", "names": []})
    assert take()[0]["key.w"] == 1 and take()[0]["key.w"] == 0

    # arrows turn; nothing turns further than recorded play did
    keyboard.hear({"type": "held", "names": ["turn.left", "turn.down"]})
    now, _ = take((0.0, 0.2))
    assert now["mouse_dx"] == -100 and now["yaw_diff"] < 0
    assert now["mouse_dy"] == 100 and np.isclose(now["pitch_diff"], 0.05)
    keyboard.hear({"type": "mouse", "dx": 5000, "dy": 0})
    assert take()[0]["mouse_dx"] == 300


def test_limits_are_those_of_recorded_play():
    """Bug: the limit of one axis, or of scaled actions."""
    names = ACTION_SPACES[13]
    actions = np.zeros((5, 13))
    actions[:, 0] = [0, -4, 8, -12, 16]
    actions[2, 1] = -20
    limits = Limits.of(names, actions, np.array([[9, -1], [9, 2]]))
    assert limits == Limits(12.0, 20.0, (-1.0, 2.0))
    assert Keyboard(names, limits).can_hold[:9] == [f"key.{n}" for n in range(1, 10)]


@pytest.mark.parametrize(
    "message",
    [
        {"type": "held"},
        {"type": "held", "names": "key.w"},
        {"type": "held", "names": [["key.w"]]},
        {"type": "held", "names": ["key.b"]},
        {"type": "mouse", "dx": 1},
        {"type": "mouse", "dx": True, "dy": 0},
        {"type": "mouse", "dx": float("nan"), "dy": 0},
        {"type": "mouse", "dx": 0, "dy": 10**400},
        {"type": "sliders", "values": [0.0] * 7},
    ],
)
def test_a_keyboard_refuses_what_makes_no_sense(message):
    """Bug: nan in the features, a key that no action has, a number that no float holds."""
    keyboard = Keyboard(ACTION_SPACES[36], LIMITS)
    with pytest.raises(ValueError):
        keyboard.hear(message)
    done, rest = keyboard.take((0.0, 0.0))
    assert (done == rest).all()


def test_sliders_are_in_recorded_units_and_stay():
    """Bug: sliders that fall back to rest after a step, or reach further than the data."""
    sliders = Sliders(["x", "gripper"], np.array([0.1, 0.5]))
    sliders.hear({"type": "sliders", "values": [0.3, -1]})
    for _ in range(2):
        assert sliders.take(None).tolist() == [[0.3, -1], [0, 0]]
    for values in ([0.31, 0], [0], "xx", [0, None]):
        with pytest.raises(ValueError):
            sliders.hear({"type": "sliders", "values": values})
    with pytest.raises(ValueError, match="no message of type 'held' is known"):
        sliders.hear({"type": "held", "names": []})


def test_structure_is_what_differs_among_patches():
    """Bug: what all patches share counts; a step counts for another one."""
    z = torch.tensor([[[0.0, 4], [2, 4]], [[7, 7], [7, 7]]])
    assert structure(z).tolist() == [0.5, 0]
    usual, band = usual_and_band([1.0, 2, 3])
    assert usual == 2 and np.allclose(band, [0.6, 1.4])
    assert usual_and_band([0.0, 0, 1]) == (0, None) and share(3, 0.0) is None


# --- a server ---


@pytest.fixture(scope="module")
def decoder(game, tmp_path_factory):
    """A run of train_decoder.py on the features of the game fixture."""
    out = tmp_path_factory.mktemp("decoder") / "run"
    flags = ["--data", game.folder / "train" / "*.tar", "--val_clips 0 --picture_size 32"]
    flags += ["--video", game.video.parent / "shard-{000000..000001}.tar", "--crop_size 32"]
    flags += ["--width 24 --depth 1 --num_heads 2 --least_width 12 --batch_size 4 --lr 1e-2"]
    flags += ["--num_workers 0 --epochs 1 --warmup 0 --anneal 0 --ipe 30"]
    run(out.parent, "train_decoder.py", *flags, "--out_dir", out)
    return out


@pytest.fixture(scope="module")
def ground(game, decoder):
    """What play.py opens: the run, its decoder, held-out features and their video."""
    played = load_run(str(game.out))
    return open_playground(
        played,
        Decoder(str(decoder), played.device),
        [str(game.held)],
        [str(game.video)],
        None,
        None,
        8,
        0,
    )


class Page:
    """A page without a screen: what play.html does with its socket."""

    def __init__(self, channel, hello):
        self.channel = channel
        self.hello = hello
        self.input = 0

    @classmethod
    async def open(cls, client, **options):
        channel = await client.ws_connect("/play", **options)
        hello, _ = await receive(channel)
        return cls(channel, hello)

    async def say(self, kind, **fields):
        await self.channel.send_str(json.dumps({"type": kind} | fields))

    async def act(self, kind, **fields):
        self.input += 1
        await self.say(kind, input=self.input, **fields)

    async def picture(self):
        """The next picture, which is said to be shown."""
        status, blobs = await receive(self.channel)
        assert status["type"] == "picture"
        await self.say("shown")
        return status, blobs


async def receive(channel):
    """(status, {name: bytes}); AssertionError with the reason if the socket was closed."""
    message = await channel.receive(timeout=60)
    assert message.type == aiohttp.WSMsgType.TEXT, (message.type, message.data, message.extra)
    status = json.loads(message.data)
    return status, {name: await channel.receive_bytes(timeout=60) for name in status["binary"]}


def with_server(ground, scenario, rate=5.0, clients=4):
    """Run scenario(client, server) against a real server on a free port."""

    async def main():
        server = Server(ground, rate, "127.0.0.1", clients)
        async with TestClient(TestServer(server.app(), host="127.0.0.1")) as client:
            return await scenario(client, server)

    return asyncio.run(main())


def test_strangers_are_kept_out(ground):
    """Bug: a page of another site plays, and reads, through the browser of somebody who has play.py
    open; a name that points to this machine is taken for its own."""

    async def scenario(client, server):
        here = f"127.0.0.1:{client.port}"
        answers = {}
        for name, headers in {
            "plain": {},
            "tunnel": {"Host": "localhost:9000", "Origin": "http://localhost:9000"},
            "own": {"Origin": f"http://{here}"},
            "rebound": {"Host": f"evil.example:{client.port}"},
            "address": {"Host": "192.168.1.5"},
            "cross": {"Origin": "http://evil.example"},
            "port": {"Origin": "http://127.0.0.1:1"},
            "null": {"Origin": "null"},
            "broken": {"Host": "[::1"},
        }.items():
            async with client.get("/", headers=headers) as response:
                answers[name] = response.status
            if answers[name] == 200:
                page = await Page.open(client, headers=headers)
                await page.channel.close()
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await client.ws_connect("/play", headers=headers)
                assert refused.value.status == 403
        return answers

    answers = with_server(ground, scenario)
    allowed = {"plain", "tunnel", "own"}
    assert answers == {name: 200 if name in allowed else 403 for name in answers}

    # with --host, names that were asked for and plain addresses
    assert is_allowed("192.168.1.5:8000", "0.0.0.0", "box") and is_allowed("box", "0.0.0.0", "box")
    assert is_allowed("a.example:80", "a.example", "box")
    assert not is_allowed("evil.example", "0.0.0.0", "box") and not is_allowed("", "::", "box")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "a message is no JSON"),
        ("[" * 4000, "a message is no JSON"),
        ("[1]", "a message is a JSON object with a type"),
        ('{"type": "start", "number": 99}', "number of a start"),
        ('{"type": "start", "number": true}', "number of a start"),
        ('{"type": "pause", "on": 1}', "pause: on is true or false"),
        ('{"type": "held", "names": []}', "input of a message"),
        ('{"type": "held", "names": ["key.b"], "input": 1}', "names of held keys"),
        ('{"type": "mouse", "dx": NaN, "dy": 0, "input": 1}', "nan is not within"),
        ('{"type": "fly", "input": 1}', "no message of type 'fly' is known"),
    ],
)
def test_wrong_messages_close_the_socket_with_a_reason(ground, text, reason):
    """Bug: a wrong message ends the server, or is swallowed so that nobody finds the fault."""

    async def scenario(client, server):
        page = await Page.open(client)
        await page.channel.send_str(text)
        while (message := await page.channel.receive(timeout=60)).type != aiohttp.WSMsgType.CLOSE:
            pass
        other = await Page.open(client)
        await other.picture()
        return message.data, message.extra

    code, said = with_server(ground, scenario)
    assert code == 1008 and reason in said


def test_long_and_binary_messages_and_one_player_too_many(ground):
    """Bug: a message of any length is kept in memory; a number of players that has no bound."""

    async def scenario(client, server):
        async def code_after(send):
            page = await Page.open(client)
            await send(page.channel)
            while not page.channel.closed:
                await page.channel.receive(timeout=60)
            return page.channel.close_code

        codes = [
            await code_after(lambda channel: channel.send_bytes(b"key.w")),
            await code_after(lambda channel: channel.send_str("x" * 5000)),
        ]
        pages = [await Page.open(client) for _ in range(2)]
        full = await client.ws_connect("/play")
        message = await full.receive(timeout=60)
        codes.append(full.close_code)

        # who leaves makes room
        await pages[0].channel.close()
        while len(server.sessions) > 1:
            await asyncio.sleep(0.01)
        await Page.open(client)
        return codes, message.extra

    codes, reason = with_server(ground, scenario, clients=2)
    assert codes == [1003, 1009, 1013] and reason.startswith("2 players at once are enough")


async def steps_of(page, start, names, count):
    """Start somewhere, then single steps with these keys held: [(status, blobs)]."""
    await page.say("pause", on=True)
    await page.say("start", number=start)
    pictures = []
    while not pictures or (pictures[0][0]["start"], pictures[0][0]["step"]) != (start, 0):
        pictures = [await page.picture()]
    await page.act("held", names=names)
    for _ in range(count):
        await page.say("step")
        pictures.append(await page.picture())
    await page.act("held", names=[])
    return pictures


def test_players_are_independent_and_their_actions_matter(ground):
    """Bug: two browsers share a window, hotbar or keys; a start is another recording's; keys that
    reach no prediction."""

    async def scenario(client, server):
        one = await Page.open(client)
        two = await Page.open(client)
        left = await steps_of(one, 3, ["turn.left"], 4)
        right = await steps_of(two, 3, ["turn.right"], 4)
        again = await steps_of(one, 3, ["turn.left"], 4)
        elsewhere = await steps_of(two, 1, ["turn.left"], 4)
        rest = await steps_of(two, 3, [], 1)
        return left, right, again, elsewhere, rest, one.hello

    left, right, again, elsewhere, rest, hello = with_server(ground, scenario)

    def pictures(steps):
        return [blobs["predicted"] for _, blobs in steps]

    assert pictures(left) == pictures(again)
    assert left[0][1] == right[0][1] and left[0][1] != elsewhere[0][1]
    assert len({*pictures(left)[1:], *pictures(right)[1:]}) == 8
    status = left[1][0]
    assert status["gap"] > 0 and rest[1][0]["gap"] == 0 and left[0][0]["gap"] is None
    assert [s["step"] for s, _ in left] == [0, 1, 2, 3, 4] and status["input"] == 1
    assert again[1][0]["input"] == 3

    # play starts with half a window of true steps, so step 0 is itself its nearest
    T = ground.real.z.shape[1]
    number = 3 * T + (ground.window + 1) // 2 - 1
    assert left[0][1]["nearest"] == ground.real.frames[number]
    since = left[0][0]["nearest"]["seconds"] - hello["starts"][3]["seconds"]
    assert np.isclose(since, (number % T) * 0.4, atol=0.11)


def test_a_slow_page_gets_the_newest_picture(ground):
    """Bug: pictures pile up for a page that does not fetch them, which then shows old ones."""

    async def scenario(client, server):
        page = await Page.open(client)
        first, _ = await receive(page.channel)

        # what the others play is not held up
        other = await Page.open(client)
        while (await other.picture())[0]["step"] < 30:
            pass
        await page.say("shown")
        second, _ = await receive(page.channel)
        return first["step"], second["step"]

    first, second = with_server(ground, scenario, rate=500.0)
    assert first == 0 and second >= 15


def test_a_session_is_bounded_whatever_it_is_told(ground):
    """Bug: wishes, keys, motion or film grow for as long as a page talks."""

    async def main():
        session = Session(ground, 5.0, None)
        for i in range(500):
            session.hear(json.dumps({"type": "mouse", "dx": 9999, "dy": -9999, "input": i}))
            session.hear(json.dumps({"type": "held", "names": ["key.w"] * 50, "input": i}))
            session.hear('{"type": "step"}')
            session.hear('{"type": "start", "number": 1}')
        controls = session.player.controls
        assert controls.dx == 1e4 and controls.dy == -1e4 and controls.tapped == {"key.w"}
        assert session.one_step is True and session.wanted_start == 1
        assert session.last_input == 499

    asyncio.run(main())

    # the film stops, the window slides
    player = Player(ground)
    shown = player.begin(0)
    player.start_film()
    player.film += [shown] * (LONGEST_FILM - 2)
    for _ in range(20):
        player.step(player.take())
    assert len(player.film) == LONGEST_FILM and player.film_is_full()
    assert len(player.window.z) <= ground.window + 1
    tokens = player.window.past[0][0].shape[2]
    assert tokens <= ground.window * (ground.real.z.shape[2] + 2)


def test_a_film_can_be_played(ground):
    """Bug: a film that no player opens, one picture too many, the wrong speed."""

    async def scenario(client, server):
        page = await Page.open(client)
        await page.say("pause", on=True)
        await page.picture()
        await page.say("film", on=True)
        for _ in range(7):
            await page.say("step")
            status, _ = await page.picture()
        assert status["filmed"] == 7
        await page.say("film", on=False)
        return await receive(page.channel)

    status, blobs = with_server(ground, scenario)
    assert status["type"] == "film"
    with av.open(io.BytesIO(blobs["film"])) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 2.5  # steps of 0.4 s
    assert len(frames) == 7 and frames[0].shape == (188, 2 * 168, 3)
    halves = [frame[28:, :168].astype(int) - frame[28:, 168:] for frame in frames]
    assert all(np.abs(half).mean() > 1 for half in halves)


# --- the program ---


def test_what_cannot_be_played_is_refused(game, decoder, tmp_path):
    """Bug: a traceback, or a page without a picture."""
    played = ["--checkpoint", game.out, "--data", game.held, "--port 0"]
    text = fails(tmp_path, "play.py", *played)
    assert "features without pictures: name a run of train_decoder.py with --decoder" in text
    text = fails(tmp_path, "play.py", *played, "--decoder", game.out)
    assert "is no run of train_decoder.py" in text
    text = fails(tmp_path, "play.py", *played, "--decoder", tmp_path / "no")
    assert f"--decoder {tmp_path / 'no'}: no such run folder or file" in text
    text = fails(tmp_path, "play.py", *played, "--decoder", decoder, "--window 8")
    assert "--window 8: choose 1 to 7 steps" in text
    text = fails(tmp_path, "play.py", *played, "--clips 1")
    assert "--clips 1 is too small: at least 2" in text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--decoder", decoder, "--clips 2", "--port", port]
        text = fails(tmp_path, "play.py", *played, *flags)
    assert f"--port {port} is taken on 127.0.0.1" in text


def test_a_robot_is_played_with_sliders(arm, tmp_path):
    """Bug: episodes have no window, no frames or no pose that follows; sliders in stds."""
    played = load_run(str(arm / "base"))
    ground = open_playground(played, None, None, None, None, None, 6, 0)
    assert len(ground.real.frames) == ground.real.z.shape[0] * ground.real.z.shape[1]

    # the unit of distances, by hand: the median of each step's nearest one in another episode
    real = ground.real
    nearest = []
    for row, group in zip(real.rows, real.groups):
        others = real.rows[real.groups != group]
        nearest.append((others - row).abs().mean(1).min().item())
    assert len(set(real.groups.tolist())) == len(set(real.recordings)) > 1
    assert np.isclose(real.usual_distance, np.median(nearest), rtol=1e-4)
    assert np.allclose(real.distance_band, np.quantile(nearest, [0.1, 0.9]) / np.median(nearest))

    async def scenario(client, server):
        page = await Page.open(client)
        await page.say("pause", on=True)
        await page.picture()
        most = [s["most"] for s in page.hello["sliders"]]
        await page.act("sliders", values=[most[0], 0, 0, 0, 0, 0, -most[6]])
        await page.say("step")
        return page.hello, await page.picture()

    hello, (status, blobs) = with_server(ground, scenario)
    assert [s["unit"] for s in hello["sliders"]] == ["m"] * 3 + ["rad"] * 3 + ["closed"]
    assert hello["can_hold"] == [] and hello["decoded"] is False
    assert set(blobs) == {"nearest"} and status["gap"] > 0

    # the pose follows the action
    player = Player(ground)
    player.begin(0)
    before = player.window.states[-1].clone()
    player.controls.hear({"type": "sliders", "values": [0.01, 0, 0, 0, 0, 0, 0]})
    player.step(player.take())
    moved = player.window.states[-1] - before
    torch.testing.assert_close(moved, torch.tensor([0.01, 0, 0, 0, 0, 0, 0]), rtol=0, atol=1e-5)


# --- a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One tab of a headless Chromium, by its DevTools protocol."""

    def __init__(self, channel):
        self.channel = channel
        self.count = 0
        self.tab = None
        self.complaints = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder):
        """A Chromium with its profile in a folder."""
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([CHROMIUM, *flags], **silent)
        try:
            # it writes where it listens
            lines = []
            while len(lines) < 2:
                await asyncio.sleep(0.05)
                assert process.poll() is None, "Chromium has ended"
                if (folder / "DevToolsActivePort").exists():
                    lines = (folder / "DevToolsActivePort").read_text().splitlines()
            url = f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(url, max_msg_size=0) as channel:
                    yield cls(channel)
        finally:
            process.terminate()
            process.wait()

    async def call(self, method, **params):
        """A command of the protocol -> its result."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": params}
        if self.tab:
            command["sessionId"] = self.tab
        await self.channel.send_str(json.dumps(command))
        while True:
            answer = json.loads(await self.channel.receive_str(timeout=60))
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(answer["params"])
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    async def visit(self, url):
        """Open a page in a new tab."""
        target = await self.call("Target.createTarget", url=url)
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self.tab = attached["sessionId"]
        await self.call("Runtime.enable")
        await self.call("Log.enable")

    async def value(self, expression):
        """What an expression of JavaScript is in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression):
        """Wait until an expression is true."""
        while not await self.value(expression):
            await asyncio.sleep(0.02)

    async def key(self, kind, code):
        """A key goes down ("keyDown") or up ("keyUp")."""
        await self.call("Input.dispatchKeyEvent", type=kind, code=code)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")
def test_the_page_plays_in_a_browser(game, decoder, tmp_path):
    """Bug: a page that does not load, that its own security header forbids, whose keys do nothing,
    or whose left is its right."""
    flags = ["--checkpoint", game.out, "--data", game.held, "--video", game.video]
    server = Run(tmp_path, "play.py", *flags, "--decoder", decoder, "--clips 4 --port 0")

    async def steps(browser, code):
        """Pictures of three single steps from the start with a key held."""
        await browser.key("keyDown", "KeyT")
        await browser.key("keyUp", "KeyT")
        await browser.until("$('main').dataset.step === '0'")
        await browser.key("keyDown", code)
        pictures = []
        for step in (1, 2, 3):
            await browser.key("keyDown", "KeyN")
            await browser.key("keyUp", "KeyN")
            await browser.until(f"$('main').dataset.step === '{step}'")
            pictures.append(await browser.value("$('main').toDataURL()"))
        await browser.key("keyUp", code)
        return pictures

    async def main():
        url = re.search(r"play at (http\S+)", server.text())[1]
        async with Browser.open(tmp_path) as browser:
            await browser.visit(url)

            # it runs by itself, then step by step
            await browser.until("typeof hello !== 'undefined' && $('main').dataset.step > 1")
            await browser.key("keyDown", "KeyP")
            await browser.until("$('pause').textContent === 'Continue'")
            left = await steps(browser, "ArrowLeft")
            right = await steps(browser, "ArrowRight")
            again = await steps(browser, "ArrowLeft")
            facts = await browser.value(
                "[$('main-caption').textContent, $('nearest-caption').textContent,"
                " $('nearest').width, $('gap').textContent, $('keys').textContent]"
            )
            return left, right, again, facts, browser.complaints

    try:
        assert server.until(lambda: "play at http" in server.text()), server.text()
        left, right, again, facts, complaints = asyncio.run(asyncio.wait_for(main(), LIMIT))
    finally:
        server.kill()
    assert complaints == []
    assert left == again and len({*left, *right}) == 6
    assert facts[0].startswith("Predicted by ") and "1.2 s after the start" in facts[0]
    assert facts[1].startswith("Nearest real frame: ") and facts[2] == 32
    assert facts[3].endswith("%") and "space" in facts[4]
