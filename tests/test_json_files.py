"""JSON files of ours: what is damaged or hostile is one message: file, place, way out."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from lmmono.errors import RunError
from lmmono.files.json_files import read_json


class Facts(BaseModel):
    model_config = ConfigDict(strict=True)

    seed: int
    name: str = "x"
    widths: dict[str, int] = {}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "damaged: Invalid JSON: EOF"),
        (b"{", "damaged: Invalid JSON"),
        (b'{"seed": 1} x', "damaged: Invalid JSON"),
        (b"\xff\xfe", "damaged: Invalid JSON"),
        (b'{"seed": "\xff"}', "damaged: Invalid JSON"),
        (b"[" * 100_000, "damaged: Invalid JSON: recursion limit"),
        (b'{"seed": ' + b'{"a":' * 100_000, "damaged: Invalid JSON: recursion limit"),
        (b"[]", "damaged: Input should be an object, got a list"),
        (b"7", "damaged: Input should be an object, got 7"),
        (b"null", "damaged: Input should be an object, got None"),
        (b"{}", "damaged: seed: Field required"),
        (b'{"seed": null}', "damaged: seed: Input should be a valid integer, got None"),
        (b'{"seed": "1"}', "damaged: seed: Input should be a valid integer, got '1'"),
        (b'{"seed": 1e400}', "damaged: seed: "),
        (b'{"seed": NaN}', "damaged: seed: "),
        (b'{"seed": 1, "widths": {"a": []}}', "damaged: widths.a: Input should be a valid integer"),
        (b'{"seed": 1, "name": ' + b"9" * 5000 + b"}", "damaged: "),
        (b'{"seed": 1, "widths": {%s}}' % b",".join(b'"%d": ""' % i for i in range(9)), "4 more"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_are_named_with_place_and_way_out(tmp_path, content, fault):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_json(path, Facts, RunError, way_out="capture it again")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and fault in message
    assert message.endswith("; capture it again") and len(message) < 700


def test_what_cannot_be_read_says_why(tmp_path):
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(RunError, match=reason):
            read_json(path, Facts, RunError)
    with pytest.raises(RunError, match="want at most 64,000,000 bytes"):
        read_json(Path("/dev/zero"), Facts, RunError)


def test_a_sound_file_is_what_it_says(tmp_path):
    (tmp_path / "a.json").write_text('{"seed": 3, "widths": {"a": 1}}')
    assert read_json(tmp_path / "a.json", Facts, RunError) == Facts(seed=3, widths={"a": 1})
    assert read_json(tmp_path / "a.json", dict, RunError)["seed"] == 3
