"""Opening runs for the page, the address it listens on, and Gradio's environment."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import failure
from uvim_fsq.demo.prediction import MAX_PIXELS
from uvim_fsq.demo.server import address_of, listen, open_demo, prepared
from uvim_fsq.errors import UserError


def test_an_lm_shows_photos_and_its_oracles_tokens(random_runs: tuple[Path, Path]) -> None:
    title, photos, swap = open_demo(str(random_runs[1]))
    assert photos is not None and swap is not None and swap.count == 6
    assert title == "nyu_depth: lm/step_00000000"  # without the folders above the run


def test_an_oracle_shows_tokens_only(random_runs: tuple[Path, Path]) -> None:
    _, photos, swap = open_demo(str(random_runs[0]))
    assert photos is None and swap is not None


def test_without_its_data_set_an_lm_still_shows_photos(
    random_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, photos, swap = open_demo(str(random_runs[1]), ["data.root=nowhere"])
    assert photos is not None and swap is None and "data.root=nowhere: no such folder" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.root=nowhere: no such folder"):
        open_demo(str(random_runs[0]), ["data.root=nowhere"])


def test_the_size_of_photos_is_limited_unless_it_is_given(direct_dir: Path) -> None:
    for overrides, limit in (([], MAX_PIXELS), (["data.max_pixels=77"], 77)):
        photos = open_demo(str(direct_dir), overrides)[1]
        assert photos is not None and photos._base.run.data.max_pixels == limit


def test_a_port_that_is_taken_is_refused_in_one_line() -> None:
    first = listen("127.0.0.1", 0)
    first.listen()
    with first, pytest.raises(UserError, match=r"cannot listen on 127.0.0.1, port \d+ \(.*in use\); give another"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(("host", "port"), [("no such host", 0), ("127.0.0.1", 99999), ("", -1)])
def test_addresses_that_do_not_exist_are_refused(host: str, port: int) -> None:
    with pytest.raises(UserError, match="cannot listen on"):
        listen(host, port)


def test_the_address_can_be_opened() -> None:
    with listen("127.0.0.1", 0) as listening:
        assert address_of(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_gradio_gets_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    with prepared():
        assert "GRADIO_ALLOWED_PATHS" not in os.environ and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        (folder / "photo.png").write_text("")
    assert os.environ["GRADIO_ALLOWED_PATHS"] == "/" and os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"
    assert "GRADIO_TEMP_DIR" not in os.environ and not folder.exists()


def test_without_gradio_the_command_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a))
    assert "pip install 'uvim-fsq[demo]'" in failure(capsys, "demo", "runs/x")
