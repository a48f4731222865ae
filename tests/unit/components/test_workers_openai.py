"""Tests the endpoint worker with a live server: answers, all failures, budgets, and a key that is never written."""

from __future__ import annotations

import base64
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image as PILImage

from mmemb.components.workers.openai import OpenAIWorker
from mmemb.rationales.generate import generate
from mmemb.types import Image, Item, Page, Pair, Rationale, Text, Video
from tests.unit.components.chat_server import ChatServer, chat_server
from tests.unit.rationales.fakes import make_pairs

KEY = "sk-secret-0123456789"
ITEMS = [Item("what is", (Text(f"thing {number}"),)) for number in range(6)]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture
def make(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAIWorker]:
    monkeypatch.setenv("MY_KEY", KEY)

    def build(**options: object) -> OpenAIWorker:
        given = {"base_url": server.url, "api_key_variable": "MY_KEY", "retries": 2, "timeout": 20.0, **options}
        return OpenAIWorker("some/model", **given)  # type: ignore[arg-type]

    return build


def texts(proposals: list[list[Rationale]]) -> list[list[str]]:
    return [[each.text for each in rationales] for rationales in proposals]


def test_it_makes_k_samples_per_item_with_provenance(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    worker = make(temperature=0.7, top_p=0.9, max_new_tokens=17, extra_body={"top_k": 5})
    proposals = worker.propose(ITEMS, 3, seed=1)
    assert [len(each) for each in proposals] == [3] * 6
    assert len(server.requests) == 18
    for request in server.requests:
        assert request["model"] == "some/model"
        assert (request["temperature"], request["top_p"], request["max_tokens"], request["top_k"]) == (0.7, 0.9, 17, 5)
        assert 0 <= request["seed"] < 2**31
        assert request["messages"][0]["content"].startswith("what is\nthing ")  # a text is not sent as parts
        assert request["messages"][0]["content"].endswith(worker.instruction)
    assert len({request["seed"] for request in server.requests}) == 18
    for each in (rationale for rationales in proposals for rationale in rationales):
        assert (each.worker, each.model, each.tokens, each.finish_reason) == ("openai", "some/model@f1", 4, "stop")
        assert len(each.prompt_hash) == 16
    assert "18 answers, 180 prompt and 72 completion tokens" in worker.report


def test_equal_items_are_asked_once(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    one, other = make().propose([ITEMS[0], Item("what is", (Text("thing 0"),), {"secret": "hidden value"})], 2, seed=0)
    assert one == other
    assert len(server.requests) == 2
    assert "hidden value" not in str(server.requests)  # fields are not sent


def test_pictures_whose_paths_end_alike_are_sent_separately(
    server: ChatServer, make: Callable[..., OpenAIWorker], tmp_path: Path
) -> None:
    for colour in ("red", "blue"):
        path = tmp_path / colour / "images" / "0.png"
        path.parent.mkdir(parents=True)
        PILImage.new("RGB", (8, 8), colour).save(path)
    items = [Item("look", (Image(str(path)),)) for path in sorted(tmp_path.glob("*/images/0.png"))]
    one, other = make().propose(items, 2, seed=0)
    assert len(server.requests) == 4
    assert [each.text for each in one] != [each.text for each in other]
    assert [each.seed for each in one] == [each.seed for each in other]  # data in another folder keeps its seeds


def test_pictures_and_frames_are_sent_as_data_urls(
    server: ChatServer, make: Callable[..., OpenAIWorker], tmp_path: Path
) -> None:
    PILImage.new("RGBA", (80, 40), (255, 0, 0, 255)).save(tmp_path / "red.png")
    frames = tuple(PILImage.new("RGB", (8, 8), colour) for colour in ("blue", "lime"))
    item = Item("look", (Text("first"), Page(str(tmp_path / "red.png")), Video(frames), Image("bundled:noto/1f921")))
    make(max_pixels=800).propose([item], 1, seed=0)
    content = server.requests[0]["messages"][0]["content"]
    kinds = [entry["type"] for entry in content]
    assert kinds == ["text", "text", "image_url", "image_url", "image_url", "image_url", "text"]
    pictures = []
    for entry in content[2:6]:
        head, data = entry["image_url"]["url"].split(",")
        assert head == "data:image/jpeg;base64"
        pictures.append(PILImage.open(io.BytesIO(base64.b64decode(data))))
    assert pictures[0].size == (40, 20)  # shrunk to the maximum area
    assert [picture.getpixel((4, 4)) for picture in pictures[:3]] == [
        pytest.approx(colour, abs=3) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))
    ]


def test_many_requests_are_in_flight(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    server.delay = 0.1
    make(concurrency=6).propose(ITEMS, 3, seed=0)
    assert 4 <= server.most_at_once <= 6


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "cut", "truncated"])
def test_a_temporary_failure_is_repeated(
    fault: int | str, server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    undisturbed = make().propose(ITEMS[:2], 2, seed=0)
    server.requests.clear()
    server.faults = [fault, fault]
    assert make().propose(ITEMS[:2], 2, seed=0) == undisturbed
    assert server.statuses[fault] == 2
    assert len(server.requests) == 6


@pytest.mark.parametrize("fault", ["malformed", "html", "empty"])
def test_an_answer_outside_the_protocol_loses_only_its_candidate(
    fault: str, server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    whole = make().propose(ITEMS[:2], 1, seed=0)
    server.requests.clear()
    server.faults = [fault]
    with pytest.warns(UserWarning, match="1 of 2 requests were refused; .*does not follow the protocol"):
        assert make(concurrency=1).propose(ITEMS[:2], 1, seed=0) == [[], whole[1]]
    assert len(server.requests) == 2
    server.always = fault
    with pytest.raises(ValueError, match="2 of 2 requests were refused; .*none of 2 items was answered"):
        make().propose(ITEMS[:2], 1, seed=0)


def test_a_slow_request_times_out_and_is_repeated(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    server.faults = ["slow"]
    assert texts(make(timeout=0.4).propose(ITEMS[:1], 1, seed=0))[0]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("always", "message"),
    [
        (503, "failed and asks for a pause .*retries: 0 .*status 503"),
        (429, "limits the rate of requests .*retries: 0"),
        ("cut", "cut the connection"),
        ("slow", "took longer than 0.4 s"),
    ],
)
def test_an_endpoint_that_stays_down_ends_the_run_with_an_error(
    always: int | str, message: str, server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.always = always
    with pytest.raises(ConnectionError, match=message) as caught:
        make(retries=0, timeout=0.4).propose(ITEMS[:1], 1, seed=0)
    assert server.url in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_a_pause_that_is_too_long_ends_the_run_and_is_in_the_message(
    server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.always = 429
    server.headers["retry-after"] = "300"
    with pytest.raises(ConnectionError, match=r"asks for a pause \(300\)"):
        make().propose(ITEMS[:1], 1, seed=0)
    assert len(server.requests) == 1


def test_a_request_is_not_repeated_if_the_endpoint_says_so(
    server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.always = 429
    server.headers["x-should-retry"] = "false"
    with pytest.raises(ConnectionError, match="limits the rate"):
        make().propose(ITEMS[:1], 1, seed=0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_at_once(
    status: int, server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.always = status
    with pytest.raises(ValueError, match=f"refuses the request .*status {status}.*the key in MY_KEY") as caught:
        make(concurrency=1).propose(ITEMS, 1, seed=0)
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match=r"check base_url, the model's name \(it was sent no key\)"):
        make(api_key_variable=None, concurrency=1).propose(ITEMS, 1, seed=0)


def test_a_refused_request_loses_only_its_candidates(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    whole = make().propose(ITEMS, 2, seed=0)
    server.refuse = "thing 3"
    with pytest.warns(UserWarning, match="2 of 12 requests were refused; .*'what is thing 3") as caught:
        some = make().propose(ITEMS, 2, seed=0)
    assert some == [*whole[:3], [], *whole[4:]]
    assert KEY not in str(caught[0].message)
    server.refuse = "thing"
    with pytest.raises(ValueError, match="12 of 12 requests were refused"):
        make().propose(ITEMS, 2, seed=0)


def test_a_pool_is_completed_in_spite_of_a_refused_item(
    server: ChatServer, make: Callable[..., OpenAIWorker], tmp_path: Path
) -> None:
    server.refuse = "thing 4"  # the last row, which is alone in its shard
    for _ in range(2):  # one run that has had answers, one that begins at this shard
        with pytest.warns(UserWarning, match="2 of 2 requests were refused"):
            pool = generate(make_pairs(5), [make()], 2, pool=tmp_path / "pool", seed=0, shard_size=4, progress=False)
        assert pool.candidates("pair-4").rationales == ()
        (pool.path / "candidates-000000004.parquet").unlink()


def test_refusals_are_counted_over_shards(
    server: ChatServer, make: Callable[..., OpenAIWorker], tmp_path: Path
) -> None:
    server.always = 400
    with (
        pytest.warns(UserWarning, match="2 of 2 requests were refused"),  # one refused item is only a warning
        pytest.raises(ValueError, match="2 of 2 requests were refused; .*none of 2 items was answered so far"),
    ):
        generate(make_pairs(5), [make()], 2, pool=tmp_path / "pool", seed=0, shard_size=1, progress=False)
    assert len(server.requests) == 4
    worker = make()
    for _ in range(2):  # an item that is asked twice counts once
        with pytest.warns(UserWarning, match="give no candidates"):
            worker.propose(ITEMS[:1], 1, seed=0)


def test_after_one_answer_refusals_are_only_warnings(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    worker = make(retries=0, concurrency=1)
    server.faults = ["", 503]  # the call with the answer ends with an error
    with pytest.raises(ConnectionError):
        worker.propose(ITEMS[:2], 1, seed=0)
    server.always = 400
    for start in (2, 4):
        with pytest.warns(UserWarning, match="2 of 2 requests were refused"):
            assert worker.propose(ITEMS[start : start + 2], 1, seed=0) == [[], []]


def test_a_lone_surrogate_does_not_lose_the_shard(
    server: ChatServer, make: Callable[..., OpenAIWorker], tmp_path: Path
) -> None:
    server.contents = ["a cut emoji \ud83d here, a whole \U0001f600"]
    pool = generate(make_pairs(2), [make(concurrency=1)], 1, pool=tmp_path / "pool", seed=0, progress=False)
    assert [each.text for each in pool.candidates("pair-0").rationales] == ["a cut emoji ? here, a whole \U0001f600"]
    assert pool.candidates("pair-1").rationales


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a red chair"}], "a red chair"),
        ([{"type": "thinking"}, {"type": "text", "text": "a \ud83d"}, {"type": "text", "text": "b"}], "a ?b"),
    ],
)
def test_the_parts_of_an_answer_are_joined(
    content: object, text: str, server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.contents = [content]
    assert texts(make().propose(ITEMS[:1], 1, seed=0)) == [[text]]


@pytest.mark.parametrize("content", [{"text": "a"}, 7, False, ["a"], [{"type": "text", "text": 7}], [{"type": "text"}]])
def test_an_answer_that_is_not_a_text_is_refused(
    content: object, server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.contents = [content]
    worker = make()
    with pytest.warns(UserWarning, match="content is not a text"):
        assert worker.propose(ITEMS[:1], 1, seed=0) == [[]]
    assert worker.budget.requests == 1  # it was paid for


def test_a_cut_answer_is_marked_and_a_filtered_answer_is_dropped(
    server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.reason = "length"
    assert make().propose(ITEMS[:1], 1, seed=0)[0][0].finish_reason == "length"
    server.reason = "content_filter"
    assert make().propose(ITEMS[:1], 1, seed=0) == [[]]


def test_budgets_stop_the_run_and_finished_shards_are_kept(
    server: ChatServer, make: Callable[..., OpenAIWorker], tmp_path: Path
) -> None:
    pairs = make_pairs(8)

    def run(pool: str, **options: object) -> None:
        worker = make(concurrency=1, **options)
        generate(pairs, [worker], 1, pool=tmp_path / pool, seed=0, shard_size=2, progress=False)

    with (
        pytest.warns(UserWarning, match="2 requests of one shard may write 256 tokens, .* smaller pool.shard_size"),
        pytest.raises(ValueError, match=r"token_budget of 70 tokens is used up \(70 tokens in 5 requests\)"),
    ):
        run("pool", token_budget=70)
    assert len(server.requests) == 5
    assert len(list((tmp_path / "pool").glob("candidates-*"))) == 2
    with (
        pytest.warns(UserWarning, match=r"more than the cost_budget of 0\.0001 allows"),
        pytest.raises(ValueError, match=r"cost_budget of 0.0001 is used up \(0.00012 in 2 requests\)"),
    ):
        run("other", cost_budget=0.0001, input_price=2, output_price=10)
    server.requests.clear()
    run("pool")  # the budget is not part of the pool's settings
    assert len(server.requests) == 4


def test_an_answer_without_choices_uses_the_budget(server: ChatServer, make: Callable[..., OpenAIWorker]) -> None:
    server.faults = ["empty"]
    with pytest.warns(UserWarning, match="the answer has no choices"):
        (worker := make()).propose(ITEMS[:1], 1, seed=0)
    assert (worker.budget.requests, worker.budget.completion_tokens) == (1, 4)


def test_a_budget_needs_an_endpoint_that_reports_its_usage(
    server: ChatServer, make: Callable[..., OpenAIWorker]
) -> None:
    server.usage = False
    assert make().propose(ITEMS[:1], 1, seed=0)[0][0].tokens == 0
    with pytest.raises(ValueError, match="does not say how many tokens it used"):
        make(token_budget=200).propose(ITEMS[:1], 1, seed=0)


def test_the_key_is_sent_and_written_nowhere(
    server: ChatServer,
    make: Callable[..., OpenAIWorker],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults = [500, 429, "cut"]
    worker = make()
    pairs: list[Pair] = make_pairs(4)
    generate(pairs, [worker], 2, pool=tmp_path / "pool", seed=0)
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    captured = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in (tmp_path / "pool").iterdir())
    assert KEY.encode() not in written
    for text in (caplog.text, captured.out, captured.err, repr(vars(worker)), str(worker.settings), worker.report):
        assert KEY not in text
    assert "8 answers" in captured.err


@pytest.mark.parametrize("before", range(500 - len(KEY), 501, 4))
def test_a_key_at_the_cut_of_a_long_message_is_not_shown(make: Callable[..., OpenAIWorker], before: int) -> None:
    told = make()._endpoint._clean("x" * before + KEY + "y" * 100)
    assert len(told) <= 500
    assert KEY[:4] not in told


def test_the_error_for_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch, server: ChatServer) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="variable NO_SUCH_KEY is not set; .*api_key_variable: null"):
        OpenAIWorker("m", base_url=server.url, api_key_variable="NO_SUCH_KEY").propose(ITEMS, 1, seed=0)
    free = OpenAIWorker("m", base_url=server.url, api_key_variable=None)
    assert free.propose(ITEMS[:1], 1, seed=0)[0]


def test_the_error_without_the_client_library_names_the_extra(
    make: Callable[..., OpenAIWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'mmemb\[openai\]'"):
        make().propose(ITEMS, 1, seed=0)


def test_it_works_inside_a_running_event_loop(make: Callable[..., OpenAIWorker]) -> None:
    import asyncio

    async def notebook() -> list[list[Rationale]]:
        return make().propose(ITEMS[:2], 1, seed=0)

    assert asyncio.run(notebook()) == make().propose(ITEMS[:2], 1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries is -1; give 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"base_url": "host:8000/v1"}, "base_url is 'host:8000/v1'; .* as in http://host:8000/v1"),
        ({"cost_budget": 5.0}, "cost_budget needs input_price and output_price"),
    ],
)
def test_settings_outside_their_range_are_errors(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenAIWorker("m", **options)  # type: ignore[arg-type]
