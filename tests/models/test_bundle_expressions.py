"""The arithmetic of a bundle's configuration is worked out as data; Python in it is refused and not run."""

import json
from pathlib import Path
from typing import Any

import pytest

from dicom_node.errors import PackageError
from dicom_node.models.formats import describe_folder

LOADED = {"_target_": "LoadImaged", "keys": "image"}
ORIENTED = {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}
SPACED = {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"}


def bundle(first_mm: Any = 1.5, **keys: Any) -> dict[str, Any]:
    """A configuration whose first spacing is `first_mm`, with more keys at the top."""
    return {
        "network_def": {"_target_": "BasicUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [LOADED, ORIENTED, SPACED | {"pixdim": [first_mm, 1.5, 2.0]}],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32]},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "nearest_interp": True},
            ],
        },
        **keys,
    }


def put(folder: Path, config: Any) -> Path:
    """Write the bundle; its weights are some bytes."""
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    channels = {"outputs": {"pred": {"channel_def": {"0": "background", "1": "spleen"}}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": channels}))
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "models" / "model.pt").write_bytes(b"weights")
    return folder


def spacing_of(folder: Path, config: Any) -> Any:
    """The spacing that is told of the bundle."""
    return describe_folder(put(folder, config)).manifest["input"]["spacing_mm"]


EXPRESSIONS: dict[str, tuple[str, Any]] = {
    "a choice": ("$1.5 if @yes else 3.0", 1.5),
    "the other choice": ("$1.5 if not @yes else 3.0", 3.0),
    "a comparison": ("$1.5 if @two > 1 and @two <= 2 else 3.0", 1.5),
    "a chain of them": ("$1.5 if 1 < @two < 3 else 3.0", 1.5),
    "equality of texts": ("$1.5 if @text == 'high' or @no else 3.0", 1.5),
    "nothing": ("$1.5 if @nothing is None else 3.0", 1.5),
    "an entry of a list": ("$@sizes[1]", 5.0),
    "a nested choice": ("$1.0 if @no else 2.0 if @text != 'high' else 4.0", 4.0),
    "the first that is so": ("$@no or @two", 2),
    "how many": ("$len(@sizes) / 4", 0.5),
    "a kind of number": ("$float(int(2.9)) if list(@sizes) == [4, 5] else 3.0", 2.0),
}


@pytest.mark.parametrize("case", EXPRESSIONS)
def test_plain_choices_and_comparisons_are_worked_out(case: str, tmp_path: Path) -> None:
    text, expected = EXPRESSIONS[case]
    keys = {"yes": True, "no": False, "two": 2, "text": "high", "nothing": None, "sizes": [4.0, 5.0]}
    assert spacing_of(tmp_path / "bundle", bundle(text, **keys))[0] == expected


def test_lists_of_transforms_may_be_joined_by_reference(tmp_path: Path) -> None:
    config = bundle(first=[LOADED, ORIENTED], second="@third", third=[SPACED])
    config["preprocessing"]["transforms"] = "$@first + @second"
    assert spacing_of(tmp_path / "bundle", config) == [1.5, 1.5, 2.0]


EXECUTING = {
    "an attribute in a branch not taken": "$1.5 if True else ().__class__",
    "a call in a branch not taken": "$1.5 if True else print()",
    "a length of two": "$len([1.5], [1.5])",
    "a length with a name": "$len(obj=[1.5])",
    "a length of a call": "$len(print())",
    "a length as a value": "$[len][0]",
    "a length's attribute": "$len.__self__",
    "a length of a number": "$len(1.5)",
    "a length by another way": "$(len if True else len)([1.5])",
    "a whole infinity": "$int(1e999)",
    "a number of a text": "$int('9' * 9)",
    "a call as the condition": "$1.5 if print() else 1.5",
    "an attribute as the condition": "$1.5 if @yes.real else 3.0",
    "a call behind a short cut": "$1.5 if True or print() else 3.0",
    "a call that is compared": "$1.5 if print() == None else 3.0",
    "a comprehension as the condition": "$1.5 if [x for x in (1, 2)] else 3.0",
    "a generator": "$1.5 if (x for x in (1, 2)) else 3.0",
    "an assignment": "$(x := 1.5)",
    "a formatted text": "$1.5 if f'{print()}' else 3.0",
    "a function": "$lambda x: x > 1.5",
    "a name": "$1.5 if torch else 3.0",
    "an index that calls": "$[1.5][print()]",
    "a slice": "$[1.5, 2.0][0:1]",
    "membership": "$1.5 if 1 in [1] else 3.0",
    "a dictionary": "${'a': 1.5}['a']",
    "a star": "$[*[1.5]][0]",
    "an await": "$await @yes",
    "a power": "$2 ** 99",
    "a shift": "$1 << 99999999",
    "a number that grows": "$" + "*".join(["9999999"] * 9),
    "a text that grows": "$@grown + @grown",
    "an order of unlike things": "$1.5 if 'a' < 1 else 3.0",
    "an entry that is not there": "$[1.5][7]",
    "an entry of a text": "$'abc'[0]",
    "an expression without end": "$" + "1 + " * 5000 + "1",
    "a branch that goes round": "$1.5 if @round else 3.0",
}


@pytest.mark.parametrize("case", EXECUTING)
def test_choices_and_comparisons_reach_no_python(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = bundle(EXECUTING[case], yes=True, grown="a" * 1000, round="$not @round")
    with pytest.raises(PackageError, match=r"read as data|not understood|no order|circles"):
        describe_folder(put(tmp_path / "bundle", config))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "listed", ["$@first + @second", "@second", "$@first + @first", "$@first + [1]", "$print()", "$@first + @\u00e9"]
)
def test_lists_that_go_round_or_are_worked_out_by_python_are_refused(listed: str, tmp_path: Path) -> None:
    config = bundle(first="$@second + @second", second="@first")
    config["preprocessing"]["transforms"] = listed
    with pytest.raises(PackageError, match=r"circles|values have to be worked out|references to such lists"):
        describe_folder(put(tmp_path / "bundle", config))


def test_a_configuration_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "bundle", bundle())
    for text in ("[" * 100_000 + "]" * 100_000, '{"a": ' * 100_000 + "1" + "}" * 100_000):
        (folder / "configs" / "inference.json").write_text(text)
        with pytest.raises(PackageError, match="not readable as plain json: nested without end"):
            describe_folder(folder)
    (folder / "configs" / "inference.json").write_text(" " * 1024**2 + "{}")
    with pytest.raises(PackageError, match="larger than 1024 KiB"):
        describe_folder(folder)


def test_references_that_grow_exponentially_end_at_a_bound(tmp_path: Path) -> None:
    grown = {f"level{n}": [f"@level{n + 1}"] * 8 for n in range(12)} | {"level12": 1.0}
    config = bundle("@level0", **grown)
    with pytest.raises(PackageError, match="values have to be worked out"):
        describe_folder(put(tmp_path / "bundle", config))
