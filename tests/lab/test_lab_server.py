"""The server: checked controls, a cache, and who may ask."""

from __future__ import annotations

import json
from pathlib import Path
from threading import get_ident

import pytest
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.lab import pictures
from deltaw.lab.controls import Controls, drawn
from deltaw.lab.export import write_site
from deltaw.lab.server import make_app
from deltaw.ops.native import library

HERE = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def client(tiny: Bench) -> TestClient:
    return TestClient(make_app(tiny.lab), base_url=HERE)


def test_lab_server_frames_name_thirteen_pictures_with_all_their_words(client: TestClient):
    frames = client.get("/api/pictures").json()
    assert [p["number"] for p in frames["pictures"]] == list(range(1, 14))
    for picture in frames["pictures"]:
        for part in ("title", "notice", "formula", "misconception", "cure", "question", "answer"):
            assert len(picture[part]) > 8, (picture["number"], part)
        assert picture["controls"]
    assert frames["recorded"] is False


@pytest.mark.parametrize("number", range(1, 14))
def test_lab_server_every_picture_answers_at_its_defaults_and_again_from_the_cache(client: TestClient, number: int):
    first = client.get(f"/api/pictures/{number}")
    assert first.status_code == 200, first.text
    while first.json()["data"].get("pending"):
        first = client.get(f"/api/pictures/{number}")
    assert first.json()["numbers"]
    assert first.json()["data"]
    assert client.get(f"/api/pictures/{number}").json() == first.json()


def test_lab_server_what_was_computed_is_not_computed_again(tiny: Bench, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def count(lab: object, c: object) -> dict[str, object]:
        calls.append(1)
        return {"numbers": [], "data": {"n": len(calls)}}

    makers = dict(pictures._MAKERS)
    makers[13] = (makers[13][0], count, None)
    monkeypatch.setattr(pictures, "_MAKERS", makers)
    counted = TestClient(make_app(type(tiny.lab)(tiny.lab.base)), base_url=HERE)
    for rank in (3, 4, 3, 4, 3):
        counted.get(f"/api/pictures/13?rank={rank}")
    assert len(calls) == 2


def test_lab_server_the_threads_of_a_picture_end_with_its_answer(tiny: Bench, monkeypatch: pytest.MonkeyPatch):
    """Else they count beside those of the next one, and all of them sleep at every barrier."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(library, "end_threads", lambda: seen.append(("ended", get_ident())))

    def note(lab: object, c: object) -> dict[str, object]:
        seen.append(("computed", get_ident()))
        return {"numbers": [], "data": {}}

    makers = dict(pictures._MAKERS)
    makers[9], makers[13] = (makers[9][0], note, note), (makers[13][0], note, None)
    monkeypatch.setattr(pictures, "_MAKERS", makers)
    client = TestClient(make_app(type(tiny.lab)(tiny.lab.base)), base_url=HERE)
    assert seen == [("ended", get_ident())]  # those that loaded the base
    assert client.get("/api/pictures/13").status_code == 200
    assert client.post("/api/pictures/9", json={"step": 1}, headers={"origin": HERE}).status_code == 200
    assert [what for what, _ in seen[1:]] == ["computed", "ended", "computed", "ended"]
    assert seen[1][1] == seen[2][1]
    assert seen[3][1] == seen[4][1]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("8?rank=0", "Picture8.rank: Input should be greater than or equal to 1"),
        ("8?rank=513", "less than or equal to 512"),
        ("8?rank=eight", "Picture8.rank: Input should be a valid integer"),
        ("8?rnak=8", "unknown setting 'rnak' for Picture8. Did you mean 'rank'?"),
        ("13?noise=nan", "Picture13.noise"),
        ("4?format=nf5", "Input should be 'fp16', 'int8', 'int4', 'fp4' or 'nf4'"),
        ("4?format=fp16&double=true", "fp16 has no scales"),
        ("2?model=gpt2&targets=q_proj,v_proj", "q_proj"),
        ("6?target=k_proj&rank=17", "at most 16 directions"),
    ],
)
def test_lab_server_a_wrong_control_is_422_with_a_sentence(client: TestClient, query: str, words: str):
    answer = client.get(f"/api/pictures/{query}")
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


@pytest.mark.parametrize("number", ["0", "14", "x", "-1"])
def test_lab_server_a_picture_that_is_not_there_is_404(client: TestClient, number: str):
    answer = client.get(f"/api/pictures/{number}")
    assert answer.status_code == 404
    assert "numbered 1 to 13" in answer.json()["detail"]


SAME = {"origin": HERE}


def test_lab_server_only_its_own_page_may_post(client: TestClient):
    given = {"step": 1, "rank": 2}
    for headers in ({}, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:9"}, {"origin": "null"},
                    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "none"}):  # fmt: skip
        refused = client.post("/api/pictures/9", json=given, headers=headers)
        assert refused.status_code == 403, headers
        assert "own page" in refused.json()["detail"]
    for site in ("cross-site", "same-site"):
        assert client.get("/api/pictures/9", headers={"sec-fetch-site": site}).status_code == 403
    form = client.post("/api/pictures/9", content='{"step": 1}', headers={**SAME, "content-type": "text/plain"})
    assert form.status_code == 403
    assert client.post("/api/pictures/9", json=given, headers=SAME).json()["data"]["done"] == 1
    assert client.post("/api/pictures/9", json=given, headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_lab_server_posts_are_checked_like_gets(client: TestClient):
    wrong = client.post("/api/pictures/9", json={"step": 21}, headers=SAME)
    assert wrong.status_code == 422
    assert "less than or equal to 20" in wrong.json()["detail"]
    assert client.post("/api/pictures/8", json={}, headers=SAME).status_code == 405
    assert client.post("/api/pictures/10", json={"prompt": ""}, headers=SAME).status_code == 422


def test_lab_server_other_names_are_refused_on_loopback(client: TestClient, tiny: Bench):
    for name in ("evil.example", "127.0.0.1.evil.example", "192.168.1.2:8765"):
        assert client.get("/api/pictures", headers={"host": name}).status_code == 403
    for name in ("localhost:8765", "127.0.0.1:8765", "[::1]:8765"):
        assert client.get("/api/pictures", headers={"host": name}).status_code == 200
    open_to_all = TestClient(make_app(tiny.lab, host="0.0.0.0"), base_url="http://box.example:8765")
    assert open_to_all.get("/api/pictures").status_code == 200


def test_lab_server_the_page_asks_no_other_machine(client: TestClient):
    for path in (
        "/",
        "/lab.css",
        "/js/main.js",
        "/vendor/d3/d3.min.js",
        "/vendor/plot/plot.umd.min.js",
        "/vendor/d3/LICENSE",
    ):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        if not path.startswith("/vendor"):
            assert "http://" not in answer.text.replace("http://www.w3.org", ""), path
            assert "https://" not in answer.text, path
    page = client.get("/").text
    assert "<style" not in page
    assert " style=" not in page
    assert "onclick" not in page


def test_lab_server_every_control_has_a_label_and_a_default_that_is_allowed(tiny: Bench):
    walked = 0
    for picture in tiny.pictures.values():
        assert isinstance(picture.controls(), Controls)
        for control in drawn(picture.controls):
            walked += 1
            assert control["label"]
            assert control["kind"] in ("slider", "choice", "steps", "switch", "text")
            for value in control["recorded"]:
                picture.controls(**{control["name"]: value})
    assert walked > 35


def test_lab_server_an_export_has_the_same_data_at_its_positions(tiny: Bench, tmp_path: Path):
    n = write_site(tiny.lab, tmp_path / "site", only=(4, 8, 9, 10, 12, 13))
    frames = json.loads((tmp_path / "site" / "data" / "pictures.json").read_text())
    assert frames["recorded"] is True
    files = sorted((tmp_path / "site" / "data").glob("*/*.json"))
    assert len(files) == n > 100
    assert {f.parent.name for f in files} == {"4", "8", "9", "10", "12", "13"}
    eight = frames["pictures"][1]
    at = [eight["controls"][0]["recorded"].index(8), eight["controls"][1]["recorded"].index(4096)]
    plain = json.loads((tmp_path / "site" / "data" / "8" / f"{at[0]}-{at[1]}.json").read_text())
    assert plain == tiny(8, rank=8, d=4096)
    assert 'content="recorded"' in (tmp_path / "site" / "index.html").read_text()
    assert (tmp_path / "site" / "vendor" / "d3" / "LICENSE").is_file()
