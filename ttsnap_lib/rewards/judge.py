"""A judge over HTTP as a reward: a chat endpoint that rates a picture by a rubric, or a POST of PNGs and prompts."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from ttsnap_lib.checks import Plain, choice, integer, real, text
from ttsnap_lib.errors import ConfigError, RewardError, shown
from ttsnap_lib.files import digest, prefetch, read_yaml
from ttsnap_lib.rewards.base import CallableReward, check_outputs

_RUBRIC = (
    'Rate how well the picture shows "{prompt}", from 0 (not at all) to 10 (perfectly). Answer with the number alone.'
)
_RUBRIC_OF_ASPECTS = (
    'Rate the picture, made for the prompt "{prompt}", from 0 (bad) to 10 (perfect) in each of: ASPECTS. Answer with a '
    "JSON object of these names and their numbers alone."
)
_FIELD = re.compile(r"\{(\w+)\}")  # not str.format: a rubric may hold JSON
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_OUT_OF = re.compile(rf"({_NUMBER.pattern})\s*(?:/|out of)\s*{_NUMBER.pattern}")
_AGAIN = {408, 409, 425, 429}  # and 5xx: the same request may succeed later
_LONGEST_WAIT_S = 60.0
_LONGEST_RETRY_AFTER_S = 600.0
_MOST_BYTES = 2**22
_PROBE_S = 10.0


@dataclass(frozen=True)
class Judge(Plain):
    """How a judge is asked: what stands in its YAML file.

    Parameters
    ----------
    url : str
        Of an OpenAI-compatible server up to ``/v1``; or, with ``kind: post``, what the pictures are posted to.
    kind : {"chat", "post"}
        ``"chat"``: one picture a request to ``<url>/chat/completions``, as a data URL beside the rubric; the answer is a
        number, or with `aspects` a JSON object. ``"post"``: JSON of ``prompts`` and ``images`` (PNGs in base64), and
        ``metadata`` where asked for, answered by ``{"scores": [...]}``: numbers, or objects of the aspects.
    model : str
        The model that the chat endpoint is asked for.
    template : str, optional
        The rubric, with ``{prompt}`` where the words go; ``{name}`` takes that key of the prompt's metadata. By default a
        rating from 0 to 10.
    aspects : sequence of str
        Names of several numbers a picture; each is a reward of its own, such as ``judge.composition``.
    range : (float, float), optional
        Numbers outside are malformed answers.
    options : mapping
        Further fields of a chat request; ``{temperature: 0}`` by default.
    metadata : bool
        Post the metadata of the prompts as well.
    api_key_env : str
        Name of the environment variable that holds the key; the key itself is kept nowhere.
    images_per_request : int
        Of a post. A request that fails is repeated picture by picture.
    concurrency : int
        Requests at once.
    timeout_s : float
        For one whole answer.
    retries : int
        Further tries after a time-out, a closed connection, status 429 or 5xx, or a malformed answer.
    backoff_s : float
        Wait before the first of them, doubled each time up to a minute; a longer ``Retry-After`` is kept to by all.

    Raises
    ------
    ConfigError
        A value that cannot be.
    """

    url: str
    kind: str = "chat"
    model: str = ""
    template: str = ""
    aspects: Sequence[str] = ()
    range: tuple[float, float] | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    metadata: bool = False
    api_key_env: str = ""
    images_per_request: int = 1
    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 1.0
    _what = "judge"

    def __post_init__(self) -> None:
        put = object.__setattr__
        choice("judge.kind", self.kind, ("chat", "post"))
        self._check_url()
        put(self, "aspects", check_outputs("judge", self.aspects or ()))
        put(self, "images_per_request", integer("judge.images_per_request", self.images_per_request, 1, 1024))
        put(self, "concurrency", integer("judge.concurrency", self.concurrency, 1, 256))
        put(self, "timeout_s", real("judge.timeout_s", self.timeout_s, 0, open_low=True))
        put(self, "retries", integer("judge.retries", self.retries, 0, 100))
        put(self, "backoff_s", real("judge.backoff_s", self.backoff_s, 0))
        if self.range is not None:
            bounds = tuple(real("judge.range", bound) for bound in self.range) if _is_list(self.range) else ()
            if len(bounds) != 2 or bounds[0] >= bounds[1]:
                raise ConfigError(
                    f"judge.range: got {shown(self.range)}, expected [low, high]. Write for example [0, 10]."
                )
            put(self, "range", bounds)
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(self.api_key_env)):
            raise ConfigError(
                "judge.api_key_env: got something else than the name of an environment variable. Put the key into a "
                "variable, and write its name, such as OPENAI_API_KEY."
            )
        defaults = {one.name: one.default for one in self.__dataclass_fields__.values()}
        for name in ("model", "template") if self.kind == "post" else ("images_per_request", "metadata"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"judge.{name} is not for kind {self.kind}: got {shown(getattr(self, name))}. Remove it."
                )
        if self.kind == "chat":
            text("judge.model", self.model)
            if not isinstance(self.options, Mapping):
                raise ConfigError(f"judge.options: got {shown(self.options)}, expected a mapping, such as {{seed: 1}}.")
            if self.template and "prompt" not in _FIELD.findall(text("judge.template", self.template)):
                raise ConfigError(
                    f"judge.template: got {shown(self.template)}, expected {{prompt}} in it. Write {{prompt}} where the "
                    "words of the prompt go."
                )

    def _check_url(self) -> None:
        try:
            url = httpx.URL(text("judge.url", self.url))
        except httpx.InvalidURL as error:
            raise ConfigError(f"judge.url: got {shown(self.url)} ({error}), expected http://host/path.") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"judge.url: got {shown(self.url)}, expected http://host/path or https://host/path.")
        if url.userinfo:
            raise ConfigError(
                "judge.url holds a name or password. Put the key into an environment variable: api_key_env."
            )

    @property
    def rubric(self) -> str:
        """The template, or what stands for it."""
        return self.template or (
            _RUBRIC_OF_ASPECTS.replace("ASPECTS", ", ".join(self.aspects)) if self.aspects else _RUBRIC
        )

    @property
    def endpoint(self) -> str:
        """What requests go to."""
        url = httpx.URL(self.url)
        if self.kind == "post":
            return str(url)
        return str(url.copy_with(path=url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"))

    @property
    def place(self) -> str:
        """The endpoint without its query, which may hold a secret."""
        return self.endpoint.partition("?")[0]


class _Unanswered(Exception):
    """A request without a usable answer; `again`: another try may get one, not before `after_s` seconds."""

    def __init__(self, why: str, *, again: bool = True, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.again, self.after_s = again, after_s


class JudgeReward(CallableReward):
    """A judge over HTTP as a reward. A picture that it does not rate has no score, and ``failures`` says why.

    Parameters
    ----------
    judge : Judge
        How it is asked.
    name : str
        The name under which scores are kept.
    batch_size : int
        Pictures that are asked for in one go, `judge.concurrency` requests at a time.

    Raises
    ------
    RewardError
        No key in the environment, an endpoint that is not there or does not take the key.
    """

    def __init__(self, judge: Judge, name: str = "judge", *, batch_size: int = 32) -> None:
        super().__init__(self._ask_all, name, outputs=judge.aspects, device="cpu", batch_size=batch_size)
        self.judge = judge
        self.reads_metadata = judge.metadata or any(one != "prompt" for one in _FIELD.findall(judge.rubric))
        self._key = os.environ.get(judge.api_key_env, "") if judge.api_key_env else ""
        if judge.api_key_env and not self._key:
            raise RewardError(
                f"judge {name}: got no key in the environment variable {judge.api_key_env}, expected one. Set it: "
                f"export {judge.api_key_env}=..."
            )
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=judge.timeout_s,
            limits=httpx.Limits(max_connections=judge.concurrency, max_keepalive_connections=judge.concurrency),
        )
        self._not_before = 0.0  # on the monotonic clock; what a Retry-After asks for
        self._random = random.Random()
        self._require_there()

    def fingerprint(self) -> str:
        """Return a digest of what is asked, and of whom; neither the key nor how often it is tried."""
        asked = self.judge
        whom = asked.place if asked.kind == "post" else asked.model
        rubric = [asked.rubric, dict(asked.options)] if asked.kind == "chat" else []
        return digest([asked.kind, whom, *rubric, list(asked.aspects), asked.range])

    def _require_there(self) -> None:
        """Ask once whether somebody answers at all: any status but a refused key will do."""
        url = (
            self.judge.endpoint.replace("/chat/completions", "/models")
            if self.judge.kind == "chat"
            else self.judge.endpoint
        )
        try:
            status = self._client.get(url, timeout=min(self.judge.timeout_s, _PROBE_S)).status_code
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise RewardError(
                f"judge {self.name}: got no connection to {self.judge.place} ({self._safe(error)}), expected an endpoint "
                "that answers. Start its server, or mend the url."
            ) from None
        except httpx.HTTPError:  # it is there, and slow, or of another mind about this request
            return
        if status in (401, 403):
            key = f"the key in {self.judge.api_key_env}" if self._key else "no key"
            raise RewardError(
                f"judge {self.name}: {self.judge.place} answered {status} to {key}, expected one that it takes. Name the "
                "environment variable of a valid key: api_key_env."
            )

    def _safe(self, words: object) -> str:
        """Return text without the key, should an answer repeat it."""
        return str(words).replace(self._key, "***") if self._key else str(words)

    # Asking

    def _ask_all(
        self, prompts: list[str], images: list[Image.Image], metadata: list[dict[str, Any]] | None = None
    ) -> list[Any]:
        """Return the answer for each picture, in their order: a number, several, or the error that says why not."""
        size, stop = self.judge.images_per_request, threading.Event()
        asked = list(zip(prompts, images, metadata or [{}] * len(prompts), strict=True))
        groups = [asked[k : k + size] for k in range(0, len(asked), size)]
        try:
            found = prefetch(
                lambda group: self._ask(group, stop), groups, workers=self.judge.concurrency, ahead=len(groups)
            )
            return [answer for answers in found for answer in answers]
        finally:
            stop.set()  # Ctrl-C: whoever waits for another try gives up

    def _ask(self, group: list[tuple[str, Image.Image, dict[str, Any]]], stop: threading.Event) -> list[Any]:
        """Return the answers for the pictures of one request, tried again where that may help."""
        tries, wait = 0, 0.0
        while True:
            stop.wait(max(wait, self._not_before - time.monotonic()))
            tries += 1
            try:
                return self._answers(self._post(self._request(group)), len(group))
            except _Unanswered as error:
                if error.after_s:
                    self._not_before = max(self._not_before, time.monotonic() + error.after_s)
                if not error.again or tries > self.judge.retries or stop.is_set():
                    why = self._safe(error)
                    break
            # Half of it at random, so that requests that failed together do not come back together.
            wait = min(self.judge.backoff_s * 2 ** (tries - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1)
        if len(group) > 1 and not stop.is_set():
            return [answer for one in group for answer in self._ask([one], stop)]
        return [RewardError(f"{why} ({tries} {'try' if tries == 1 else 'tries'})") for _ in group]

    def _request(self, group: list[tuple[str, Image.Image, dict[str, Any]]]) -> dict[str, Any]:
        pictures = [_png(image) for _, image, _ in group]
        if self.judge.kind == "post":
            sent = {"prompts": [prompt for prompt, _, _ in group], "images": pictures}
            return {**sent, "metadata": [more for _, _, more in group]} if self.judge.metadata else sent
        prompt, _, more = group[0]
        known = {**more, "prompt": prompt}
        missing = [name for name in _FIELD.findall(self.judge.rubric) if name not in known]
        if missing:
            raise _Unanswered(f"the template asks for {missing}, which the prompt's metadata lacks", again=False)
        content = [
            {"type": "text", "text": _FIELD.sub(lambda found: str(known[found[1]]), self.judge.rubric)},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pictures[0]}"}},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": self.judge.model, "messages": messages, **self.judge.options}

    def _post(self, request: dict[str, Any]) -> Any:
        """Send a request and return the JSON of its answer."""
        limit, begin, parts, length = self.judge.timeout_s, time.monotonic(), [], 0
        try:
            with self._client.stream("POST", self.judge.endpoint, json=request) as answer:
                for part in answer.iter_bytes():  # httpx limits the wait for each part, not for all of them
                    parts.append(part)
                    length += len(part)
                    if time.monotonic() - begin > limit:
                        raise _Unanswered(f"no whole answer within {limit:g} s")
                    if length > _MOST_BYTES:
                        raise _Unanswered(f"an answer of more than {_MOST_BYTES // 2**20} MB")
        except httpx.TimeoutException:
            raise _Unanswered(f"no answer within {limit:g} s") from None
        except httpx.RequestError as error:
            raise _Unanswered(f"{type(error).__name__}: {error}") from None
        content = b"".join(parts).decode("utf-8", "replace")
        if not answer.is_success:
            again = answer.status_code in _AGAIN or answer.status_code >= 500
            after = _retry_after(answer.headers.get("Retry-After")) if again else 0.0
            raise _Unanswered(f"status {answer.status_code}: {shown(content)}", again=again, after_s=after)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _Unanswered(f"an answer that is no JSON: {shown(content)}") from None

    # What comes back

    def _answers(self, reply: Any, n: int) -> list[Any]:
        """Return the numbers of the `n` pictures of a reply."""
        if self.judge.kind == "post":
            found = reply.get("scores") if isinstance(reply, Mapping) else reply
            if not isinstance(found, list) or len(found) != n:
                raise _Unanswered(f"expected {n} scores, got {shown(reply)}")
            return [self._numbers(one, one) for one in found]
        try:
            words = reply["choices"][0]["message"]["content"]
            if isinstance(words, list):  # some servers answer in parts
                words = "".join(part.get("text", "") for part in words)
            words = words.rpartition("</think>")[2].strip()
        except (LookupError, TypeError, AttributeError):
            raise _Unanswered(f"a reply without choices[0].message.content: {shown(reply)}") from None
        return [self._numbers(_object(words) if self.judge.aspects else _single(words), words)]

    def _numbers(self, found: Any, told: Any) -> float | list[float]:
        """Return the number, or those of the aspects, that `told` gives."""
        if not self.judge.aspects:
            return self._number(found, told)
        if not isinstance(found, Mapping):
            raise _Unanswered(f"expected a JSON object of {list(self.judge.aspects)}, got {shown(told)}")
        return [self._number(found.get(aspect), told) for aspect in self.judge.aspects]

    def _number(self, found: Any, told: Any) -> float:
        low, high = self.judge.range or (-math.inf, math.inf)
        try:
            value = math.nan if found is None or isinstance(found, bool) else float(found)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            within = f" in {list(self.judge.range)}" if self.judge.range else ""
            raise _Unanswered(
                f"expected {'numbers' if self.judge.aspects else 'one number'}{within}, got {shown(told)}"
            )
        return value


def load_judge(source: str | Path, name: str | None = None, *, batch_size: int = 32) -> JudgeReward:
    """Return the judge that a YAML file describes, after a look whether it answers; see :class:`Judge`."""
    remedy = "Write url, kind, model and so on, one a line."
    content = read_yaml(source, "judge", error=RewardError, remedy=remedy)
    return JudgeReward(Judge.from_dict(content), name or Path(source).stem, batch_size=batch_size)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _single(words: str) -> float | None:
    """Return the one number of an answer such as "7.5", "Score: 7" or "7 out of 10"; None where it is not clear."""
    ratio = _OUT_OF.findall(words)
    found = ratio if ratio else _NUMBER.findall(words)
    return float(found[0]) if len(found) == 1 else None


def _object(words: str) -> Any:
    """Return the JSON object in an answer, also between other words or in a code fence."""
    try:
        return json.loads(words[words.index("{") : words.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None


def _retry_after(told: str | None) -> float:
    """Return the seconds that a Retry-After asks for: a number, or a date."""
    if not told:
        return 0.0
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0
