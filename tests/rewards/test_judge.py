"""The judge over HTTP, against a real server on this machine that delays, reorders, fails and sends rubbish."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import worlds
from tests.worlds import SCHEDULE, Looks, fill, settings, tiny_search
from ttsnap_lib import open_rewards
from ttsnap_lib.errors import ConfigError, RewardError
from ttsnap_lib.live.measure import measure_costs
from ttsnap_lib.rewards.judge import Judge, JudgeReward, _retry_after
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.trajectories.read import Trajectories

KEY = "sk-a-very-secret-key"
QUICK = {"timeout_s": 0.5, "backoff_s": 0.002, "concurrency": 8}


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image, np.float64).mean())


class Server(ThreadingHTTPServer):
    """Answers `POST`s by ``answer(server, request, tries)``: a status, a body and headers, or None to hang up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.headers_seen, self.tries = answer, [], [], Counter()
        self.at_work, self.most_at_work, self.lock = 0, 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._send(200 if self.headers.get("Authorization") != "Bearer wrong" else 401, b"{}", {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            server.tries[body] += 1
            server.requests.append((self.path, json.loads(body)))
            server.headers_seen.append(self.headers.get("Authorization"))
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        try:
            found = server.answer(server, json.loads(body), server.tries[body])
            if found is None:
                self.close_connection = True
                self.connection.close()
            else:
                self._send(*found)
        finally:
            with server.lock:
                server.at_work -= 1

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def serve():
    """Return a function that starts a server; all of them end with the test."""
    running = []

    def start(answer) -> Server:
        server = Server(answer)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def opened(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png.partition("base64,")[2] or png)))


def said(words: str) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps({"choices": [{"message": {"content": words}}]}).encode(), {}


def asked(request: dict) -> tuple[str, Image.Image]:
    """Return the rubric and the picture of a chat request."""
    text, image = request["messages"][0]["content"]
    return text["text"], opened(image["image_url"]["url"])


def shades(n: int) -> list[Image.Image]:
    """Return pictures of one shade each; shade k is the k-th."""
    return [Image.new("RGB", (4, 3), (k, k, k)) for k in range(n)]


# What a third of 200 pictures meets. Those that hold come back right; the others are listed.
HOLDS = ("late", "500", "429", "closed", "rubbish", "not a number", "cut off")
FAILS = ("always rubbish", "refused", "always 500", "too late")


def fault(k: int) -> str:
    if k % 3:
        return ""
    return FAILS[k // 30 % 4] if k % 30 == 0 else HOLDS[k // 3 % 7]


def faulty(server: Server, request: dict, tries: int):
    _, image = asked(request)
    right = said(f"Score: {brightness(image):g}")
    kind = fault(round(brightness(image)))
    if kind in ("late", "too late"):
        time.sleep(0.05 if kind == "late" else 0.7)
    if kind == "always rubbish":
        return 200, b"<html>502 Bad Gateway</html>", {}
    if kind == "refused":
        return 400, f"content policy, key {KEY}".encode(), {}
    if kind == "always 500":
        return 500, b"", {}
    if tries > 1:
        return right
    match kind:
        case "500":
            return 500, b"overloaded", {}
        case "429":
            return 429, b"slow down", {"Retry-After": "0.03"}
        case "closed":
            return None
        case "rubbish":
            return said("I would give it between 3 and 4.")
        case "not a number":
            return said("nan")
        case "cut off":
            return 200, right[1][:-5], {}
    return right


def test_two_hundred_pictures_under_faults(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server, images = serve(faulty), shades(200)
    judge = Judge(server.url, model="m", api_key_env="JUDGE_KEY", retries=2, **QUICK)
    reward = JudgeReward(judge)
    found = reward.score("a lamp", images, batch_size=200, check=False)
    lost = {k for k in range(200) if fault(k) in FAILS}
    assert sum(bool(fault(k)) for k in range(200)) == 67 and len(lost) == 7
    assert np.array_equal(np.isnan(found), [k in lost for k in range(200)])
    kept = [k for k in range(200) if k not in lost]
    assert found[kept].tolist() == kept
    assert set(reward.failures) == lost
    for k in lost:
        says = {
            "always rubbish": r"no JSON: '<html>502 .* \(3 tries\)", "refused": r"status 400.*policy, key \*\*\*' \(1 try\)",
            "always 500": r"status 500: '' \(3 tries\)", "too late": r"no answer within 0\.5 s \(3 tries\)",
        }[fault(k)]  # fmt: skip
        assert re.search(says, reward.failures[k])
    assert 1 < server.most_at_work <= 8
    assert set(server.headers_seen) == {f"Bearer {KEY}"}
    assert KEY not in repr(reward) + reward.fingerprint() + json.dumps(judge.to_dict())
    with pytest.raises(RewardError, match=r"no score for image 1 \(prompt 'a lamp'\): an answer that is no JSON"):
        reward.score("a lamp", [images[1], images[0]])


def test_a_retry_after_holds_back_all_requests(serve):
    times = []

    def answer(server, request, tries):
        times.append(time.monotonic())
        if len(times) == 1:
            return 429, b"", {"Retry-After": "0.2"}
        return said("1")

    reward = JudgeReward(Judge(serve(answer).url, model="m", **{**QUICK, "concurrency": 1}))
    assert reward.score("a", shades(3)).tolist() == [1, 1, 1]
    assert times[1] - times[0] >= 0.2
    assert _retry_after("5") == 5 and _retry_after("soon") == 0 and _retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0


def test_its_seconds_are_measured_into_the_cost(serve):
    def answer(server, request, tries):
        time.sleep(0.03)
        return said("5")

    judge = JudgeReward(Judge(serve(answer).url, model="m", **{**QUICK, "concurrency": 4}))
    with pytest.warns(UserWarning, match=r"scoring by \['judge'\] counts no FLOPs here"):
        found = measure_costs(worlds.build("flux"), judge, settings(n_steps=2), batch_sizes=[1, 4], repeats=1)
    assert found.seconds.each("verify", 1) >= 0.03 and found.tflops.verify == 0
    assert found.seconds.each("verify", 4) < 0.8 * found.seconds.each("verify", 1)  # four at once


def test_aspects_are_rewards_of_the_tensor_and_what_fails_is_listed(serve, tmp_path, capsys, monkeypatch):
    """The judge of a YAML file scores a folder from the command line; its key is in none of the files."""
    from ttsnap_lib.__main__ import main

    def answer(server, request, tries):
        rubric, image = asked(request)
        assert request["model"] == "tiny-vlm" and request["temperature"] == 0
        light = brightness(image)
        if light > 128:
            return said("I cannot rate this picture.")
        words = {"light": round(light, 3), "length": len(rubric)}
        return said(f"<think>maybe {{3}}</think>Sure!\n```json\n{json.dumps(words)}\n```")

    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(answer)
    folder = fill(tmp_path / "set", n_prompts=2, n_images=2, metadata=[{"object": "cat"}, {"object": "a dog"}])
    given = {
        "url": server.url, "model": "tiny-vlm", "aspects": ["light", "length"], "api_key_env": "JUDGE_KEY", "retries": 1,
        "template": 'How well is {object} shown for "{prompt}"? Answer as {"light": 1, "length": 2}.', **QUICK,
    }  # fmt: skip
    file = tmp_path / "judge.yaml"
    file.write_text(yaml.safe_dump(given))
    command = ["score", str(folder), "--reward", str(file), "-o", str(tmp_path / "r.zarr"), "-q"]
    assert main(command) == 1
    assert (
        "gave no score for" in (told := capsys.readouterr().err) and "'I cannot rate this picture.' (2 tries)" in told
    )
    assert main([*command, "--on-error", "skip"]) == 0
    tensor, found = open_rewards(tmp_path / "r.zarr"), Trajectories(folder)
    assert list(tensor["reward"].values) == ["judge.light", "judge.length"]
    listed = json.loads((tmp_path / "r.zarr.skipped.json").read_text())
    lost = {(one["prompt"], one["image"], one["step"]) for one in listed if "I cannot rate" in one["reason"]}
    for place in np.ndindex(2, 2, 4):
        light = found.read(*place).mean()
        got = tensor["base"].values[(slice(None), *place)]
        if light > 128:
            assert np.isnan(got).all() and place in lost
        else:
            words = given["template"].replace("{prompt}", found.prompts[place[0]])
            length = len(words.replace("{object}", found.prompts.metadata[place[0]]["object"]))
            np.testing.assert_allclose(got, [light, length], atol=1e-3)
    assert 0 < len(lost) < 16 and len(listed) == 2 * len(lost)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(KEY.encode() not in path.read_bytes() for path in files)


def test_pictures_are_posted_together_and_one_by_one_where_that_fails(serve):
    sizes = []

    def answer(server, request, tries):
        assert request["metadata"] == [{"n": 2}] * len(request["images"])
        lights = [brightness(opened(png)) for png in request["images"]]
        sizes.append(len(lights))
        if len(lights) > 1 and 4 in lights:
            return 200, b'{"scores": [1]}', {}
        scores = [
            None if light == 5 else light + len(prompt)
            for light, prompt in zip(lights, request["prompts"], strict=True)
        ]
        return 200, json.dumps({"scores": scores}).encode(), {}

    judge = Judge(serve(answer).url, kind="post", metadata=True, images_per_request=3, retries=1, **QUICK)
    reward = JudgeReward(judge)
    found = reward.score([k * "x" for k in range(7)], shades(7), metadata={"n": 2}, check=False)
    np.testing.assert_array_equal(found, [0, 2, 4, 6, 8, np.nan, 12])
    assert list(reward.failures) == [5] and "expected one number, got None" in reward.failures[5]
    assert sorted(Counter(sizes).items()) == [(1, 5), (3, 3)]


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("7", 7),
        (" 7.5\n", 7.5),
        ("Score: -1", -1),
        ("8/10", 8),
        ("I say 8 out of 10.", 8),
        ("<think>1 or 2</think> 3", 3),
    ],
)
def test_answers_as_models_give_them(serve, words, number):
    reward = JudgeReward(Judge(serve(lambda *_: said(words)).url, model="m", **QUICK))
    assert reward.score("a", shades(1)).tolist() == [number]


def test_a_number_out_of_range_is_no_answer(serve):
    reward = JudgeReward(Judge(serve(lambda *_: said("11")).url, model="m", range=[0, 10], retries=0, **QUICK))
    with pytest.raises(RewardError, match=r"for image 0 .*expected one number in \[0\.0, 10\.0\], got '11' \(1 try\)"):
        reward.score("a", shades(1))


def test_an_answer_that_drips_ends_at_the_time_limit(serve):
    class Dripping(Handler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(20):
                    self.wfile.write(b" ")
                    time.sleep(0.02)

    server = serve(None)
    server.RequestHandlerClass = Dripping
    reward = JudgeReward(Judge(server.url, model="m", retries=0, timeout_s=0.1))
    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"no whole answer within 0\.1 s"):
        reward.score("a", shades(1))
    assert time.monotonic() - begin < 0.35


def test_an_endpoint_that_is_not_there_or_refuses_the_key_is_told_when_it_is_loaded(serve, tmp_path, monkeypatch):
    server = serve(None)
    file = tmp_path / "strict.yaml"
    file.write_text(f"url: {server.url}\nmodel: m\napi_key_env: JUDGE_KEY\n")
    with pytest.raises(RewardError, match=r"strict: got no key in the environment variable JUDGE_KEY"):
        load_reward(file)
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with pytest.raises(RewardError, match=r"answered 401 to the key in JUDGE_KEY"):
        load_reward(file)
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=r"judge strict: got no connection to http://127.*Connection refused.*Start"):
        load_reward(file)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": "localhost:8000"}, "expected http://host/path"),
        ({"url": "http://me:secret@host/v1"}, "holds a name or password"),
        ({"template": "Rate the picture."}, r"got 'Rate the picture\.', expected \{prompt\} in it"),
        ({"model": ""}, "judge.model"),
        ({"range": [10, 0]}, r"expected \[low, high\]"),
        ({"api_key_env": KEY}, "the name of an environment variable"),
        ({"aspects": ["a", "a"]}, "expected distinct names"),
        ({"kind": "post", "template": "{prompt}", "model": ""}, "judge.template is not for kind post"),
        ({"images_per_request": 2}, "judge.images_per_request is not for kind chat"),
        ({"timeout_s": 0}, "judge.timeout_s"),
        ({"concurency": 2}, "Did you mean 'concurrency'"),
    ],
)
def test_bad_settings(given, says):
    with pytest.raises((ConfigError, RewardError), match=says) as raised:
        Judge.from_dict({"url": "http://host/v1", "model": "m", **given})
    assert KEY not in str(raised.value) and "secret" not in str(raised.value)


def test_the_fingerprint_is_of_what_is_asked(serve):
    server = serve(None)

    def of(url=server.url, **changes):
        return JudgeReward(Judge(url, **{"model": "m", **changes})).fingerprint()

    assert of() == of(url=f"{server.url}/?version=2", retries=1, concurrency=2, timeout_s=9)
    assert (
        len({of(), of(model="n"), of(template="{prompt}?"), of(aspects=["a"]), of(range=[0, 1]), of(options={})}) == 6
    )


def test_a_search_goes_on_without_a_picture_that_the_judge_does_not_rate(serve):
    seen = []

    def answer(server, request, tries):
        seen.append(brightness(asked(request)[1]))
        return said("no") if len(seen) == 2 else said(f"{seen[-1]:.4f}")

    judge = JudgeReward(Judge(serve(answer).url, model="m", retries=0, **{**QUICK, "concurrency": 1}))
    with pytest.warns(
        UserWarning, match=r"judge failed at step 1 for the candidates \[1\], which drop out: expected one number"
    ):
        found = tiny_search(worlds.build("flux"), [judge, Looks()], schedule=SCHEDULE, report="looks", candidates=4)
    assert found.record.pruned_at[1] == -2 and found.winner != 1
    assert found.scores["judge"] == pytest.approx(np.nanmax(found.record.scores[:, -1, 0]))
