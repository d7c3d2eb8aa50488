"""What a worker does, without a cluster; with one, see test_scale.py."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from headstart import bulk
from headstart.bulk import Job
from headstart.encoder import Encoder, choose_placement, encode_batch, stored_layout
from headstart.errors import InputError, ModelError
from headstart.parts import Part, parts_of
from headstart.workers import Actor, encode

TEXTS = [f"the film was {word} {i}" for i in range(20) for word in ("superb", "awful")]


@pytest.fixture
def threads() -> Iterator[None]:
    """Workers take one thread for themselves: the tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def part_of(job: Job, table: Path) -> Part:
    pl.DataFrame({"sentence": TEXTS}).write_parquet(table)
    (part,) = parts_of([bulk.measure(job, (str(table), "1"))])
    return part


@pytest.mark.usefixtures("threads")
def test_an_actor_writes_what_a_scorer_writes(tiny_run: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        job = Job(str(tiny_run), str(tmp_path / name), precision="fp32", device="cpu")
        part = part_of(job, tmp_path / "a.parquet")
        if name == "one":
            said = bulk.Scorer(job)(part)
        else:
            said = pickle.loads(Actor(job)({"part": [json.dumps(part)]})["done"][0])
        found.append((said["name"], said["rows"], (tmp_path / name / "part-00000.parquet").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("amiss", ["table", "run"])
def test_an_error_of_ours_is_given_back_whole(amiss: str, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "nothing" if amiss == "run" else tiny_run
    job = Job(str(tiny_run), str(tmp_path / "out"), precision="fp32", device="cpu")
    part = part_of(job, tmp_path / "a.parquet")
    if amiss == "table":
        (tmp_path / "a.parquet").unlink()
    actor = Actor(Job(str(run), str(tmp_path / "out"), precision="fp32", device="cpu"))
    (given,) = actor({"part": [json.dumps(part)]})["done"]
    error = pickle.loads(given)
    assert isinstance(error, InputError)
    assert str(error).startswith(str(tmp_path / ("nothing" if amiss == "run" else "a.parquet")))


@pytest.mark.usefixtures("threads")
def test_batches_are_encoded_as_here_and_not_by_another_model(tiny_bert: Path) -> None:
    encoder = Encoder(str(tiny_bert), choose_placement("cpu", "fp32"))
    tokens, layout = encoder.tokenizer(TEXTS), stored_layout(encoder)
    index = np.arange(len(TEXTS))
    given = (index, tokens, [25, 15])
    places, values = encode(str(tiny_bert), "cpu", "fp32", encoder.fingerprint, layout, given)
    whole = [encode_batch(encoder, tokens, layout, some)[1] for some in (index[:25], index[25:])]
    np.testing.assert_array_equal(places, index)
    np.testing.assert_array_equal(values, np.concatenate(whole))
    with pytest.raises(ModelError, match="another model of this name"):
        encode(str(tiny_bert), "cpu", "fp32", "of another", layout, given)
